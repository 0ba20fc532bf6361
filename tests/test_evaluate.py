import pytest

from bpo_fast.annotate import Checked
from bpo_fast.evaluate import as_metrics, judge_greedy, prompt_tokens, reference_completion, shape, summarise
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks
from bpo_fast.types import Completion, Prompt


def row(score, label_score, ids=(1, 2), truncated=False, judge="j"):
    return {"scores": {judge: score}, "label_scores": {judge: label_score}, "ids": list(ids), "truncated": truncated}


@pytest.mark.parametrize(
    ("duels", "win_rate", "score"),
    [
        ([(1, 0), (0, 1)], 0.5, 0.5),
        ([(1, 1), (0, 0)], 0.0, 0.5),  # a tie is no win
        ([(1, 0), (1, 1), (1, 2), (3, 2)], 0.5, 1.5),
        ([(1, None), (0, 1), (2, 1)], 0.5, 1.0),  # no reference, no duel
        ([(None, 0), (2, 0)], 1.0, 2.0),  # no opinion, no duel
    ],
)
def test_win_rate_is_strict_and_over_the_duels_there_are(duels, win_rate, score):
    found = summarise([row(a, b) for a, b in duels], ["j"])
    assert found["win_rate"] == {"j": win_rate}
    assert found["score"] == {"j": score}


def test_without_references_or_opinions_there_is_no_number():
    assert summarise([row(1.0, None)], ["j"])["win_rate"] == {}
    assert summarise([row(None, None)], ["j"])["score"] == {}


def test_judges_are_kept_apart():
    rows = [{"scores": {"a": 1, "b": 0}, "label_scores": {"a": 0, "b": 1}, "ids": [1], "truncated": False}]
    assert summarise(rows, ["a", "b"])["win_rate"] == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("outputs", "truncated", "expected"),
    [
        ([(1, 2, 3), (1, 2, 4)], [True, False], (3.0, 0.5, 3 / 4, 1.0)),
        ([(1, 1, 1, 1)], [False], (4.0, 0.0, 1 / 3, 1.0)),
        ([(1, 2), (1, 2), (1, 2), (3, 4)], [True] * 4, (2.0, 1.0, 2 / 4, 0.5)),
        ([(1,), (2,)], [False, False], (1.0, 0.0, 0.0, 1.0)),  # bigrams do not cross outputs
        ([], [], (0.0, 0.0, 0.0, 0.0)),
    ],
    ids=str,
)
def test_length_truncation_and_diversity(outputs, truncated, expected):
    found = shape(outputs, truncated)
    assert tuple(found[k] for k in ("mean_length", "clipped_ratio", "distinct_2", "unique")) == pytest.approx(expected)


class Echo:
    """Answers with the last id of the prompt, greedily; gives up where that is 0."""

    name = "echo"

    def generate(self, prompts, params, *, run_seed, policy_version, on_done=None):
        assert (params.temperature, params.n, params.max_new_tokens) == (0.0, 1, 9)
        on_done(prompts)
        ids = [p.ids[-1:] if any(p.ids) else () for p in prompts]
        return [
            [Completion(p.id, 0, x, f" answer {p.ids[-1]} ", p.id == 2, policy_version, 0)]
            for p, x in zip(prompts, ids, strict=True)
        ]


class Length:
    """Scores the text by its length; has no opinion on prompt 3."""

    def __init__(self):
        self.calls = []

    def score(self, prompts, completions):
        self.calls.append([(p.id, c.prompt_id, c.text) for p, c in zip(prompts, completions, strict=True)])
        return [None if p.id == 3 else len(c.text.strip()) for p, c in zip(prompts, completions, strict=True)]


def judged(prompts, *judges):
    share = Ranks().share(prompts, prompt_tokens)
    with Progress(quiet=True) as progress, progress.task("evaluation", len(prompts)) as task:
        return judge_greedy(Echo(), share, judges, max_new_tokens=9, policy_version=5, when="after", task=task)


def test_outputs_that_the_engine_gave_up_are_left_out():
    prompts = [Prompt(1, "Q1", (0,), label="a"), Prompt(2, "Q2", (12,), label="b"), Prompt(3, "Q3", (0,))]
    judge = Length()
    [row] = judged(prompts, Checked("length", judge))
    assert row["prompt_id"] == 2
    assert judge.calls == [[(2, 2, " answer 12 ")], [(2, 2, " b")]]
    assert judged(prompts[:1], Checked("length", judge)) == []


def test_outputs_and_references_are_scored_on_their_own_prompts():
    prompts = [
        Prompt(1, "Q1", (10, 11), label="short"),
        Prompt(2, "Q2", (12,)),
        Prompt(3, "Q3", (13,), label="a label"),
    ]
    judge = Length()
    rows = judged(prompts, Checked("length", judge))
    assert judge.calls == [
        [(1, 1, " answer 11 "), (2, 2, " answer 12 "), (3, 3, " answer 13 ")],
        [(1, 1, " short"), (3, 3, " a label")],
    ]
    assert [r["scores"] for r in rows] == [{"length": 9.0}, {"length": 9.0}, {"length": None}]
    assert [r["label_scores"] for r in rows] == [{"length": 5.0}, {"length": None}, {"length": None}]
    assert rows[1] == {
        "when": "after",
        "step": 5,
        "prompt_id": 2,
        "prompt": "Q2",
        "label": None,
        "output": "answer 12",
        "ids": [12],
        "num_tokens": 1,
        "truncated": True,
        "scores": {"length": 9.0},
        "label_scores": {"length": None},
    }
    assert summarise(rows, ["length"])["win_rate"] == {"length": 1.0}


def test_without_any_label_there_is_a_score_and_no_win_rate():
    rows = judged([Prompt(1, "Q1", (10,)), Prompt(2, "Q2", (11,))], Checked("length", Length()))
    found = summarise(rows, ["length"])
    assert (found["win_rate"], found["score"]) == ({}, {"length": 9.0})


def test_the_reference_text_has_a_leading_blank_and_no_ids():
    completion = reference_completion(Prompt(4, "Q", (1,), label="So."))
    assert (completion.prompt_id, completion.text, completion.ids, completion.truncated) == (4, " So.", (), False)
    templated = Prompt(4, "<user>Q\n<bot>\n", (1,), label="So.", plain="Q Assistant:")
    assert reference_completion(templated).text == "So."


def test_metric_names():
    summary = {"win_rate": {"a": 0.5}, "score": {"a": 1.0}, "mean_length": 3.0, "kl": None}
    assert as_metrics("before", summary) == {
        "eval/when": "before",
        "eval/win_rate/a": 0.5,
        "eval/score/a": 1.0,
        "eval/mean_length": 3.0,
    }
