"""`--dry-run`: everything is loaded and steps of the longest lengths are tried; nothing is written."""

import time
from dataclasses import replace
from typing import Any

from bpo_fast import machine
from bpo_fast.config import Config
from bpo_fast.gradients import step_gradients
from bpo_fast.memory import GIB, Ledger, longest_pair_tokens, longest_pairs, step_share, token_budget
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks
from bpo_fast.setup import Parts, build, devices_of
from bpo_fast.tasks import resolve


def dry_run(config: Config, *, from_pairs: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Loads everything, prints the plan and the memory ledger and takes steps at the longest lengths; writes nothing.

    Of several devices one is tried, with its share of a step.

    Two steps are taken: the moments come with the first, the peak with the second.

    Returns:
        {"steps", "phases", "pairs", "step_s", "peak_memory_gib", "predicted_gib", "measured_gib", "suggestion"};
        predicted and measured are peaks of a training step, weights included.
    """
    with Progress(quiet=quiet) as progress:
        config = resolve(config)
        devices_of(config).check()
        parts = build(config, progress, from_pairs=from_pairs, ranks=_OneOf(config.run.devices))
        plan = parts.work.plan
        out: dict[str, Any] = {"steps": plan.num_steps, "phases": len(plan.phases), "pairs": plan.num_prompts}
        ledger = parts.ledger()
        progress.print(ledger.words())
        out |= _try_steps(parts, ledger) | {"peak_memory_gib": machine.peak_memory_gib()}
        progress.print(
            f"{plan.num_prompts} pairs, {plan.num_steps} steps, {len(plan.phases)} phases;"
            f" the longest step takes {out['step_s']:.1f} s; its peak was predicted as {out['predicted_gib']:.2f} GiB,"
            f" measured as {out['measured_gib']:.2f} GiB"
        )
        progress.print(out["suggestion"])
        parts.engine.close()
    return out


class _OneOf(Ranks):
    """The first of several ranks, with its piece of the moments; there are no others to exchange anything with."""

    def __init__(self, size: int):
        self.size = size


def _try_steps(parts: Parts, ledger: Ledger) -> dict[str, Any]:
    config = parts.config
    pairs = longest_pairs(config, parts.policy, step_share(config))
    longest = longest_pair_tokens(config, parts.policy)
    budget = token_budget(config, parts.policy)
    config = replace(config, optim=replace(config.optim, microbatch_tokens=budget.tokens))
    start_bytes, start = machine.reset_peak(), 0.0
    for step in range(2):
        start = time.perf_counter()
        sums = budget.run(lambda tokens: step_gradients(pairs, parts.policy, config.method, max_tokens=tokens))
        parts.optimizer.step(step, sums["loss"])
    seconds = time.perf_counter() - start
    measured = ledger.weights + machine.peak_bytes() - start_bytes
    free = machine.free_bytes()
    return {
        "step_s": seconds,
        "predicted_gib": (ledger.weights + ledger.training) / GIB,
        "measured_gib": measured / GIB,
        "suggestion": _suggest(config, ledger, free, longest=longest, on_gpu=parts.policy.device.type == "cuda"),
    }


def _suggest(config: Config, ledger: Ledger, free: int, *, longest: int, on_gpu: bool) -> str:
    """What to change if memory is short, or could be put to use.

    Args:
        config: as tried.
        ledger: of it.
        free: bytes.
        longest: tokens of the longest pair, which a micro-batch holds at least.
        on_gpu: there is a host to offload to.
    """
    spare = free - max(0, ledger.peak - ledger.weights)
    room = f"{free / GIB:.1f} GiB free, {ledger.peak / GIB:.2f} GiB needed at the peak"
    if spare < 0.1 * free:
        remedies = [*_smaller_activations(config, longest), *_smaller_moments(config, on_gpu)]
        if ledger.activations + ledger.head_chunk <= ledger.optimizer:
            remedies = [*_smaller_moments(config, on_gpu), *_smaller_activations(config, longest)]
        last = "lower data.max_prompt_length or sampling.max_new_tokens"
        if config.model.full:
            last = "model.full = false (LoRA)"
        return f"suggestion: {[*remedies, last][0]} ({room})"
    if ledger.num_microbatches > 1 and spare > ledger.activations + ledger.head_chunk:
        return f"suggestion: optim.microbatch_tokens = {2 * config.optim.microbatch_tokens} would fit too ({room})"
    return f"suggestion: nothing to change ({room})"


def _smaller_activations(config: Config, longest: int) -> list[str]:
    recomputed = config.model.recomputed
    tokens = config.optim.microbatch_tokens
    remedies = ["model.activation_checkpointing = selective"] if recomputed == "none" else []
    remedies += [f"optim.microbatch_tokens = {max(tokens // 2, longest)}"] if tokens > longest else []
    return remedies + (["model.activation_checkpointing = full"] if recomputed == "selective" else [])


def _smaller_moments(config: Config, on_gpu: bool) -> list[str]:
    remedies = ["optim.states = 8bit"] if config.optim.states != "8bit" else []
    return remedies + (["optim.offload = true"] if on_gpu and not config.optim.offload else [])
