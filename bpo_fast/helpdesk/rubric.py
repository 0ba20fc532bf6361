"""The true judge of the help-desk world: it reads the answer's text, whoever wrote it, and gives -10 to 10 points.

The answer is cut into sentences and each is matched to the nearest sentence the world knows: a step or fact of some
topic, or an opening, closing, hedge, empty advice or rudeness. Points are earned once a part, by the share of its words
said in order and undiluted, so length, repetition, word lists and advice on other topics cannot buy any.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bpo_fast.helpdesk import answers
from bpo_fast.helpdesk.topics import Topic, topic_of, topics, words

BEST, WORST = 10.0, -10.0
STEP, FACT, IN_ORDER, NAMES_IT, OPENING, CLOSING = 2.5, 1.5, 0.5, 0.5, 1.25, 1.25
WRONG, REPEATED, HEDGED, RUDE, EMPTY_ADVICE, UNKNOWN, CLUTTER = -1.5, -1.5, -0.75, -2.0, -0.5, -1.0, -0.5
CUT_OFF, UNKNOWN_WORD, EXTRA_WORD, NO_ANSWER = -2.0, -0.5, -0.15, -6.0
LONGEST = 45  # words; the best answers have about 40
RECOGNISED = 0.35  # a sentence below this match with everything known is not understood
SHORT_MANNERS = 0.5
VAGUE = 0.5  # of a step's points for its core without the detail

_END = re.compile(r"[.!?;]+(?=\s|$)|\n+")
_FRAME = re.compile(r"^(?:(?:first|then|next|also|please|just|after that|you can|you should|and)\b[\s,:]*)+")
_LIGHT = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "at",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "off",
        "on",
        "or",
        "out",
        "the",
        "to",
        "up",
        "with",
        "your",
        "you",
        "that",
        "this",
    ]
)


@dataclass(frozen=True)
class Known:
    """A sentence of the world.

    Attributes:
        kind: topic, or one of the phrases: opening, closing, hedge, rude, generic.
        topic: its topic, -1 for phrases.
        part: 0 and 1 the steps, 2 the fact; 0 for phrases.
        grade: what saying it in full is worth, in [0, 1]: less for a step without its detail and for short manners.
        words: what is matched; "n" stands for a noun in phrases.
    """

    kind: str
    topic: int
    part: int
    grade: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Heard:
    """A sentence of the answer as understood: the nearest known sentence, or None, and its worth in [0, 1]."""

    known: Known | None
    worth: float
    names_it: bool

    @property
    def manner(self) -> str:
        return self.known.kind if self.known and self.known.kind in ("opening", "closing") else ""


def rubric_score(question: str, answer: str) -> float:
    """Points for an answer, from -10 to 10.

    Args:
        question: a question of the world, with or without the closing " Assistant:".
        answer: any text.

    Raises:
        ValueError: the question names no problem of the world.
    """
    return min(BEST, max(WORST, sum(rubric_breakdown(question, answer).values())))


def rubric_breakdown(question: str, answer: str) -> dict[str, float]:
    """Points by component; `rubric_score` is their sum, clipped.

    Returns:
        first_step, second_step, fact, order, names_it, opening, closing (all >= 0); wrong, repeated, hedged, rude,
        empty_advice, clutter, unknown, cut_off, overlength, no_answer (all <= 0).
    """
    topic = topic_of(question)
    spoken = words(answer)
    sentences = _sentences(answer)
    cut = bool(sentences) and not sentences[-1].endswith((".", "!", "?"))
    heard = [_hear(sentence, topic) for sentence in sentences]
    own: dict[int, list[tuple[int, float]]] = defaultdict(list)  # part -> (place, worth) of each time it is said
    for place, h in enumerate(heard):
        if h.known and h.known.topic == topic.id:
            own[h.known.part].append((place, h.worth))
    worth = [max((w for _, w in own.get(part, [])), default=0.0) for part in range(3)]
    first_place = [own[part][0][0] if part in own else -1 for part in range(3)]
    relevance = min(1.0, worth[0] + worth[1])
    courtesy = 0.2 + 0.8 * relevance
    opening, closing = _manners(heard, min((p for p in first_place if p >= 0), default=len(heard)))
    num = {
        kind: sum(h.known is not None and h.known.kind == kind for h in heard) for kind in ("hedge", "rude", "generic")
    }
    num_manners = sum(h.manner != "" for h in heard)
    others = [words(s) for s, h in zip(sentences, heard, strict=True) if h.known is None or h.known.topic != topic.id]
    num_unknown = sum(h.known is None for h in heard[: len(heard) - cut])
    return {
        "first_step": STEP * worth[0],
        "second_step": STEP * worth[1],
        "fact": FACT * worth[2],
        "order": IN_ORDER if 0 <= first_place[0] < first_place[1] else 0.0,
        "names_it": NAMES_IT * courtesy if any(h.names_it for h in heard) else 0.0,
        "opening": OPENING * courtesy * (opening or 0.0),
        "closing": CLOSING * courtesy * (closing or 0.0),
        "wrong": WRONG * sum(h.known is not None and h.known.topic not in (-1, topic.id) for h in heard),
        "repeated": REPEATED * (sum(len(said) - 1 for said in own.values()) + len(others) - len(set(others))),
        "hedged": HEDGED * num["hedge"],
        "rude": RUDE * num["rude"],
        "empty_advice": EMPTY_ADVICE * num["generic"],
        "clutter": CLUTTER * (num_manners - (opening is not None) - (closing is not None)),
        "unknown": UNKNOWN * num_unknown + UNKNOWN_WORD * sum(word not in _vocabulary() for word in spoken),
        "cut_off": CUT_OFF * cut,
        "overlength": EXTRA_WORD * max(0, len(spoken) - LONGEST),
        "no_answer": NO_ANSWER if not spoken else 0.0,
    }


def judge(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Any = None, **columns: Any
) -> list[float]:
    """The rubric in TRL's reward signature, for `--judge bpo_fast.helpdesk:judge`.

    Args:
        prompts: questions of the world, one a completion.
        completions: answers.
        completion_ids, columns: part of the signature, not read.

    Raises:
        ValueError: the counts differ, or a prompt is not of the world.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"helpdesk judge: {len(prompts)} prompts but {len(completions)} completions")
    return [rubric_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _manners(heard: list[_Heard], first_own: int) -> tuple[float | None, float | None]:
    """Grades of the opening (said before any advice) and of the closing (said last); None where there is none."""
    opening = next((h.known.grade for h in heard[:first_own] if h.known and h.manner == "opening"), None)
    last = heard[-1].known if heard else None
    return opening, last.grade if last and last.kind == "closing" else None


def _sentences(answer: str) -> list[str]:
    text = " ".join(answer.replace(" and then ", ". Then ").split())
    found, start = [], 0
    for end in _END.finditer(text):
        found.append(text[start : end.end()].strip())
        start = end.end()
    found.append(text[start:].strip())
    return [s for s in found if words(s)]


def _hear(sentence: str, topic: Topic) -> _Heard:
    names_it = f" {' '.join(words(topic.noun))} " in f" {' '.join(words(sentence))} "
    nearest, match = _nearest(sentence.lower())
    advice = _advice(sentence.lower())
    # a sentence that two topics share counts for the one that was asked about
    own = [
        (known.grade * m, known)
        for known in _known_of(topic.id)
        if (m := _match(advice, known.words)) >= RECOGNISED and m > match - 0.1
    ]
    if own:
        worth, known = max(own, key=lambda pair: pair[0])
        return _Heard(known, worth, names_it)
    if match >= RECOGNISED:
        return _Heard(nearest, match, names_it)
    return _Heard(None, 0.0, names_it)


@functools.lru_cache(maxsize=65536)
def _nearest(sentence: str) -> tuple[Known | None, float]:
    """The known sentence that matches best; candidates share a word that is not light."""
    best: tuple[Known | None, float] = (None, 0.0)
    advice = _advice(sentence)
    phrase = words(_nouns().sub("n", sentence))
    for known in _candidates(advice):
        match = _match(advice, known.words)
        if match > best[1]:
            best = (known, match)
    for known in _phrases():
        match = _match(phrase, known.words)
        if match > best[1]:
            best = (known, match)
    return best


def _advice(sentence: str) -> tuple[str, ...]:
    return words(_FRAME.sub("", sentence))


def _match(said: tuple[str, ...], known: tuple[str, ...]) -> float:
    """Recall times precision of the longest common subsequence, light words at a quarter of their weight."""
    row = [0.0] * (len(known) + 1)
    for word in said:
        weight, diagonal = _weight(word), 0.0
        for j, other in enumerate(known, 1):
            diagonal, row[j] = row[j], diagonal + weight if word == other else max(row[j], row[j - 1])
    total = _total(said) * _total(known)
    return row[-1] ** 2 / total if total else 0.0


def _weight(word: str) -> float:
    return 0.25 if word in _LIGHT else 1.0


def _total(text: tuple[str, ...]) -> float:
    return sum(map(_weight, text))


@functools.cache
def _known_of(topic: int) -> tuple[Known, ...]:
    t = topics()[topic]
    full = (Known("topic", topic, part, 1.0, words(step.text)) for part, step in enumerate(t.steps))
    vague = (Known("topic", topic, part, VAGUE, words(step.core)) for part, step in enumerate(t.steps))
    return (*full, *vague, Known("topic", topic, 2, 1.0, words(t.fact)))


@functools.cache
def _phrases() -> tuple[Known, ...]:
    def of(kind: str, texts: Sequence[str], grade: float = 0.0) -> Iterator[Known]:
        return (Known(kind, -1, 0, grade, words(text.format(n="n"))) for text in texts)

    return (
        *of("opening", answers.OPENINGS["warm"], 1.0),
        *of("opening", answers.OPENINGS["short"], SHORT_MANNERS),
        *of("rude", answers.OPENINGS["rude"]),
        *of("hedge", answers.HEDGES),
        *of("generic", answers.GENERICS),
        *of("closing", answers.CLOSINGS["warm"], 1.0),
        *of("closing", answers.CLOSINGS["short"], SHORT_MANNERS),
    )


@functools.cache
def _by_word() -> dict[str, list[Known]]:
    index: dict[str, list[Known]] = defaultdict(list)
    for t in topics():
        for known in _known_of(t.id):
            for word in set(known.words) - _LIGHT:
                index[word].append(known)
    return index


def _candidates(said: tuple[str, ...]) -> set[Known]:
    return {known for word in set(said) for known in _by_word().get(word, ())}


@functools.cache
def _nouns() -> re.Pattern[str]:
    nouns = sorted({t.noun for t in topics()}, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, nouns))})\b")


@functools.cache
def _vocabulary() -> frozenset[str]:
    frames = words(" ".join(answers.FRAMES[0] + answers.FRAMES[1]))
    nouns = words(" ".join(t.noun for t in topics()))
    known = (word for k in (*_phrases(), *(k for t in topics() for k in _known_of(t.id))) for word in k.words)
    return frozenset((*known, *frames, *nouns))
