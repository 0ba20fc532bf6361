"""What the help desk knows: 224 topics, read from topics.txt, and which topic a question is about."""

import functools
import re
from dataclasses import dataclass
from importlib import resources

_WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")
_LINKS = frozenset({"that", "which", "it"})


@dataclass(frozen=True)
class Step:
    """An instruction: `core` alone is vague, `core` and `detail` together are specific."""

    core: str
    detail: str

    @property
    def text(self) -> str:
        return f"{self.core} {self.detail}"


@dataclass(frozen=True)
class Topic:
    """One problem of one thing, and how to solve it.

    Attributes:
        id: position in topics.txt.
        domain, noun: the field and the thing; each noun has two topics.
        problems: two wordings of the problem, each a predicate ("will not switch on").
        steps: the two steps that solve it, in order.
        fact: a sentence worth adding.
    """

    id: int
    domain: str
    noun: str
    problems: tuple[str, str]
    steps: tuple[Step, Step]
    fact: str


def words(text: str) -> tuple[str, ...]:
    """The lower-case words of a text, punctuation left out."""
    return tuple(_WORD.findall(text.lower()))


@functools.cache
def topics() -> tuple[Topic, ...]:
    """All topics, in the order of topics.txt."""
    found: list[Topic] = []
    domain = noun = ""
    for line in resources.files("bpo_fast.helpdesk").joinpath("topics.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            domain = line.strip("[]")
        elif line.startswith("  "):
            problems, first, second, fact = (part.strip() for part in line.split("|"))
            one, other = (p.strip() for p in problems.split(";"))
            found.append(Topic(len(found), domain, noun, (one, other), (_step(first), _step(second)), fact))
        elif line and not line.startswith("#"):
            noun = line
    return tuple(found)


def _step(text: str) -> Step:
    core, detail = (part.strip() for part in text.split("/"))
    return Step(core, detail)


def _key(text: str) -> str:
    return " " + " ".join(w for w in words(text) if w not in _LINKS) + " "


@functools.cache
def _keys() -> tuple[tuple[str, Topic], ...]:
    """(noun followed by problem, topic), longest first, so that "is late" never hides "is late again"."""
    keys = [(_key(f"{t.noun} {p}"), t) for t in topics() for p in t.problems]
    return tuple(sorted(keys, key=lambda pair: -len(pair[0])))


@functools.lru_cache(maxsize=65536)
def topic_of(question: str) -> Topic:
    """The topic that a question or prompt is about.

    Args:
        question: text that names a noun of the world followed by one of its problems, as every question form does.

    Raises:
        ValueError: no such pair in the text.
    """
    text = _key(question)
    for key, topic in _keys():
        if key in text:
            return topic
    raise ValueError(f"helpdesk: no known problem in the question {question[:80]!r}")
