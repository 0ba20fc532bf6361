"""`bpo-fast eval` as a user runs it, on the tiny model."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from judge_server import by_length, endpoint, said
from tiny_world import answer, question, write_rows
from typer.testing import CliRunner

from bpo_fast.cli import app
from bpo_fast.contest import Contestant, Judged, head_to_head, read_outputs, shape
from bpo_fast.engine.hf import HfEngine
from bpo_fast.interrupts import interrupts_call
from bpo_fast.types import Completion, Prompt


def call(*args):
    """A command in this process: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def evaluated(out, *args):
    code, text, err = call("eval", *args, "--out", out)
    assert code == 0, err
    return json.loads((out / "eval.json").read_text(encoding="utf-8")), text


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_args):
    folder = tmp_path_factory.mktemp("eval") / "run"
    code, _, err = call(*tiny_args, "--judge", "toy_annotator:letters", "--out", folder)
    assert code == 0, err
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_run_is_evaluated_as_it_was_at_its_end(run, tmp_path):
    found, text = evaluated(tmp_path / "e", run)
    after = json.loads((run / "summary.json").read_text(encoding="utf-8"))["after"]
    (side,) = found["contestants"]
    assert side["judges"]["letters"]["win_rate"]["mean"] == after["win_rate"]["letters"]
    assert side["mean_tokens"] == after["mean_length"]
    assert (side["clipped_ratio"], found["num_prompts"]) == (after["clipped_ratio"], 6)
    outputs = [r["output"] for r in rows_of(run / "eval.jsonl") if r["when"] == "after"]
    assert [r["output"] for r in rows_of(tmp_path / "e" / "rows.jsonl")] == outputs
    low, high = (side["judges"]["letters"]["win_rate"][k] for k in ("low", "high"))
    assert 0 <= low <= side["judges"]["letters"]["win_rate"]["mean"] <= high <= 1
    assert "win rate, letters" in text
    assert "6 prompts, greedy, [95% interval]" in text
    assert text.splitlines()[-1] == str(tmp_path / "e")


def test_answers_that_the_engine_gave_up_are_left_out(run, tiny_model_dir, tiny_data, tmp_path, monkeypatch):
    decode = HfEngine._decode

    def decode_but_one(self, requests, params, stop):
        sampled = decode(self, requests, params, stop)
        return [((), None) if r.prompt.id == 2 else s for r, s in zip(requests, sampled, strict=True)]

    monkeypatch.setattr(HfEngine, "_decode", decode_but_one)
    code, _, err = call("eval", run, "--out", tmp_path / "e")
    assert code == 0
    assert "left out: 1 that the engine gave up" in err
    assert [r["prompt_id"] for r in rows_of(tmp_path / "e" / "rows.jsonl")] == [0, 1, 3, 4, 5]
    assert rows_of(tmp_path / "e" / "outputs.jsonl")[2] == {"completion": None}
    args = ["--model", tiny_model_dir, "--data", f"{tiny_data.eval}[:4]", "--engine", "hf", "--max-new-tokens", 4]
    code, _, err = call("sample", *args, "--device", "cpu", "--n", 2, "--out", tmp_path / "s.jsonl")
    assert code == 0, err
    assert "left out: 2 completions that the engine gave up" in err
    assert [r["prompt"] for r in rows_of(tmp_path / "s.jsonl")] == [
        question(i) + " Assistant:" for i in (64, 65, 67) for _ in range(2)
    ]


def test_checkpoint_adapter_merged_model_and_published_outputs_are_the_same_thing(run, tmp_path, tiny_data):
    checkpoint = max(run.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(checkpoint, adapter)
    assert call("export", run, "--out", merged)[0] == 0
    settings = ["--data", tiny_data.eval, "--judge", "toy_annotator:letters", "--prompts", 6, "--max-new-tokens", 8]
    settings += ["--device", "cpu", "--engine", "hf"]
    rates = [evaluated(tmp_path / "run", run)[0]["contestants"][0]["judges"]]
    for source in (checkpoint, adapter, merged):
        rates.append(evaluated(tmp_path / f"e-{source.name}", source, *settings)[0]["contestants"][0]["judges"])
    published = tmp_path / "run" / "outputs.jsonl"
    rates.append(evaluated(tmp_path / "p", "--outputs", published, *settings)[0]["contestants"][0]["judges"])
    # the ids that the annotator of this test adds to the score are unknown to texts
    assert rates[0] == rates[1] == rates[2] == rates[3]
    assert rates[4]["letters"]["num_judged"] == 6


def test_head_to_head_against_the_start(run, tmp_path, tiny_model_dir):
    found, text = evaluated(tmp_path / "e", run, "--against", tiny_model_dir)
    duel = found["head_to_head"]["letters"]
    a, b = (side["judges"]["letters"] for side in found["contestants"])
    assert duel["wins"] + duel["ties"] + duel["losses"] == 6
    assert duel["win_rate_difference"]["mean"] == pytest.approx(a["win_rate"]["mean"] - b["win_rate"]["mean"])
    rows = rows_of(tmp_path / "e" / "rows.jsonl")
    assert sum(r["scores"]["letters"] > r["against_scores"]["letters"] for r in rows) == duel["wins"]
    assert f"run against {tiny_model_dir.name}, letters:" in text


def test_a_judge_over_http_and_what_it_leaves_open(run, tmp_path):
    def answers(question, number):
        return (
            said("no idea") if "room 1" in question and "reset the printer" in question else by_length(question, number)
        )

    with endpoint(answers) as server:
        found, text = evaluated(
            tmp_path / "e", run, "--judge", f"llm={server.spec}", "--against", run, "--set", "annotator.retries=0"
        )
    side = found["contestants"][0]["judges"]["llm"]
    assert side["num_judged"] + side["num_unjudged"] == 6
    assert side["num_unjudged"] == 1
    duel = found["head_to_head"]["llm"]
    assert (duel["wins"], duel["losses"], duel["ties"], duel["unjudged"]) == (0, 0, 5, 1)
    assert "unjudged, llm" in text
    assert "llm: 3 pairs unjudged, the last because: no clear verdict in 'no idea'" in text
    unjudged = [r for r in rows_of(tmp_path / "e" / "rows.jsonl") if r["scores"]["llm"] is None]
    assert len(unjudged) == 1


def test_answers_survive_a_judge_that_refuses(run, tmp_path):
    with endpoint(lambda q, n: (401, "who are you?")) as server:
        code, _, err = call("eval", run, "--judge", f"llm={server.spec}", "--out", tmp_path / "e")
    assert code == 2
    assert "status 401 Unauthorized: who are you? (BPO_FAST_JUDGE_KEY is not set)" in err
    assert sum(r["completion"] is not None for r in rows_of(tmp_path / "e" / "outputs.jsonl")) == 6
    assert f"kept in {tmp_path / 'e'}: outputs.jsonl; judge these answers with --outputs " in err
    assert not (tmp_path / "e" / "rows.jsonl").exists()


def test_verdicts_survive_a_judge_that_refuses_after_them(run, tmp_path):
    out, letters = tmp_path / "e", ["--judge", "toy_annotator:letters"]
    whole, _ = evaluated(tmp_path / "whole", run, "--against", run, *letters)
    num_pairs = whole["num_prompts"]
    # the second contestant's last question is not reached
    with endpoint(lambda q, n: by_length(q, n) if n < 2 * num_pairs else (401, "quota")) as server:
        code, _, err = call("eval", run, "--against", run, *letters, "--judge", f"llm={server.spec}", "--out", out)
    assert code == 2
    assert err.count("kept in ") == 1
    assert f"kept in {out}: outputs.jsonl, against.jsonl, rows.jsonl; judge these answers with --outputs " in err
    rows = rows_of(out / "rows.jsonl")
    for row, wanted in zip(rows, rows_of(tmp_path / "whole" / "rows.jsonl"), strict=True):
        assert set(row.pop("scores")) == {"letters", "llm"}
        assert set(row.pop("label_scores")) == {"letters", "llm"}
        assert row.items() <= wanted.items()
    assert not (out / "eval.json").exists()
    flags = f"--outputs {out / 'outputs.jsonl'} --against {out / 'against.jsonl'}"
    code, _, refused = call("eval", run, *letters, "--out", out)
    assert (code, f"judge them with {flags} and another --out" in refused) == (2, True)
    said = re.search(r"judge these answers with (.*)\n", err)
    assert said
    assert said[1].startswith(flags)
    again, _ = evaluated(tmp_path / "again", *said[1].split(), *letters)
    assert (again["num_prompts"], again["task"], again["data"]) == (num_pairs, whole["task"], whole["data"])


def test_verdicts_survive_ctrl_c(run, tmp_path):
    def interrupt(question, number):
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return by_length(question, number)

    # a shell has its background processes ignore the signal, and this may be one
    with endpoint(interrupt) as server, interrupts_call(signal.default_int_handler):
        code, _, err = call(
            *("eval", run, "--judge", "toy_annotator:letters", "--judge", f"llm={server.spec}", "--out", tmp_path / "e")
        )
    assert code == 130
    assert f"kept in {tmp_path / 'e'}: outputs.jsonl, rows.jsonl; judge" in err
    assert [set(r["scores"]) for r in rows_of(tmp_path / "e" / "rows.jsonl")] == [{"letters"}] * 6


@pytest.fixture
def short(tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo\n", encoding="utf-8")
    return tmp_path / "short.txt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--against", "SHORT"], "short.txt: 2 outputs, but "),
        (["--against", "nosuch"], "model.path = nosuch: cannot be loaded as a model"),
        (["--judge", "nope:func"], "annotator nope:func: ModuleNotFoundError"),
        (["--judge", "toy_annotator:nothing"], "annotator toy_annotator:nothing: module toy_annotator has no function"),
        (["--judge", "nosuch.jsonl"], "annotator nosuch.jsonl: no such file"),
        (["--judge", "http://[::1/v1#m"], "not an address"),
        (["--judge", "rm=no/such/folder"], "reward model no/such/folder: no such folder"),
        (["--judge", "MODEL"], "is not a sequence-classification model"),
        (["--data", "nosuch.jsonl"], "nosuch.jsonl"),
        (["--prompts", "0"], "eval.prompts = 0: nothing to evaluate"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_found_before_decoding(args, message, run, short, tiny_model_dir, tmp_path):
    args = [{"SHORT": short, "MODEL": tiny_model_dir}.get(a, a) for a in args]
    code, _, err = call("eval", run, *args, "--out", tmp_path / "e")
    assert code == 2
    assert message in err
    assert "decoding" not in err
    assert not (tmp_path / "e").exists()


def test_answers_survive_a_rival_that_cannot_be_loaded(run, tiny_model_dir, tmp_path):
    rival = tmp_path / "rival"
    shutil.copytree(tiny_model_dir, rival)
    (rival / "model.safetensors").write_bytes(b"no weights")
    code, _, err = call("eval", run, "--against", rival, "--out", tmp_path / "e")
    assert code == 2
    assert f"kept in {tmp_path / 'e'}: outputs.jsonl; judge" in err


@pytest.mark.parametrize("asked", [lambda q: [{"role": "user", "content": q}], str], ids=["messages", "text"])
def test_judges_of_a_chat_model_see_what_those_of_its_published_texts_see(asked, tiny_model_dir, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(tiny_model_dir, chat)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<bot>\n"
    (chat / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = [{"prompt": asked(question(i)), "label": answer(i)} for i in range(3)]
    args = ["--data", write_rows(tmp_path / "d.jsonl", rows), "--engine", "hf", "--device", "cpu"]
    args += ["--max-new-tokens", 4, "--set", "data.chat_template=true"]
    texts = tmp_path / "texts.jsonl"
    code, _, err = call("sample", "--model", chat, *args, "--out", texts)
    assert code == 0, err
    assert [r["prompt"] for r in rows_of(texts)] == [question(i) + " Assistant:" for i in range(3)]
    found, _ = evaluated(tmp_path / "e", chat, "--against", texts, *args, "--judge", "toy_annotator:cues")
    assert [side["judges"]["cues"]["score"]["mean"] for side in found["contestants"]] == [1.0, 1.0]
    assert all(r["prompt"].startswith("<user>") for r in rows_of(tmp_path / "e" / "rows.jsonl"))


@pytest.fixture
def published(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": question(i), "label": answer(i)} for i in range(3)])
    (tmp_path / "o.txt").write_text("One\u2028line\nTwo words here\n\n", encoding="utf-8")
    return data, tmp_path / "o.txt"


def test_a_text_file_lines_up_by_its_lines(published, tmp_path):
    data, outputs = published
    found, text = evaluated(tmp_path / "e", "--outputs", outputs, "--data", data, "--judge", "toy_annotator:letters")
    (side,) = found["contestants"]
    assert (found["num_prompts"], side["mean_words"], side["unique"]) == (3, (2 + 3 + 0) / 3, 1.0)
    assert "mean_tokens" not in side
    assert "3 prompts, [95% interval]" in text
    assert [r["output"] for r in rows_of(tmp_path / "e" / "rows.jsonl")] == ["One\u2028line", "Two words here", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo\n", r"o.txt: 2 outputs, but .*d.jsonl has 3 rows; they must line up"),
        ("1\n2\n3\n4", r"o.txt: 4 outputs, but .*d.jsonl has 3 rows; they must line up"),
    ],
)
def test_outputs_that_do_not_line_up(published, tmp_path, text, message):
    data, outputs = published
    outputs.write_text(text, encoding="utf-8")
    code, _, err = call("eval", "--outputs", outputs, "--data", data, "--judge", "toy_annotator:letters")
    assert code == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


def test_outputs_as_rows(tmp_path):
    path = write_rows(tmp_path / "o.jsonl", [{"completion": "a\nb"}, {"output": None}])
    assert read_outputs(str(path), 2, "d") == ["a\nb", None]
    with pytest.raises(ValueError, match="row 1 has no text in completion or output"):
        read_outputs(str(write_rows(tmp_path / "p.jsonl", [{"text": "a"}])), 1, "d")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a model or run, or --outputs FILE, and not both"),
        (["there", "--outputs", "here"], "name a model or run, or --outputs FILE, and not both"),
        (["--outputs", "here.txt"], "--outputs here.txt: no such file"),
        (["nosuch"], "model.path = nosuch: cannot be loaded as a model"),
        (["MODEL"], "eval.judges: no judge; name one with --judge"),
        (["DATA_FOLDER", "--judge", "toy_annotator:letters"], "not a model folder (no config.json)"),
        (["MODEL", "--judge", "toy_annotator:letters", "--set", "eval.prompst=3"], "did you mean eval.prompts?"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_bad_input(args, message, tiny_model_dir, tiny_data, tmp_path):
    known = {"MODEL": str(tiny_model_dir), "DATA_FOLDER": str(tiny_data.train.parent)}
    args = [known.get(a, a) for a in args]
    code, _, err = call("eval", *args, *(["--data", tiny_data.eval] if args else []), "--out", tmp_path / "e")
    assert code == 2
    assert message in err
    assert len(err.strip().split("\n")) == 1 or "error: " in err


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_decoded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, _, err = call("eval", run, "--out", tmp_path / "e")
    assert (code, err) == (2, f"error: {tmp_path / 'e' / 'eval.json'}: Permission denied\n")


def test_a_run_without_checkpoint(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=lambda folder, names: [n for n in names if n.startswith("checkpoint-")])
    code, _, err = call("eval", copy)
    assert code == 2
    assert "copy: no complete checkpoint there" in err


def contestant(*texts, labels=None):
    prompts = {i: Prompt(i, "Q", (1,), label=(labels or {}).get(i)) for i in range(len(texts))}
    outputs = {i: Completion(i, 0, (1, 2), f" {text}", False, 0, 0) for i, text in enumerate(texts)}
    return Contestant("c", prompts, outputs, sampled=True)


def test_shape_by_hand():
    found = shape(contestant("a b a b", "a b", "a b"), [0, 1, 2])
    assert (found["mean_words"], found["mean_characters"]) == (8 / 3, 13 / 3)
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (2 / 8, 2 / 5, 2 / 2)
    assert (found["unique"], found["mean_tokens"]) == (2 / 3, 2.0)


def test_head_to_head_by_hand():
    sides = [contestant("aa", "a", "a", "a"), contestant("a", "aa", "a", "a")]
    judged = [Judged([(1.0, 0.5), (0.0, 0.5), (2.0, None), (3.0, 1.0)]), Judged([(0.0, 0.5)] * 4)]
    found = head_to_head([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (None, 1.0)], judged, sides, [0, 1, 2, 3])
    assert [found[k] for k in ("wins", "ties", "losses", "unjudged")] == [1, 1, 1, 1]
    assert found["win_rate"]["mean"] == 0.5
    assert found["win_rate_difference"]["mean"] == pytest.approx(2 / 3)


def test_evals_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": question(0), "label": answer(0)}])
    (tmp_path / "outputs.txt").write_text("yes\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    folders = []
    for process in (7, 8):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        args = ["--outputs", "outputs.txt", "--data", "rows.jsonl", "--judge", "toy_annotator:cues"]
        code, text, err = call("eval", *args)
        assert code == 0, err
        folders.append(text.splitlines()[-1])
    assert folders == ["evals/20260101-000000-7", "evals/20260101-000000-8"]
