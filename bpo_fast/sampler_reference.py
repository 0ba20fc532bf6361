"""`method.ref_logps = sampler`: the engine's own log-probs as those of the behavior, behind a measured guard.

It saves the reference pass. A sampler's log-probs differ from the trainer's by rounding (sd 0.05 nats a token in
bfloat16); a larger difference means that the sampler is not the policy, so some pairs of a phase are scored by both.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from bpo_fast.batches import TokenBudget
from bpo_fast.config import Config
from bpo_fast.gradients import microbatches
from bpo_fast.pairs import PhasePairs
from bpo_fast.policy import Policy
from bpo_fast.types import Completion, Pair

NUM_CHECKED = 16  # pairs of a phase
MAX_OVER_MEAN = 20  # rounding puts the worst of thousands of tokens there; a mean does not show one wrong token


def check_settings(config: Config, from_pairs: str | None) -> None:
    """Raises ValueError where the sampler's log-probs are not those of the reference."""
    if config.method.ref_logps == "trainer":
        return
    others = {
        "method.ref": (config.method.ref, "behavior"),
        "sampling.members": (config.sampling.members, "average"),
        "--from-pairs": (from_pairs, None),
    }
    for name, (value, wanted) in others.items():
        if value != wanted and not (name == "sampling.members" and config.model.members == 1):
            raise ValueError(f"method.ref_logps = sampler: not with {name} = {value}; the sampler has other log-probs")


@torch.no_grad()
def logp_differences(pairs: Sequence[Pair], policy: Policy, max_tokens: int) -> torch.Tensor:
    """|sampler - trainer| of the log-probs of all tokens of completions that carry `logps`.

    Args:
        pairs: what was sampled.
        policy: the behavior.
        max_tokens: of a micro-batch.

    Returns:
        [T] float32 on the host, in nats.
    """
    parts = [torch.zeros(0)]
    with policy.behavior():
        for batch in microbatches(pairs, policy, max_tokens):
            sides = [p.chosen for p in batch.pairs] + [p.rejected for p in batch.pairs]
            theirs = torch.tensor([logp for side in sides for logp in _logps(side)])
            parts.append((policy.token_logps(batch).cpu() - theirs).abs())
    return torch.cat(parts)


def with_sampler_reference(found: PhasePairs, policy: Policy, budget: TokenBudget, *, tolerance: float) -> PhasePairs:
    """The pairs of a phase with the sampler's log-probs as the reference.

    Args:
        found: pairs whose completions carry `logps`.
        policy: the behavior, which scores `NUM_CHECKED` of them too.
        budget: of a micro-batch.
        tolerance: largest mean difference, in nats a token; a single token may be off by `MAX_OVER_MEAN` times that.

    Returns:
        The pairs, and "sampling/sampling_logp_difference/mean" and "/max" among their metrics.

    Raises:
        ValueError: a mean difference above the tolerance, or a token's above its own.
    """
    difference = budget.run(lambda tokens: logp_differences(found.pairs[:NUM_CHECKED], policy, tokens))
    mean, largest = (float(difference.mean()), float(difference.max())) if len(difference) else (0.0, 0.0)
    if not (mean <= tolerance and largest <= MAX_OVER_MEAN * tolerance):
        raise ValueError(
            f"method.ref_logps = sampler: its log-probs differ from the trainer's by {mean:.3g} nats a token in the"
            f" mean and {largest:.3g} at most (method.ref_logps_tolerance = {tolerance}, {MAX_OVER_MEAN} times that at"
            " most); take trainer"
        )
    pairs = tuple(
        replace(p, ref_logps=(math.fsum(_logps(p.chosen)), math.fsum(_logps(p.rejected)))) for p in found.pairs
    )
    measured = {"mean": mean, "max": largest}
    metrics = found.metrics | {f"sampling/sampling_logp_difference/{k}": v for k, v in measured.items()}
    return replace(found, pairs=pairs, metrics=metrics)


def _logps(completion: Completion) -> tuple[float, ...]:
    if completion.logps is None or len(completion.logps) != len(completion.ids):
        raise ValueError(
            f"method.ref_logps = sampler: a completion of prompt {completion.prompt_id} was recorded without log-probs"
        )
    return completion.logps
