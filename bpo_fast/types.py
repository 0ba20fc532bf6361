"""The values that travel through the loop: prompts, completions, pairs.

Token ids are made once, by the tokenizer for prompts and by the sampler for completions, and are never turned into
text and back. Text rides along for annotators and for people.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """A message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt of the data set.

    Attributes:
        id: position of the row in the data set before any shuffle; the stable name of the prompt.
        text: the prompt as the model sees it, template applied, special tokens left out.
        ids: token ids, BOS included where the tokenizer adds one.
        label: reference (human) completion, if the data has one.
        columns: the remaining columns of the row, passed on to annotator callables.
        plain: the prompt without a chat template, if `text` is by one.
        turns: its messages, if the row holds a conversation.
    """

    id: int
    text: str
    ids: tuple[int, ...]
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    plain: str | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def asked(self) -> str:
        """The prompt as text that annotators are shown: they have chat templates of their own, or none."""
        return self.text if self.plain is None else self.plain


@dataclass(frozen=True)
class Completion:
    """One sampled answer to a prompt.

    Attributes:
        prompt_id: `Prompt.id` of its prompt.
        sample_id: 0, 1, ... among the answers to that prompt.
        ids: sampled token ids, EOS included if and only if the sampler emitted it.
        text: the ids decoded without special tokens.
        truncated: True if sampling ended at the length limit: without EOS and without a stop string.
        policy_version: optimizer steps taken by the weights that sampled it.
        seed: seed of this request.
        logps: sampler log-probs of `ids` in nats, when asked for.
        stopped: a stop string ended it; `ids` are those before the string, and no EOS follows them.
        member: the member of the ensemble that sampled it; None for their average.
    """

    prompt_id: int
    sample_id: int
    ids: tuple[int, ...]
    text: str
    truncated: bool
    policy_version: int
    seed: int
    logps: tuple[float, ...] | None = None
    stopped: bool = False
    member: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Completion":
        """The completion whose `vars` have been JSON."""
        logps = None if row["logps"] is None else tuple(row["logps"])
        return cls(**{**row, "ids": tuple(row["ids"]), "logps": logps})

    @property
    def aborted(self) -> bool:
        """Whether the engine gave it up, twice: what it sampled to an end has ids, or a stop string came first."""
        return not self.ids and not self.stopped


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt in the annotator's order.

    Attributes:
        prompt: the prompt of both.
        chosen, rejected: the preferred completion and the other one.
        chosen_score, rejected_score: the annotator's scores; chosen_score > rejected_score.
        ref_logps: (chosen, rejected) sums of reference log-probs in nats, once computed.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    chosen_score: float
    rejected_score: float
    ref_logps: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dropped:
    """Two completions of one prompt that make no pair: sampled, scored and kept on record, never trained on.

    Attributes:
        prompt: the prompt of both.
        completions: in the order of their `sample_id`.
        scores: the annotator's of each; None where it had no opinion.
        reason: what `PairCounts` counts it as: "tied", "identical", "unscored", "aborted" or "empty".
    """

    prompt: Prompt
    completions: tuple[Completion, Completion]
    scores: tuple[float | None, float | None]
    reason: str
