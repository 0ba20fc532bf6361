import json
import math
import re

import pytest
import torch
import toy_annotator
from tiny_world import write_rows

from bpo_fast.annotate import CallableAnnotator, Checked, RecordedAnnotator, judge_name, load_annotator
from bpo_fast.config import AnnotatorConfig
from bpo_fast.types import Completion, Prompt

PROMPTS = [Prompt(7, "Q7 Assistant:", (1,), columns={"topic": "x"}), Prompt(9, "Q9 Assistant:", (2,), columns={"n": 3})]
COMPLETIONS = [Completion(7, 0, (4, 5), " yes", False, 0, 0), Completion(9, 1, (6,), " no", True, 0, 0)]


def score(spec):
    return load_annotator(spec, AnnotatorConfig(batch_tokens=100), device="cpu").score(PROMPTS, COMPLETIONS)


class Fixed:
    def __init__(self, *scores):
        self.scores = scores

    def score(self, prompts, completions):
        return list(self.scores)


def test_a_callable_gets_trl_s_arguments():
    seen = {}

    def function(**arguments):
        seen.update(arguments)
        return (1, 2)

    assert CallableAnnotator(function, "f").score(PROMPTS, COMPLETIONS) == [1, 2]
    assert seen == {
        "prompts": ["Q7 Assistant:", "Q9 Assistant:"],
        "completions": [" yes", " no"],
        "completion_ids": [[4, 5], [6]],
        "topic": ["x", None],
        "n": [None, 3],
    }


def test_annotators_see_no_chat_template_of_the_policy(tmp_path):
    prompt = Prompt(3, "<user>Who?\n<bot>", (1,), plain="Who? Assistant:")
    answers = [Completion(3, 0, (4,), "I.", False, 0, 0)]
    assert CallableAnnotator(lambda prompts, **_: [len(p) for p in prompts], "f").score([prompt], answers) == [15]
    recorded = write_rows(tmp_path / "r.jsonl", [{"prompt": "Who?", "completion": "I.", "score": 2}])
    assert RecordedAnnotator(recorded).score([prompt], answers) == [2.0]


def test_a_generator_that_raises_is_named():
    def halves(prompts, **_):
        yield from (1 / 0 for _ in prompts)

    with pytest.raises(ValueError, match=r"^annotator halves: .*ZeroDivisionError"):
        CallableAnnotator(halves, "halves").score(PROMPTS, COMPLETIONS)


def test_a_callable_is_found_by_module_and_name():
    texts, ids = [c.text for c in COMPLETIONS], [c.ids for c in COMPLETIONS]
    assert score("toy_annotator:letters") == toy_annotator.letters([], texts, ids)
    assert score("toy_annotator:none") == [None, None]


def test_a_callable_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_judge.py").write_text(
        "def f(prompts, completions, completion_ids, **columns):\n    return [3, 4]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert score("my_own_judge:f") == [3.0, 4.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toy_annotator:nan", "annotator nan: score nan for a completion of prompt 9"),
        ("toy_annotator:too_few", "annotator too_few: 1 scores for 2 completions"),
        ("toy_annotator:no_list", "annotator no_list: returned None, not a list of scores"),
        ("toy_annotator:numbered", "annotator numbered: returned {0: 0.5, 1: 0.5}, not a list of scores"),
        ("toy_annotator:words", "annotator words: score 'good' for a completion of prompt 7"),
        ("mine=toy_annotator:nan", "annotator mine: score nan"),
        ("toy_annotator:missing", "annotator toy_annotator:missing: module toy_annotator has no function missing"),
        ("toy_annotator:NOT_A_FUNCTION", "module toy_annotator has no function NOT_A_FUNCTION"),
        ("no_such_module:f", "annotator no_such_module:f: ModuleNotFoundError: No module named 'no_such_module'"),
        ("nothing.jsonl", "annotator nothing.jsonl: no such file"),
    ],
)
def test_a_bad_annotator_is_named(spec, message):
    with pytest.raises(ValueError) as caught:
        score(spec)
    assert message in str(caught.value)


def test_what_a_callable_raises_comes_with_its_place():
    with pytest.raises(ValueError) as caught:
        score("toy_annotator:raising")
    place = re.escape(toy_annotator.__file__) + r", line \d+"
    pattern = rf"annotator raising: KeyError: 'score of the reward service' \({place}\)"
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", "SyntaxError: "),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\n1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(code, message, tmp_path, monkeypatch):
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"^annotator {name}:f: {message}") as caught:
        score(f"{name}:f")
    assert f"{name}.py, line" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.0", [1.0], {}, 1j, 10**400], ids=repr)
def test_only_finite_numbers_are_scores(bad):
    with pytest.raises(ValueError, match=r"^annotator a: score .* for a completion of prompt 9$"):
        Checked("a", Fixed(1.0, bad)).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("scores", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_another_number_of_scores_is_an_error(scores):
    with pytest.raises(ValueError, match=rf"^annotator a: {len(scores)} scores for 2 completions$"):
        Checked("a", Fixed(*scores)).score(PROMPTS, COMPLETIONS)


def test_numbers_of_any_kind_become_floats():
    scores = Checked("a", Fixed(torch.tensor(0.5), True)).score(PROMPTS, COMPLETIONS)
    assert scores == [0.5, 1.0]
    assert all(type(s) is float for s in scores)
    assert Checked("a", Fixed(None, 2)).score(PROMPTS, COMPLETIONS) == [None, 2.0]


def test_nothing_is_scored_without_asking():
    assert Checked("a", Fixed(1.0)).score([], []) == []


def test_recorded_labels(tmp_path):
    rows = [
        {"prompt": "Q7 Assistant:", "completion": "yes", "score": 2},
        {"prompt": "Q9 Assistant:", "completion": "another", "score": 1},
    ]
    assert score(str(write_rows(tmp_path / "labels.jsonl", rows))) == [2.0, None]


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a"}, {"prompt": "a", "completion": "b", "score": "x"}, {"prompt": 1, "completion": "b", "score": 1}],
)
def test_a_bad_recorded_row_is_named(row, tmp_path):
    path = write_rows(tmp_path / "labels.jsonl", [{"prompt": "a", "completion": "b", "score": 1}, row])
    with pytest.raises(ValueError, match=r"labels\.jsonl: row 2 is not a prompt, completion and score"):
        RecordedAnnotator(path)


def test_recorded_prompts_match_with_and_without_the_closing_words(tmp_path):
    rows = [
        {"prompt": "Q7", "completion": "yes", "score": 1},
        {"prompt": "Q9 Assistant: ", "completion": " no", "score": 2},
    ]
    assert score(str(write_rows(tmp_path / "labels.jsonl", rows))) == [1.0, 2.0]


def test_recorded_prompts_match_with_and_without_the_chat_template(tmp_path):
    rows = [{"prompt": "Q", "completion": "a", "score": 1}, {"prompt": "<user>Q<end>", "completion": "b", "score": 2}]
    recorded = RecordedAnnotator(write_rows(tmp_path / "labels.jsonl", rows))
    prompt = Prompt(0, "<user>Q<end>", (1,), plain="Q Assistant:")
    completions = [Completion(0, i, (2,), text, False, 0, 0) for i, text in enumerate("abc")]
    assert recorded.score([prompt] * 3, completions) == [1.0, 2.0, None]


def test_a_bad_recorded_file_is_named(tmp_path):
    (tmp_path / "labels.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "score": 1}) + "\n{")
    with pytest.raises(ValueError, match=r"labels\.jsonl: line 2: invalid JSON"):
        score(str(tmp_path / "labels.jsonl"))
    (tmp_path / "labels.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"labels\.jsonl: not UTF-8 text"):
        score(str(tmp_path / "labels.jsonl"))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("module.sub:function", "function"),
        ("runs/reward-model/", "reward-model"),
        ("owner/name", "name"),
        ("labels/dev.jsonl", "dev"),
        ("rm=owner/name", "rm"),
        ("rubric=bpo_fast.helpdesk:judge", "rubric"),
    ],
)
def test_names_of_judges(spec, name):
    assert judge_name(spec) == name


def test_a_judge_in_the_working_folder_is_called_as_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "judge" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "judge" / "sub")
    assert judge_name(".") == judge_name(f"{tmp_path}/judge/sub") == "sub"
    assert judge_name("../") == judge_name(f"{tmp_path}/judge") == "judge"
