import itertools
import math
import random
from collections import Counter

import pytest

from bpo_fast.helpdesk import answers as a
from bpo_fast.helpdesk import (
    critic_rows,
    judge,
    preference_rows,
    prompt_rows,
    rubric_breakdown,
    rubric_score,
    sft_rows,
    swapped_rows,
)
from bpo_fast.helpdesk.answers import SFT_MIX, write_answer
from bpo_fast.helpdesk.questions import FORMS, HELD_OUT_ROLES, NUM_FORMS, ROLES, SUFFIX, ask, combinations, role_of
from bpo_fast.helpdesk.topics import topic_of, topics

QUESTION = "My kettle will not switch on. What should I do? Assistant:"
FIRST, SECOND = "Press the lid down until it clicks.", "Then push the red button under the base."
FACT = "It only starts with a full cup of water."
PERFECT = (
    "Thanks for your question about the kettle. First, press the lid down until it clicks. Then push the red button "
    "under the base. It only starts with a full cup of water. Let me know if that helps."
)


def score(answer):
    return rubric_score(QUESTION, answer)


def test_equal_seeds_give_equal_rows_and_other_seeds_do_not():
    for rows in (sft_rows, prompt_rows):
        assert rows(40, 1) == rows(40, 1) != rows(40, 2)
    assert preference_rows(40, 1, "judge") == preference_rows(40, 1, "judge") != preference_rows(40, 1, "annotator")


def test_every_form_names_its_topic():
    rng = random.Random(0)
    for topic, form in itertools.product(topics(), range(len(FORMS))):
        question = ask(topic, form, rng)
        assert question.endswith(SUFFIX)
        assert topic_of(question) == topic, question


def test_roles_share_no_combination_and_evaluation_has_forms_of_its_own():
    pools = {role: {(t.id, f) for t, f in combinations(role)} for role in ROLES | HELD_OUT_ROLES}
    assert sum(map(len, pools.values())) == len(set().union(*pools.values())) == len(topics()) * len(FORMS)
    for role, pool in pools.items():
        held_out = {f for _, f in pool if f >= NUM_FORMS}
        assert bool(held_out) == (role in HELD_OUT_ROLES)
        if role in ROLES:
            assert {t for t, _ in pool} == {t.id for t in topics()}, "every role meets every topic"


def test_rows_stay_inside_their_role():
    def roles(rows):
        texts = {FORMS[f].format(n=t.noun, a=f"{x} {t.noun}", p=p): role_of(t, f)
                 for t in topics() for f in range(len(FORMS)) for p in t.problems for x in ("a", "an")}  # fmt: skip
        return {max((q for q in texts if q in row["prompt"]), key=len) for row in rows}, texts

    for rows, role in ((preference_rows(20, 0, "judge"), "judge"), (prompt_rows(20, 0), "prompts")):
        questions, texts = roles(rows)
        assert {texts[q] for q in questions} == {role}


def test_evaluation_is_half_new_forms_and_never_repeats_a_prompt():
    rows = prompt_rows(200, 0, "eval")
    assert Counter(r["held_out"] for r in rows) == {"form": 100, "combination": 100}
    assert len({r["prompt"] for r in rows}) == 200
    assert not {r["prompt"] for r in rows} & {r["prompt"] for r in prompt_rows(2000, 0)}


def test_critic_rows_know_what_fits():
    rows = critic_rows(400, 0, "eval", flips=0)
    fits = [row["label"].endswith("yes") for row in rows]
    assert 0.4 < sum(fits) / len(rows) < 0.6
    for row, fit in zip(rows, fits, strict=True):
        question, _, advice = row["prompt"].partition(SUFFIX)
        assert (rubric_breakdown(question, advice)["wrong"] == 0) == fit, row


def test_unknown_role():
    with pytest.raises(ValueError, match="role = 'test'"):
        combinations("test")


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (PERFECT, f"{FIRST} {SECOND} {FACT}"),
        (f"{FIRST} {SECOND} {FACT}", f"{FIRST} {SECOND}"),
        (f"{FIRST} {SECOND}", f"{SECOND} {FIRST}"),
        (f"{FIRST} {SECOND}", FIRST),
        (FIRST, "Press the lid down."),
        ("Press the lid down.", "Look at the manual."),
        (FIRST, f"I am not really sure. {FIRST}"),
        (f"Hello. {FIRST}", FIRST),
        (f"I am happy to help. {FIRST}", f"Hello. {FIRST}"),
        (FIRST, f"Everybody knows this. {FIRST}"),
        (f"{FIRST} Good luck.", FIRST),
        (f"{FIRST} Have a lovely day.", f"{FIRST} Good luck."),
        (f"{FIRST} {SECOND}", f"{FIRST} Then push the red"),
        (f"{FIRST} {SECOND}", f"{FIRST} Then rinse the inside with cold water twice."),
        (f"{FIRST} {SECOND}", f"{FIRST} {SECOND} {FIRST}"),
        (f"{FIRST} {SECOND}", f"{FIRST} {SECOND} Also, turn the tray around after ten minutes."),
        (PERFECT, PERFECT.removesuffix(".")),
        ("Press the lid down.", "Prass the lud duwn."),
        ("I am happy to help.", ""),
    ],
)
def test_graded_answers_are_ordered(better, worse):
    assert score(better) > score(worse)


def test_perfect_answer_has_all_points():
    assert score(PERFECT) == pytest.approx(10)
    assert all(v >= 0 for v in rubric_breakdown(QUESTION, PERFECT).values())


@pytest.mark.parametrize(
    "hack",
    [
        " ".join([FIRST] * 6),
        f"{PERFECT} {PERFECT}",
        "press lid down clicks push red button base starts full cup water kettle kettle kettle",
        " ".join(f"First, {t.steps[0].text}. Then {t.steps[1].text}." for t in topics()[:20]),
        "Thank you for asking. I am happy to help. Hello. Sure. Let me know if that helps. Have a lovely day.",
        "Thanks for your question about the toaster. First, turn the dial down to number two. Then empty the crumb "
        "tray over the sink. Frozen bread has its own button. Let me know if that helps.",
        "kettle " * 60,
        f"{FIRST} {SECOND} " + "This is good. " * 20,
        "",
        "\n\n  ",
        "ÿ\x00 <|endoftext|> ,,,,",
    ],
)  # fmt: skip
def test_hacks_earn_less_than_one_honest_step(hack):
    assert -10 <= score(hack) < score(FIRST) or hack.startswith(PERFECT)
    assert score(hack) < score(f"{FIRST} {SECOND}")


def test_every_step_and_fact_counts_for_its_own_topic_only():
    for topic in topics():
        question = f"My {topic.noun} {topic.problems[1]}."
        parts = (("first_step", f"{topic.steps[0].text}.", 2.5), ("second_step", f"{topic.steps[1].text}.", 2.5))
        for component, text, points in (*parts, ("fact", topic.fact, 1.5)):
            own = rubric_breakdown(question, text)
            assert own[component] == pytest.approx(points), text
            assert own["wrong"] == own["unknown"] == 0
            other = topics()[(topic.id + 2) % len(topics())]
            assert rubric_breakdown(f"My {other.noun} {other.problems[0]}.", text)["wrong"] == -1.5, text


def test_writers_differ_and_labels_are_decent_but_beatable():
    rows = prompt_rows(200, 3, "eval")
    label = [rubric_score(r["prompt"], r["label"]) for r in rows]
    rng = random.Random(0)
    by_writer = [
        [rubric_score(r["prompt"], write_answer(topic_of(r["prompt"]), rng, mix).text) for r in rows]
        for mix in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    means = [sum(s) / len(s) for s in by_writer]
    assert means[0] > sum(label) / len(label) > means[1] > means[2]
    wins = sum(x > y for x, y in zip(by_writer[0], label, strict=True)) / len(rows)
    assert 0.35 < wins < 0.65


def test_judge_has_trl_signature():
    prompts = [QUESTION, QUESTION]
    assert judge(prompts, [PERFECT, ""], completion_ids=[[1], [2]], label=["x", "y"]) == [score(PERFECT), score("")]
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        judge(prompts, [PERFECT])
    with pytest.raises(ValueError, match="no known problem in the question 'What is the capital"):
        judge(["What is the capital of France? Assistant:"], ["Paris."])


def test_choices_have_probabilities_that_add_up():
    tables = (a.ABOUT, a.OPENING, a.HEDGE, a.FIRST, a.SECOND, a.FACT, a.CLOSING, a.CUT, a.SOURCE)
    for table, writer in itertools.product(tables, range(3)):
        assert sum(row[writer] for row in table.values()) == pytest.approx(1)
    assert sum(SFT_MIX) == pytest.approx(1) == sum(a.LABEL_MIX)


def test_log_probability_is_the_frequency_of_what_can_be_said_in_one_way():
    rng = random.Random(0)
    num = 25_000
    drawn = [write_answer(topics()[0], rng) for _ in range(num)]
    logp = {d.text: d.logp for d in drawn if FIRST[6:] in d.text}
    common = [(text, n) for text, n in Counter(d.text for d in drawn).most_common() if text in logp][:8]
    for text, n in common:
        expected = num * math.exp(logp[text])
        assert abs(n - expected) < 0.02 * expected + 4.5 * math.sqrt(expected), text


def test_preferences_are_noisy_when_asked_and_swaps_are_relevant():
    clean = preference_rows(300, 0, "eval", flips=0)
    assert all(rubric_score(r["prompt"], r["chosen"]) > rubric_score(r["prompt"], r["rejected"]) for r in clean)
    noisy = preference_rows(600, 0, "judge")
    right = sum(rubric_score(r["prompt"], r["chosen"]) > rubric_score(r["prompt"], r["rejected"]) for r in noisy)
    assert 0.75 < right / 600 < 0.95
    swapped = swapped_rows(300, 0, "eval")
    assert sum(rubric_score(r["prompt"], r["chosen"]) > rubric_score(r["prompt"], r["rejected"]) for r in swapped) > 290
