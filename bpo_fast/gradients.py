"""The gradients of one optimizer step: pairs in micro-batches of all members at once, summed over the step.

They begin anew with every call: where memory runs out on the way, a second call with smaller micro-batches loses no
pair and counts none twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bpo_fast_kernels import PairLoss
from torch import Tensor

from bpo_fast.config import MethodConfig
from bpo_fast.engine import request_seed
from bpo_fast.packing import PairBatch, split
from bpo_fast.policy import Policy
from bpo_fast.ranks import Ranks, sum_gradients
from bpo_fast.types import Pair

# what a step reports of each pair
MEASURED = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)


def microbatches(pairs: Sequence[Pair], policy: Policy, max_tokens: int) -> list[PairBatch]:
    """A step's pairs as micro-batches for all members at once; the reference pass cuts them alike, so that log-probs of
    equal weights are equal bit for bit."""
    parts = split(pairs, max_tokens // policy.num_members, shared=policy.shares_prompts)
    return [policy.pack(part) for part in parts]


def step_gradients(
    pairs: Sequence[Pair],
    policy: Policy,
    method: MethodConfig,
    *,
    max_tokens: int,
    num_pairs: int | None = None,
    seed: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Leaves the gradients of every member in place, those of before forgotten.

    Args:
        pairs: of the step, or a rank's share of them.
        policy: in training.
        method: loss, beta and label smoothing.
        max_tokens: of a micro-batch.
        num_pairs: of the whole step; None: these.
        seed: (run seed, step, rank) of LoRA's dropout; None without one.

    Returns:
        What the step reports: {"tokens": int} and means over pairs and members, on the device.
    """
    num_members, num_pairs = policy.num_members, num_pairs or len(pairs)
    for parameter in policy.parameters():
        parameter.grad = None
    sums: dict[str, Any] = {"tokens": 0}
    policy.model.train()
    for i, batch in enumerate(microbatches(pairs, policy, max_tokens)):
        if seed is not None:
            torch.manual_seed(request_seed(*seed[:2], i, seed[2]))
        with policy.members():
            repeated = batch.repeat(num_members)
            ref_logps = _ref_logps(batch.pairs, num_members, policy.device)
            loss, parts = policy.loss(repeated, ref_logps, method, num_pairs=num_pairs)
            loss.backward()
        sums["tokens"] += batch.num_tokens * num_members
        for name, value in _measured(parts, method.beta).items():
            sums[name] = sums.get(name, 0.0) + value.sum() / (num_pairs * num_members)
    policy.model.eval()
    return sums


@torch.no_grad()
def sum_over_ranks(sums: dict[str, Any], policy: Policy, ranks: Ranks) -> dict[str, Any]:
    """Sums the gradients of all ranks, in place, and what `step_gradients` returned for their shares of a step.

    A share may be empty, and its rank without gradients.
    """
    if ranks.size == 1:
        return sums
    values = [float(sums["tokens"]), *(sums.get(name, 0.0) for name in MEASURED)]
    num_tokens, *measured = sum_gradients(policy.parameters(), values, policy.device, ranks)
    return {"tokens": int(num_tokens)} | {name: value.float() for name, value in zip(MEASURED, measured, strict=True)}


def _measured(parts: PairLoss, beta: float) -> dict[str, Tensor]:
    """`MEASURED` of each pair."""
    chosen, rejected = parts.policy_logps.chunk(2)
    rewards = beta * (parts.policy_logps - parts.ref_logps)
    values = (
        *(parts.loss.detach(), *rewards.chunk(2), beta * parts.margins, (parts.margins > 0).float()),
        *(chosen, rejected),
    )
    return dict(zip(MEASURED, values, strict=True))


def _ref_logps(pairs: Sequence[Pair], num_members: int, device: torch.device) -> Tensor | None:
    """[2 M P] float32, the chosen of all members first; None where the reference is the policy itself."""
    known = [p.ref_logps for p in pairs if p.ref_logps is not None]
    if not known:
        return None
    assert len(known) == len(pairs), "a phase is scored whole"
    return torch.tensor(known, dtype=torch.float32).T.repeat(1, num_members).flatten().to(device, non_blocking=True)
