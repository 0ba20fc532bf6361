"""Rows in batches of so many tokens: when a GPU runs out of memory these are halved, once, and it is done again."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from bpo_fast.config import OptimConfig
from bpo_fast.stage_config import StageConfig

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# tokens of a micro-batch; on a CPU more of them gain next to nothing, and cost memory
GPU_TOKENS, CPU_TOKENS = 8192, 1536
POOL_BATCHES = 50


def microbatch_tokens(config: OptimConfig | StageConfig, device: torch.device, longest: int = 0) -> int:
    """`microbatch_tokens` of the settings, or what suits the device if that is 0: enough for what is longest."""
    return config.microbatch_tokens or max(CPU_TOKENS if device.type == "cpu" else GPU_TOKENS, longest)


def length_batches(lengths: Sequence[int], budget: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Cuts rows into batches of like length, each at most `budget` padded tokens (or one row).

    Args:
        lengths: tokens of each row.
        budget: rows times the longest row of a batch.
        generator: shuffles rows and batches, so that a batch holds random rows of one length out of a pool of about
            50 batches; None sorts all rows by length.
    """
    order = list(range(len(lengths)))
    pool = max(len(order), 1)
    if generator is not None and order:
        order = torch.randperm(len(order), generator=generator).tolist()
        pool = max(int(POOL_BATCHES * budget * len(lengths) / max(sum(lengths), 1)), 1)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        batch: list[int] = []
        for row in sorted(order[start : start + pool], key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[row] > budget:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


class TokenBudget:
    """Tokens of a micro-batch, halved at most once.

    Args:
        tokens: the limit, all members counted.
        longest: of the longest part (a pair, a row), below which the limit never falls.
        knob: what sets the limit.
        part: what the longest is.
        advice: ends the message of an error that halving does not mend.
    """

    def __init__(
        self,
        tokens: int,
        *,
        longest: int = 1,
        knob: str = "optim.microbatch_tokens",
        part: str = "one pair at the limits of length",
        advice: str = "; try --dry-run",
    ):
        self.tokens, self._longest = tokens, longest
        self._knob, self._part, self._closing = knob, part, advice
        self._halved = tokens <= longest

    def run(self, work: Callable[[int], Result]) -> Result:
        """`work(tokens)`, and once more with half of them if memory runs out.

        Raises:
            RuntimeError: out of memory with half the budget too, or where the longest part takes all of it.
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
        log.warning("out of memory (%s): %s is %d from here on", reason, self._knob, self.tokens)
        try:
            return work(self.tokens)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        reason = str(error).split("\n")[0]
        all_of_it = f", which {self._part} takes," if self.tokens <= self._longest else ""
        return f"out of memory with {self._knob} = {self.tokens}{all_of_it} ({reason}){self._closing}"
