"""`bpo-fast bench step`: one optimizer step on preference pairs, ours against TRL's DPOTrainer, in one run.

Same model, same pairs, same optimizer, no dropout. Ours includes the reference pass (once a phase); TRL is timed with
the reference model in the step and with `precompute_ref_log_probs`, whose cost falls outside of its timed steps. TRL's
`padding_free` is switched off by its current release; the sequences here are of one length, so nothing is padded. On a
GPU both train bf16 weights, ours with float32 masters, TRL without; so they do on a CPU with `--dtype bfloat16`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bpo_fast_bench.contenders import (
    FORMS,
    LENGTHS,
    LORA_RANK,
    Case,
    Options,
    Work,
    compare,
    make_texts,
    measure,
    now,
    run_rows,
    serve,
    trl_blocks,
)

PEERS = ("trl", "trl-precomputed")


@dataclass(frozen=True)
class StepOptions(Options):
    """TRL trains an ensemble one member after the other, five times one step.

    Attributes:
        compiled: ours is measured with a compiled trunk as well.
    """

    peers: tuple[str, ...] = PEERS
    compiled: bool = False


def run(options: StepOptions, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measures every case; see `run_rows`."""
    known = {"lengths": tuple(LENGTHS), "forms": tuple(FORMS), "peers": PEERS}
    # the members' peers are measured once: one member's step, and as often as there are members
    groups = [[f for f in kind if f in options.forms] for kind in (("full",), ("lora", "lora5"))]
    return run_rows(options, known, [forms for forms in groups if forms], _measure, say)


def _measure(options: StepOptions, lengths: str, forms: Sequence[str], folder: str) -> list[dict[str, Any]]:
    contenders = {form: options.contender("step", "ours", lengths, FORMS[form], folder) for form in forms}
    for form in forms if options.compiled else ():
        contenders[f"{form} compiled"] = options.contender("step", "ours compiled", lengths, FORMS[form], folder)
    members = min(1, FORMS[forms[0]])
    contenders |= {peer: options.contender("step", peer, lengths, members, folder) for peer in options.peers}
    found = measure(contenders, options.rounds)
    rows = []
    for form in forms:
        names = {"lengths": lengths, "form": options.row_form(form)}
        row = compare(found, form, options.peers, runs=max(1, FORMS[form]), **names)
        ours = {"sequential": ("lora", FORMS[form])} if form == "lora5" and "lora" in forms else {}
        ours |= {"compiled": (f"{form} compiled", 1)} if options.compiled else {}
        for name, (who, runs) in ours.items():
            other = compare({**found, name: found[who]}, form, (name,), runs=runs)
            row |= {k: v for k, v in other.items() if name in k}
        rows.append(row)
    return rows


def _ours(case: Case) -> Iterator[Any]:
    from dataclasses import replace

    import torch

    from bpo_fast.batches import TokenBudget, microbatch_tokens
    from bpo_fast.collect import with_reference
    from bpo_fast.config import MethodConfig, ModelConfig, OptimConfig
    from bpo_fast.flops import StepFlop
    from bpo_fast.gradients import step_gradients
    from bpo_fast.optim import Optimizer
    from bpo_fast.packing import pair_tokens
    from bpo_fast.pairs import PairCounts, PhasePairs
    from bpo_fast.policy import load_policy
    from bpo_fast.reference import Reference

    full = case.members == 0
    form = ModelConfig(
        path=case.model,
        dtype=case.dtype,
        full=full,
        members=max(1, case.members),
        lora_r=LORA_RANK,
        lora_alpha=2.0 * LORA_RANK,
        compile=case.who == "ours compiled",
    )
    length = case.prompt_tokens + case.completion_tokens
    policy = load_policy(form, device=torch.device(case.device), seed=0, temperature=1.0, max_length=length)
    config = replace(OptimConfig(), learning_rate=1e-5)
    optimizer = Optimizer(policy.parameters(), config, num_steps=10**6, num_members=None if full else case.members)
    method = MethodConfig()
    reference = Reference(policy, method, form, max_length=length)
    pairs = _pairs(case, policy)
    longest = max(pair_tokens(pair, policy.shares_prompts) for pair in pairs) * policy.num_members
    budget = TokenBudget(microbatch_tokens(config, policy.device, longest))
    flop = StepFlop.of(policy)
    yield Work(float(flop.count(pairs[:1])), flop.peak_tflops)
    for block in range(case.num_blocks):
        size = case.pairs * case.steps
        start = now(case.device)
        found = PhasePairs(0, 0, tuple(pairs[block * size : (block + 1) * size]), PairCounts(), {})
        found = with_reference(found, case.steps, policy, reference, budget, on_done=lambda n: None)
        for step in range(case.steps):
            mine = found.pairs[step * case.pairs : (step + 1) * case.pairs]
            sums = step_gradients(mine, policy, method, max_tokens=budget.tokens)
            _, finite = optimizer.step(step, sums["loss"])
            assert finite, "random weights of moderate size"
        yield now(case.device) - start


def _pairs(case: Case, policy: Any) -> list[Any]:
    from bpo_fast.types import Completion, Pair, Prompt

    pairs = []
    for i, row in enumerate(make_texts(case)):
        ids = {k: tuple(policy.tokenizer(row[k], add_special_tokens=False)["input_ids"]) for k in row}
        sides = [
            Completion(i, k, (*ids[side], policy.eos_ids[0]), "", False, 0, 0)
            for k, side in enumerate(("chosen", "rejected"))
        ]
        pairs.append(Pair(Prompt(i, "", ids["prompt"]), *sides, chosen_score=1.0, rejected_score=0.0))
    return pairs


def _trl(case: Case) -> Iterator[Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def make_trainer(settings: dict[str, Any], **parts: Any) -> Any:
        precomputed = case.who == "trl-precomputed"
        args = DPOConfig(
            **settings, beta=0.1, disable_dropout=True, max_length=None, precompute_ref_log_probs=precomputed
        )
        return DPOTrainer(args=args, train_dataset=Dataset.from_list(make_texts(case)), **parts)

    return trl_blocks(case, make_trainer)


if __name__ == "__main__":
    CASE = Case(**json.loads(sys.argv[1]))
    serve(CASE, _ours(CASE) if CASE.who.startswith("ours") else _trl(CASE))
