"""`--dry-run`: everything is loaded and one step at the longest lengths is tried; nothing is written."""

import time
from typing import Any

from bpo_fast.collect import microbatches
from bpo_fast.config import Config
from bpo_fast.machine import peak_memory_gib
from bpo_fast.progress import Progress
from bpo_fast.setup import Parts, build
from bpo_fast.tasks import resolve
from bpo_fast.types import Completion, Pair, Prompt


def dry_run(config: Config, *, from_pairs: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Loads everything, prints the plan and takes the gradient of one step at the longest lengths; writes nothing.

    Returns:
        {"steps", "phases", "pairs", "step_s", "peak_memory_gib"}
    """
    with Progress(quiet=quiet) as progress:
        parts = build(resolve(config), progress, from_pairs=from_pairs)
        plan, config = parts.plan, parts.config
        pairs = _longest_pairs(parts)
        start = time.perf_counter()
        batches = microbatches(pairs, parts.policy, config.optim.microbatch_tokens)
        for batch in batches:
            with parts.policy.members():
                repeated = batch.repeat(parts.policy.num_members)
                loss, _ = parts.policy.loss(repeated, None, config.method, num_pairs=len(pairs))
                loss.backward()
        out = {"steps": plan.num_steps, "phases": len(plan.phases), "pairs": plan.num_prompts}
        out |= {"step_s": time.perf_counter() - start, "peak_memory_gib": peak_memory_gib()}
        progress.print(
            f"{plan.num_prompts} pairs, {plan.num_steps} steps, {len(plan.phases)} phases;"
            f" the longest step takes {out['step_s']:.1f} s, peak {out['peak_memory_gib']:.2f} GiB"
        )
        parts.engine.close()
    return out


def _longest_pairs(parts: Parts) -> list[Pair]:
    """One step of pairs at the limits of prompt and completion."""
    config, token = parts.config, parts.policy.eos_ids[0]
    assert config.data.max_prompt_length, "resolve() has set it"
    assert config.sampling.max_new_tokens, "resolve() has set it"
    prompt = Prompt(0, "", (token,) * config.data.max_prompt_length)
    answer = Completion(0, 0, (token,) * config.sampling.max_new_tokens, "", True, 0, 0)
    return [Pair(prompt, answer, answer, 1.0, 0.0)] * (config.method.batch_pairs or 1)
