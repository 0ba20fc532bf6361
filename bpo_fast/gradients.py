"""The gradients of one optimizer step: pairs in micro-batches of all members at once, summed over the step.

The micro-batch budget is the one piece of state: when a GPU runs out of memory the budget is halved, once, and the work
is done again from its beginning, so that no pair is lost and none counts twice.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from bpo_fast_kernels import PairLoss
from torch import Tensor

from bpo_fast.config import MethodConfig, OptimConfig
from bpo_fast.engine import request_seed
from bpo_fast.packing import PairBatch, split
from bpo_fast.policy import Policy
from bpo_fast.ranks import Ranks
from bpo_fast.types import Pair

log = logging.getLogger(__name__)
Result = TypeVar("Result")


# tokens of a micro-batch; on a CPU more of them gain next to nothing, and cost memory
GPU_TOKENS, CPU_TOKENS = 8192, 1536


def microbatch_tokens(config: OptimConfig, device: torch.device, longest: int) -> int:
    """`optim.microbatch_tokens`, or what suits the device if that is 0: enough for the longest pair of all members."""
    return config.microbatch_tokens or max(CPU_TOKENS if device.type == "cpu" else GPU_TOKENS, longest)


# what a step reports of each pair
MEASURED = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)


class TokenBudget:
    """Tokens of a micro-batch, halved at most once.

    Args:
        tokens: the limit, all members counted.
        longest: of the longest pair, below which the limit never falls.
    """

    def __init__(self, tokens: int, *, longest: int = 1):
        self.tokens, self._longest = tokens, longest
        self._halved = tokens <= longest

    def run(self, work: Callable[[int], Result]) -> Result:
        """`work(tokens)`, and once more with half of them if memory runs out.

        Raises:
            RuntimeError: out of memory with half the budget too, or where the longest pair takes all of it.
        """
        try:
            return work(self.tokens)
        except torch.OutOfMemoryError as error:
            if self._halved:
                raise RuntimeError(self._advice(error)) from error
            self._halved, self.tokens = True, max(self.tokens // 2, self._longest)
            reason = str(error).split("\n")[0]
        # outside of the handler, whose traceback keeps the activations alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory (%s): optim.microbatch_tokens is %d from here on", reason, self.tokens)
        try:
            return work(self.tokens)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        reason = str(error).split("\n")[0]
        all_of_it = ", which one pair at the limits of length takes," if self.tokens <= self._longest else ""
        return f"out of memory with optim.microbatch_tokens = {self.tokens}{all_of_it} ({reason}); try --dry-run"


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
    parameters = policy.parameters()
    has_gradient = [float(p.grad is not None) for p in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    values = [float(sums["tokens"]), *(sums.get(name, 0.0) for name in MEASURED), *has_gradient]
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=policy.device) for v in values])
    ranks.sum_([*grads, total])
    num_tokens, measured, num_with_gradient = total.split([1, len(MEASURED), len(parameters)])
    for parameter, grad, num in zip(parameters, grads, num_with_gradient.tolist(), strict=True):
        parameter.grad = grad if num else None  # as on one device, which leaves alone what has none
    return {"tokens": int(num_tokens)} | dict(zip(MEASURED, measured.float(), strict=True))


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
