"""Annotators score completions; the higher score of a pair is chosen. Judges are annotators that evaluation uses."""

import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bpo_fast.annotate.pairwise import HttpJudge
from bpo_fast.config import NAMED, AnnotatorConfig, full_path, read_spec
from bpo_fast.prompts import read_rows
from bpo_fast.tasks import TASKS
from bpo_fast.types import Completion, Prompt

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


class Annotator(Protocol):
    """Scores completions, higher is better."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float | None]:
        """One score for each (prompt, completion), in order; None where there is no opinion."""
        ...


class PairwiseJudge(Protocol):
    """Prefers one of two completions; it has no score of a single one."""

    def compare(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
    ) -> Sequence[float | None]:
        """How far each first completion is preferred to the second, from 0 to 1; None where there is no opinion."""
        ...


class CallableAnnotator:
    """A Python function with TRL's reward signature, `fn(prompts, completions, completion_ids, **columns)`.

    Args:
        function: gets lists of prompt texts (without a chat template), completion texts and completion ids, and every
            further column of the data as a list; returns a list of numbers or None.
        name: what error messages call it.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self._function, self._name = function, name

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """See `Annotator.score`.

        Raises:
            ValueError: the function raised, or returned no list.
        """
        names = sorted(set().union(*(p.columns for p in prompts))) if prompts else []
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        with _user_code(self._name):
            scores = self._function(
                prompts=[p.asked for p in prompts],
                completions=[c.text for c in completions],
                completion_ids=[list(c.ids) for c in completions],
                **columns,
            )
            if hasattr(scores, "__iter__") and not isinstance(scores, str | Mapping | Set):
                return list(scores)  # a generator is at work here
        raise ValueError(f"annotator {self._name}: returned {scores!r}, not a list of scores")


class RecordedAnnotator:
    """Scores from a JSONL file of {"prompt", "completion", "score"}; None for a completion that is not in it.

    Prompts match with or without the words that a task closes them with, and the policy's chat template.
    """

    def __init__(self, path: Path):
        self._scores: dict[tuple[str, str], float] = {}
        for number, row in enumerate(read_rows(str(path)), 1):
            try:
                self._scores[_bare(row["prompt"]), row["completion"].strip()] = float(row["score"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{path}: row {number} is not a prompt, completion and score") from None

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """See `Annotator.score`."""
        return [self._score(p, c.text.strip()) for p, c in zip(prompts, completions, strict=True)]

    def _score(self, prompt: Prompt, completion: str) -> float | None:
        found = self._scores.get((_bare(prompt.asked), completion))
        return self._scores.get((_bare(prompt.text), completion)) if found is None else found


class Checked:
    """An annotator whose answers are checked: the right number of them, each a finite number or None."""

    def __init__(self, name: str, inner: Annotator | PairwiseJudge):
        self.name = name
        self._inner: Any = inner  # `is_pairwise` says which

    @property
    def is_pairwise(self) -> bool:
        """True if it compares completions and scores none of them alone."""
        return hasattr(self._inner, "compare")

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """See `Annotator.score`.

        Raises:
            ValueError: another number of scores, or one that is no finite number.
        """
        return self._checked(prompts, self._inner.score(prompts, completions) if prompts else [])

    def duel(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
    ) -> list[tuple[float | None, float | None]]:
        """Two completions of each prompt against each other.

        Returns:
            Scores of both, the higher one better. Those of a pairwise judge are its preference and one minus that.

        Raises:
            ValueError: as `score`.
        """
        if self.is_pairwise:
            shares = self._checked(prompts, self._inner.compare(prompts, firsts, seconds) if prompts else [])
            return [(None, None) if share is None else (share, 1.0 - share) for share in shares]
        owners = [p for p in prompts for _ in range(2)]
        scores = self.score(owners, [c for both in zip(firsts, seconds, strict=True) for c in both])
        return list(zip(scores[::2], scores[1::2], strict=True))

    def notes(self) -> list[str]:
        """What a reader of its results must know, one sentence each."""
        return self._inner.notes() if hasattr(self._inner, "notes") else []

    def _checked(self, prompts: Sequence[Prompt], scores: Sequence[Any]) -> list[float | None]:
        if len(scores) != len(prompts):
            raise ValueError(f"annotator {self.name}: {len(scores)} scores for {len(prompts)} completions")
        for prompt, score in zip(prompts, scores, strict=True):
            if score is not None and not _is_finite(score):
                raise ValueError(f"annotator {self.name}: score {score!r} for a completion of prompt {prompt.id}")
        return [None if s is None else float(s) for s in scores]


def load_annotator(
    spec: str, config: AnnotatorConfig, *, device: str = "auto", trust_remote_code: bool = False
) -> Checked:
    """Loads what `--annotator` and `--judge` name.

    Args:
        spec: a reward-model folder or Hub id, `module:function`, a .jsonl file of recorded labels, or the endpoint of a
            pairwise judge, `http://HOST/v1#MODEL`; `name=spec` gives it a name for tables.
        config: batches of reward models, limits of an endpoint.
        device: for reward models.
        trust_remote_code: for reward models.

    Raises:
        ValueError: nothing of that kind there.
    """
    if found := _without_weights(spec, config):
        return found
    from bpo_fast.annotate.reward_model import RewardModel

    name, path = _named(spec)
    model = RewardModel(path, device=device, batch_tokens=config.batch_tokens, trust_remote_code=trust_remote_code)
    return Checked(name, model)


def check_annotator(spec: str, config: AnnotatorConfig, *, trust_remote_code: bool = False) -> None:
    """Raises what `load_annotator` does, as far as it is known without the weights of a reward model."""
    if not _without_weights(spec, config):
        from bpo_fast.annotate.reward_model import check_reward_model

        check_reward_model(_named(spec)[1], trust_remote_code=trust_remote_code)


def judge_name(spec: str) -> str:
    """The name a judge has in tables."""
    return _named(spec)[0]


def _without_weights(spec: str, config: AnnotatorConfig) -> Checked | None:
    """The annotator, unless it is a reward model."""
    name, spec = _named(spec)
    if spec.startswith(("http://", "https://")):
        limits = {"timeout_s": config.timeout_s, "retries": config.retries, "requests": config.requests}
        return Checked(name, HttpJudge(spec, **limits))
    if Path(spec).is_file():
        return Checked(name, RecordedAnnotator(Path(spec)))
    if spec.endswith(".jsonl"):
        raise ValueError(f"annotator {spec}: no such file")
    if _CALLABLE.match(spec) and not Path(spec).exists():
        return Checked(name, CallableAnnotator(_import(spec), name))
    return None


def _bare(prompt: str) -> str:
    """The prompt without the words that a task closes it with."""
    prompt = prompt.rstrip()
    for task in TASKS.values():
        prompt = prompt.removesuffix(task.suffix)
    return prompt.strip()


def _is_finite(score: Any) -> bool:
    try:
        return not isinstance(score, str | bytes) and math.isfinite(score)
    except (TypeError, ValueError, OverflowError):
        return False


@contextmanager
def _user_code(name: str) -> Iterator[None]:
    """Code of the user's can raise anything; it becomes one line with the place in that code."""
    try:
        yield
    except Exception as error:
        ours = (__file__, importlib.__file__)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen")]
        place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise ValueError(f"annotator {name}: {type(error).__name__}: {error}{place}") from error


def _named(spec: str) -> tuple[str, str]:
    found = read_spec(spec, NAMED)
    if found["name"]:
        return found["name"], found["path"]
    name = re.split(r"[/:]", spec.rstrip("/"))[-1].removesuffix(".jsonl")
    return Path(full_path(spec)).name if name in (".", "..") else name, spec


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _user_code(spec):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"annotator {spec}: module {module_name} has no function {function_name}")
    return function
