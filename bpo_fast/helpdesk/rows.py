"""Rows of data made from the world: supervised texts, preference pairs, prompts and held-out questions."""

import math
import random

from bpo_fast.helpdesk.answers import FRAMES, LABEL_MIX, OPENINGS, SFT_MIX, Answer, write_answer
from bpo_fast.helpdesk.questions import NUM_FORMS, ask, combinations
from bpo_fast.helpdesk.rubric import rubric_score
from bpo_fast.helpdesk.topics import Topic, topics

FLIPS = 0.05
TEMPERATURE = 0.5


def sft_rows(num: int, seed: int, role: str = "sft") -> list[dict[str, str]]:
    """`num` rows {"prompt", "label"} with answers of mixed quality, from the combinations of `role`."""
    rng = random.Random(f"sft {role} {seed}")
    pool = combinations(role)
    rows = []
    for _ in range(num):
        topic, form = rng.choice(pool)
        rows.append({"prompt": ask(topic, form, rng), "label": write_answer(topic, rng, SFT_MIX).text})
    return rows


def prompt_rows(num: int, seed: int, role: str = "prompts") -> list[dict[str, str]]:
    """`num` distinct prompts with a decent answer as label.

    Rows of role eval also say in `held_out` whether the form is new, or only its combination with the topic; both
    halves are of the same size.
    """
    rng = random.Random(f"prompts {role} {seed}")
    pool = combinations(role)
    halves = [[c for c in pool if c[1] < NUM_FORMS], [c for c in pool if c[1] >= NUM_FORMS]]
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num:
        topic, form = rng.choice(halves[len(rows) % 2] if role == "eval" else pool)
        row = {"prompt": ask(topic, form, rng), "label": write_answer(topic, rng, LABEL_MIX).text}
        if role == "eval":
            row["held_out"] = "form" if form >= NUM_FORMS else "combination"
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def preference_rows(num: int, seed: int, role: str, *, flips: float = FLIPS) -> list[dict[str, str]]:
    """`num` rows {"prompt", "chosen", "rejected"} as a noisy reader of the rubric would label them.

    A third of the pairs are two independent answers, a third an answer and a spoilt copy of it, a third an answer and
    one to another question, often of the same noun or domain. The order is drawn from the Bradley-Terry probability
    of the rubric's scores at `TEMPERATURE` points, then turned around with probability `flips`; ties are drawn anew.

    Args:
        num: rows.
        seed: stream of random choices.
        role: whose combinations of topic and form are used: annotator or judge.
        flips: share of pairs turned around whatever their scores, in [0, 0.5]; 0 also turns the other noise off, so
            that rows hold the rubric's own order.
    """
    rng = random.Random(f"preferences {role} {seed}")
    pool = combinations(role)
    rows = []
    while len(rows) < num:
        topic, form = rng.choice(pool)
        prompt = ask(topic, form, rng)
        one, other = _contrast(topic, rng)
        gap = rubric_score(prompt, one) - rubric_score(prompt, other)
        if gap == 0 or one == other:
            continue
        first = gap > 0
        if flips:
            first = (rng.random() < 1 / (1 + math.exp(-gap / TEMPERATURE))) != (rng.random() < flips)
        chosen, rejected = (one, other) if first else (other, one)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def critic_rows(num: int, seed: int, role: str, *, flips: float = FLIPS) -> list[dict[str, str]]:
    """`num` rows that teach whether one sentence of advice fits a question, half of them fitting.

    The prompt is a question and the sentence, the label yes or no, turned around with probability `flips`. What does
    not fit is advice on another problem, often of the same noun or domain. Two fifths of the sentences follow an
    opening that names their noun, and for one fifth the label names it first. These come before pairs: whether a step
    fits its question shows neither in the step nor in the question alone, and a small model that sees pairs only is
    slow to find it.
    """
    rng = random.Random(f"critic {role} {seed}")
    pool = combinations(role)
    openings = [o for o in OPENINGS["warm"] if "{n}" in o]
    rows = []
    for _ in range(num):
        topic, form = rng.choice(pool)
        fits = rng.random() < 0.5
        advised = topic if fits else _another(topic, rng)
        part, kind = rng.randrange(3), rng.choice(("named", "named", "asked", "plain", "plain"))
        advice = _advice(advised, part, rng)
        if kind == "named":
            advice = f"{rng.choice(openings).format(n=advised.noun)} {advice}"
        verdict = "yes" if fits != (rng.random() < flips) else "no"
        label = f"{advised.noun} {verdict}" if kind == "asked" else verdict
        rows.append({"prompt": f"{ask(topic, form, rng)} {advice}", "label": label})
    return rows


def swapped_rows(num: int, seed: int, role: str) -> list[dict[str, str]]:
    """`num` rows whose chosen text is a careful answer to the prompt, and whose rejected text is one to another."""
    rng = random.Random(f"swapped {role} {seed}")
    pool = combinations(role)
    rows = []
    for _ in range(num):
        topic, form = rng.choice(pool)
        own, swapped = (write_answer(t, rng, (1.0, 0.0, 0.0)).text for t in (topic, _another(topic, rng)))
        rows.append({"prompt": ask(topic, form, rng), "chosen": own, "rejected": swapped})
    return rows


def _contrast(topic: Topic, rng: random.Random) -> tuple[str, str]:
    """Two answers to a question about `topic`, from policies of any stage of training."""
    mix = rng.choice((SFT_MIX, LABEL_MIX, (0.9, 0.1, 0.0)))
    answer = write_answer(topic, rng, mix)
    kind = rng.randrange(3)
    if kind == 0:
        return answer.text, write_answer(topic, rng, mix).text
    if kind == 1:
        return answer.text, _spoil(answer, topic, rng)
    return answer.text, write_answer(_another(topic, rng), rng, mix).text


def _advice(topic: Topic, part: int, rng: random.Random) -> str:
    return topic.fact if part == 2 else rng.choice(FRAMES[part]).format(s=topic.steps[part].text)


def _another(topic: Topic, rng: random.Random) -> Topic:
    def related(t: Topic) -> bool:
        return t.id != topic.id and (kind == "any" or getattr(t, kind) == getattr(topic, kind))

    kind = rng.choice(("noun", "domain", "any"))
    return rng.choice([t for t in topics() if related(t)])


def _spoil(answer: Answer, topic: Topic, rng: random.Random) -> str:
    """The answer with one thing changed: a sentence dropped, doubled, moved, cut, garbled or taken from elsewhere."""
    said = list(answer.sentences)
    place = rng.randrange(len(said))
    kind = rng.choice(("drop", "double", "move", "cut", "garble", "replace", "insert"))
    if kind == "drop" and len(said) > 1:
        del said[place]
    elif kind == "double":
        said.insert(rng.randint(0, len(said)), said[place])
    elif kind == "move":
        said.insert(rng.randrange(len(said)), said.pop(place))
    elif kind == "cut":
        spoken = said[place].split(" ")
        said[place:] = [" ".join(spoken[: max(1, rng.randrange(len(spoken)))]).rstrip(".,")]
    elif kind == "garble":
        said[place] = _garble(said[place], rng)
    else:
        other = rng.choice(write_answer(_another(topic, rng), rng).sentences)
        said[place : place + (kind == "replace")] = [other]
    return " ".join(said)


def _garble(sentence: str, rng: random.Random) -> str:
    """Some words replaced by words of other topics, as a small model does."""
    spoken = sentence.split(" ")
    for i in range(len(spoken)):
        if rng.random() < 0.4:
            t = rng.choice(topics())
            spoken[i] = rng.choice(f"{t.steps[0].text} {t.steps[1].text}".split(" "))
    return " ".join(spoken)
