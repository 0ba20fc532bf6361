"""Scoring while sampling: pairs of completions are scored in groups, each group once all of it is there.

Which pairs make up a group, the order of the groups and the order within them follow from the prompts alone, so an
annotator is asked the same questions in the same order, and its scores are the same, whenever completions finish.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self

from bpo_fast.annotate import Checked
from bpo_fast.engine import by_length
from bpo_fast.threads import Threads
from bpo_fast.types import Completion, Prompt

# a group is over when its longest completion is: small ones are done early, large ones fill a reward model's batch
GROUP_PAIRS = 32
Scores = dict[int, tuple[float | None, float | None]]  # of both completions, by Prompt.id


class PairScorer:
    """Scores the two completions of every prompt of one call of the engine; a context manager.

    Pairs with a completion that the engine gave up are not scored.

    Args:
        annotator: scores both completions of a prompt at once.
        prompts: of the call.
        overlap: score in a thread of its own while completions are still to come; otherwise in `scores`.

    Attributes:
        busy_s: seconds that the annotator has worked.
    """

    def __init__(self, annotator: Checked, prompts: Sequence[Prompt], *, overlap: bool):
        self._annotator = annotator
        ordered = [prompts[i] for i in by_length(prompts)]
        self._groups = [ordered[i : i + GROUP_PAIRS] for i in range(0, len(ordered), GROUP_PAIRS)]
        self._found: dict[tuple[int, int], Completion] = {}  # by prompt id and sample id
        self._scored: list[Future[Scores]] = []
        self._worker = Threads(1) if overlap else None
        self.busy_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._worker:
            self._worker.__exit__(kind, *exception)

    def add(self, completions: Sequence[Completion]) -> None:
        """Takes finished completions, in any order.

        Raises:
            ValueError: what the annotator has raised by now; the rest need not be sampled.
        """
        self._found |= {(c.prompt_id, c.sample_id): c for c in completions}
        if not self._worker:
            return
        for future in self._scored:
            if future.done():
                future.result()
        while len(self._scored) < len(self._groups) and self._is_complete(group := self._groups[len(self._scored)]):
            self._scored.append(self._worker.submit(self._score, group))

    def scores(self) -> Scores:
        """Every score, once all completions have been added; waits for those that are not there yet."""
        parts = [f.result() for f in self._scored] if self._worker else [self._score(g) for g in self._groups]
        assert len(parts) == len(self._groups), "every completion has been added"
        return {prompt_id: both for part in parts for prompt_id, both in part.items()}

    def _is_complete(self, group: Sequence[Prompt]) -> bool:
        return all((p.id, s) in self._found for p in group for s in range(2))

    def _score(self, group: Sequence[Prompt]) -> Scores:
        start = time.perf_counter()
        whole = [p for p in group if not any(self._found[p.id, s].aborted for s in range(2))]
        firsts, seconds = ([self._found[p.id, s] for p in whole] for s in range(2))
        scores: Scores = dict.fromkeys((p.id for p in group), (None, None))
        scores |= zip((p.id for p in whole), self._annotator.duel(whole, firsts, seconds), strict=True)
        self.busy_s += time.perf_counter() - start
        return scores
