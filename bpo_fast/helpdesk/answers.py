"""Answers of graded quality, written sentence by sentence, with the log-probability of every choice.

An answer has a writer (careful, plain or careless) who decides whether to greet, hedge, give each step in full, vaguely
or wrongly, add a fact, close, or break off in the middle of the last sentence.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from bpo_fast.helpdesk.topics import Step, Topic, topics

T = TypeVar("T")

WRITERS = ("careful", "plain", "careless")
SFT_MIX = (0.22, 0.43, 0.35)
LABEL_MIX = (0.75, 0.25, 0.0)

OPENINGS = {
    "none": (),
    "warm": (
        "Thank you for asking.",
        "I am happy to help.",
        "Sorry to hear about your {n}.",
        "Thanks for your question about the {n}.",
        "Glad to help with the {n}.",
    ),
    "short": ("Hello.", "Hi there.", "Sure.", "Of course."),
    "rude": ("That is your own fault.", "Everybody knows this.", "What a silly question.", "Not this {n} again."),
}
HEDGES = (
    "I am not really sure.",
    "This may or may not work.",
    "Things like this happen all the time.",
    "There are many possible reasons.",
    "It is hard to say from here.",
)
GENERICS = (
    "Check the settings.",
    "Try it again later.",
    "Look at the manual.",
    "Ask somebody who knows.",
    "Wait a little and see.",
)
CLOSINGS = {
    "none": (),
    "warm": (
        "Let me know if that helps.",
        "Please write again if you need more.",
        "I hope that solves it.",
        "Have a lovely day.",
        "I hope the {n} is fine soon.",
    ),
    "short": ("Good luck.", "Bye for now.", "That is all.", "All the best."),
}
FRAMES = (("First, {s}.", "Please {s}.", "You can {s}."), ("Then {s}.", "After that, {s}.", "Also, {s}."))

# probability of each option under each writer, in the order of WRITERS
ABOUT = {"this": (1.0, 0.96, 0.84), "same noun": (0.0, 0.02, 0.06), "other": (0.0, 0.02, 0.10)}
OPENING = {
    "none": (0.12, 0.55, 0.58),
    "warm": (0.63, 0.18, 0.04),
    "short": (0.25, 0.24, 0.12),
    "rude": (0.0, 0.03, 0.26),
}
HEDGE = {"no": (0.97, 0.80, 0.65), "yes": (0.03, 0.20, 0.35)}
FIRST = {
    "full": (0.87, 0.38, 0.17),
    "vague": (0.09, 0.38, 0.28),
    "wrong": (0.02, 0.08, 0.24),
    "generic": (0.02, 0.08, 0.18),
    "none": (0.0, 0.08, 0.13),
}
SECOND = {
    "full": (0.85, 0.28, 0.11),
    "vague": (0.09, 0.27, 0.18),
    "wrong": (0.02, 0.08, 0.20),
    "repeat": (0.01, 0.05, 0.15),
    "none": (0.03, 0.32, 0.36),
}
FACT = {"own": (0.60, 0.25, 0.10), "wrong": (0.02, 0.06, 0.14), "none": (0.38, 0.69, 0.76)}
CLOSING = {"none": (0.12, 0.57, 0.72), "warm": (0.63, 0.20, 0.05), "short": (0.25, 0.23, 0.23)}
CUT = {"no": (0.99, 0.93, 0.82), "yes": (0.01, 0.07, 0.18)}
SOURCE = {"same noun": (0.4,) * 3, "same domain": (0.3,) * 3, "anywhere": (0.3,) * 3}


@dataclass(frozen=True)
class Answer:
    """A written answer.

    Attributes:
        sentences: its sentences in order; the last one may be broken off.
        logp: log of the probability of the choices that made it, writers summed out, in nats. Where two ways of
            choosing give one text it is a lower bound of the text's log-probability.
    """

    sentences: tuple[str, ...]
    logp: float

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


class _Choices:
    """Draws from tables and keeps the log-probability of the drawn options under every writer."""

    def __init__(self, rng: random.Random, mix: Sequence[float]):
        self.rng = rng
        self.writer = rng.choices(range(len(mix)), mix)[0]
        self.logps = [_log(share) for share in mix]

    def option(self, table: dict[str, tuple[float, ...]]) -> str:
        drawn = self.rng.choices(list(table), [row[self.writer] for row in table.values()])[0]
        self.logps = [logp + _log(p) for logp, p in zip(self.logps, table[drawn], strict=True)]
        return drawn

    def uniform(self, options: Sequence[T]) -> T:
        self.logps = [logp - math.log(len(options)) for logp in self.logps]
        return self.rng.choice(options)

    def logp(self) -> float:
        top = max(self.logps)
        return top + math.log(sum(math.exp(logp - top) for logp in self.logps))


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf


def write_answer(topic: Topic, rng: random.Random, mix: Sequence[float] = SFT_MIX) -> Answer:
    """Draws one answer to a question about `topic`.

    Args:
        topic: what was asked.
        rng: source of all choices.
        mix: probability of each of `WRITERS`.
    """
    choices = _Choices(rng, mix)
    about = choices.option(ABOUT)
    if about == "same noun":
        topic = _sibling(topic)
    elif about == "other":
        topic = choices.uniform(_elsewhere(topic.noun))
    sentences = [_phrase(OPENINGS, choices.option(OPENING), topic, choices)]
    sentences.append(choices.uniform(HEDGES) if choices.option(HEDGE) == "yes" else "")
    sentences += _steps(topic, choices)
    sentences.append(_fact(topic, choices))
    sentences.append(_phrase(CLOSINGS, choices.option(CLOSING), topic, choices))
    sentences = [s for s in sentences if s] or [choices.uniform(GENERICS)]
    if choices.option(CUT) == "yes":
        spoken = sentences[-1].split(" ")
        kept = choices.uniform(range(1, max(2, len(spoken))))
        sentences[-1] = " ".join(spoken[:kept]).rstrip(",.")
    return Answer(tuple(sentences), choices.logp())


def _phrase(table: dict[str, tuple[str, ...]], option: str, topic: Topic, choices: _Choices) -> str:
    return choices.uniform(table[option]).format(n=topic.noun) if table[option] else ""


def _steps(topic: Topic, choices: _Choices) -> list[str]:
    first = choices.option(FIRST)
    said = _instruction(first, topic.steps[0], topic, 0, choices)
    second = choices.option(SECOND)
    if second == "repeat":
        said_again = choices.uniform(FRAMES[1]).format(s=topic.steps[0].text) if first != "full" else said
        return [said, said_again]
    return [said, _instruction(second, topic.steps[1], topic, 1, choices)]


def _instruction(option: str, step: Step, topic: Topic, place: int, choices: _Choices) -> str:
    if option == "none":
        return ""
    if option == "generic":
        return choices.uniform(GENERICS)
    if option == "wrong":
        step = choices.uniform(_wrong_source(topic, choices).steps)
    return choices.uniform(FRAMES[place]).format(s=step.core if option == "vague" else step.text)


def _fact(topic: Topic, choices: _Choices) -> str:
    option = choices.option(FACT)
    if option == "none":
        return ""
    return topic.fact if option == "own" else _wrong_source(topic, choices).fact


def _wrong_source(topic: Topic, choices: _Choices) -> Topic:
    source = choices.option(SOURCE)
    if source == "same noun":
        return _sibling(topic)
    if source == "same domain":
        return choices.uniform(_nearby(topic.noun))
    return choices.uniform(_elsewhere(topic.noun))


def _sibling(topic: Topic) -> Topic:
    return next(t for t in topics() if t.noun == topic.noun and t.id != topic.id)


@functools.cache
def _nearby(noun: str) -> tuple[Topic, ...]:
    domain = next(t.domain for t in topics() if t.noun == noun)
    return tuple(t for t in topics() if t.domain == domain and t.noun != noun)


@functools.cache
def _elsewhere(noun: str) -> tuple[Topic, ...]:
    """Topics of other domains."""
    domain = next(t.domain for t in topics() if t.noun == noun)
    return tuple(t for t in topics() if t.domain != domain)
