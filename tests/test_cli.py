"""The command line as a user runs it; what needs no process of its own is called in this one."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import peft
import pytest
import torch
from relative import relative_error
from safetensors import safe_open
from tiny_world import question, run_cli, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bpo_fast import machine
from bpo_fast.cli import app
from bpo_fast.config import KNOBS, load
from bpo_fast.pairs import read_pairs

COMMANDS = ("train", "knobs", "doctor", "sweep", "report", "export", "sample", "sft", "reward", "eval", "bench")


def call(*args):
    """A command in this process: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_args):
    """A run made by the real command: (its process, its folder)."""
    folder = tmp_path_factory.mktemp("cli")
    done = run_cli([*tiny_args, "--out", "runs/first"], folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "runs" / "first"


def test_a_process_of_the_command_keeps_less_code_unless_told_otherwise():
    code = """import atexit, os, sys
atexit.register(lambda: print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]))
sys.argv = ["bpo-fast", "--help"]
from bpo_fast.cli import main
assert "torch" not in sys.modules, "what reads these numbers is imported later"
main()"""
    own = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")}
    for told, kept in (({}, "128 128"), ({"LRU_CACHE_CAPACITY": "7"}, "128 7")):
        done = subprocess.run([sys.executable, "-c", code], env=own | told, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == kept


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def files_below(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*")}


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom bpo_fast.cli import app\n"
        "for c in sys.argv[1:]:\n    app(c.split() + ['--help'], standalone_mode=False)\n"
        "print('loaded:', [m for m in ('torch', 'transformers', 'numpy', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    for command in COMMANDS:
        assert re.search(rf"Usage: .*{command}", done.stdout)


def test_help_names_every_daily_flag():
    flags = (
        "--task --model --data --eval-data --annotator --judge --loss --ref --phases --pairs --members --lora-r --full "
        "--lr --beta --batch-pairs --max-prompt-tokens --max-new-tokens --seed --engine --device --out --config --set "
        "--resume --from-pairs --dry-run --report-to"
    )
    code, text, _ = call("train", "--help")
    assert code == 0
    assert [f for f in flags.split() if not re.search(rf"(?<![\w-]){f}\b", text)] == []


def test_help_names_choices_and_defaults():
    text = re.sub(r"[\s│]+", "", call("train", "--help")[1])
    assert "losstemperature(default:0.1)" in text
    assert "[dpo|ipo|slic]" in text
    assert "[behavior|initial|ema|golden]" in text


def test_answers_are_shown_on_a_terminal_of_another_encoding():
    code = (
        "import sys; from bpo_fast import cli; cli.app = lambda **_: print('caf\\xe9 \\u2019'); cli.main();"
        "print(sys.stdout.encoding)"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["caf\\xe9 \\u2019", "ascii"]


def test_the_version_is_that_of_the_package():
    assert call("--version") == (0, f"bpo-fast {metadata.version('bpo-fast')}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--version", "--help", "knobs"])
def test_standard_output_that_takes_not_all_is_one_line(command, unbuffered, tmp_path):
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "bpo_fast", command],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4)),
        )
    assert (done.returncode, done.stderr) == (2, "error: standard output: File too large\n")


def test_standard_output_that_nobody_reads_is_no_error_to_speak_of():
    reads, writes = os.pipe()
    os.close(reads)
    command, env = [sys.executable, "-m", "bpo_fast", "--version"], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=env, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(("arguments", "code"), [(("knobs",), 0), (("report", "nowhere"), 2)])
def test_a_closed_standard_output_changes_no_exit_code(arguments, code):
    command = [sys.executable, "-m", "bpo_fast", *arguments]
    done = subprocess.run(command, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr.count("\n") == (0 if code == 0 else 1)


def test_a_command_that_failed_keeps_its_code_where_its_output_fails_too(tmp_path):
    code = "import sys; from bpo_fast.cli_errors import names_output\n"
    code += "with names_output():\n    print('some text'); sys.exit(130)"
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONUNBUFFERED": ""},
            stdout=out,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4)),
        )
    assert (done.returncode, done.stderr) == (130, b"")


def test_no_arguments_show_the_help():
    code, out, err = call()
    assert code == 2
    assert "train" in out + err


def test_knobs_lists_every_knob_with_its_default():
    code, text, _ = call("knobs")
    assert code == 0
    shown = dict(line.split(" = ", 1) for line in text.splitlines() if not line.startswith(" "))
    assert set(shown) == set(KNOBS)
    assert shown["method.beta"] == "0.1"
    assert "[dpo|ipo|slic]" in text


def test_doctor_says_what_there_is():
    code, text, _ = call("doctor")
    assert code == 0
    assert torch.__version__.partition("+")[0] in text


@pytest.mark.parametrize(
    ("words", "expected"), [("bpo-fast tr", "train"), ("bpo-fast train --max-n", "--max-new-tokens")]
)
def test_completion_of_the_shell(words, expected, tmp_path):
    env = {"_BPO_FAST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert run_cli([], tmp_path, env).stdout.split() == [expected]


def test_the_completion_script_is_shown(tmp_path):
    python, env = sys.executable, os.environ | {"SHELL": "/bin/bash"}
    done = subprocess.run(
        ["bash", "-c", f"{python} -m bpo_fast --show-completion; exit $?"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "_BPO_FAST_COMPLETE=complete_bash" in done.stdout


def test_train_writes_every_file_of_the_run_folder(trained):
    _, run = trained
    assert [p.name for p in sorted(run.iterdir())] == [
        "checkpoint-3",
        "checkpoint-6",
        "config.toml",
        "env.json",
        "eval.jsonl",
        "metrics.jsonl",
        "pairs",
        "report.html",
        "summary.json",
    ]
    assert [p.name for p in sorted((run / "pairs").iterdir())] == ["phase-00.jsonl", "phase-01.jsonl"]
    for checkpoint in (run / "checkpoint-3", run / "checkpoint-6"):
        assert {
            "COMPLETE",
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.safetensors",
            "tokenizer.json",
            "trainer_state.json",
        } <= {p.name for p in checkpoint.iterdir()}
    assert not list(run.rglob("*.tmp"))


def test_train_talks_on_stderr_and_ends_with_the_table_on_stdout(trained):
    done, _ = trained
    for words in (
        "win rate, letters",
        "mean score, letters",
        "KL to the start",
        "distinct-2",
        "report: runs/first/report.html",
    ):
        assert words in done.stdout
    assert done.stdout.count("Assistant:") >= 3, "completions that a person can read"
    assert "phase 2" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Warning" not in done.stderr


def test_the_resolved_settings_are_written(trained, tiny_model_dir):
    _, run = trained
    tree = tomllib.loads((run / "config.toml").read_text())
    assert tree["task"] == "helpfulness"
    assert tree["model"]["path"] == str(tiny_model_dir)
    assert tree["model"]["lora_r"] == 4
    assert "lora_alpha" not in tree["model"], "it follows the rank"
    assert tree["data"]["max_prompt_length"] == 64
    assert tree["method"]["pairs"] == 24
    assert tree["run"]["output_dir"] == "runs/first"
    assert load(run / "config.toml").optim.learning_rate == 1e-3
    env = json.loads((run / "env.json").read_text())
    assert "--annotator toy_annotator:letters" in env["command"]


def test_every_prompt_is_sampled_once_and_every_pair_is_stored(trained):
    _, run = trained
    phases = [read_pairs(run / "pairs" / f"phase-0{f}.jsonl") for f in range(2)]
    ids = [p.prompt.id for phase in phases for p in phase.pairs]
    assert len(ids) == len(set(ids)) == 24
    for phase, version in zip(phases, (0, 3), strict=True):
        assert phase.policy_version == version
        assert phase.scored
        for pair in phase.pairs:
            assert pair.chosen_score > pair.rejected_score
            assert pair.chosen.policy_version == pair.rejected.policy_version == version
            assert {pair.chosen.sample_id, pair.rejected.sample_id} == {0, 1}
            assert pair.ref_logps is not None


def test_what_was_not_measured_is_not_reported(tiny_args, tmp_path):
    code, out, _ = call(*tiny_args, "--pairs", "8", "--set", "eval.kl_prompts=0", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (code, summary["before"]["kl"], summary["after"]["kl"]) == (0, None, None)
    assert "KL to the start" not in out


def test_the_metrics_and_the_summary_agree(trained):
    _, run = trained
    lines, summary = lines_of(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert [(m["kind"], m["step"]) for m in lines] == [
        ("eval", 0),
        *[("step", s) for s in (1, 2, 3)],
        ("phase", 3),
        *[("step", s) for s in (4, 5, 6)],
        ("phase", 6),
        ("eval", 6),
    ]
    rows = lines_of(run / "eval.jsonl")
    assert [(r["when"], r["step"]) for r in rows] == [("before", 0)] * 6 + [("after", 6)] * 6
    for when, line in (("before", lines[0]), ("after", lines[-1])):
        mine = [r for r in rows if r["when"] == when]
        wins = sum(r["scores"]["letters"] > r["label_scores"]["letters"] for r in mine) / 6
        assert summary[when]["win_rate"]["letters"] == line["eval/win_rate/letters"] == wins
        assert summary[when]["score"]["letters"] == pytest.approx(sum(r["scores"]["letters"] for r in mine) / 6)
        assert summary[f"win_rate_{when}"] == wins
    assert summary["judge"] == "letters"
    assert summary["pairs"]["kept"] == 24
    assert summary["steps"] == 6


def test_the_summary_says_what_a_run_was_and_what_it_gave(trained):
    summary = json.loads((trained[1] / "summary.json").read_text())
    names = {"task", "method", "pairs", "steps", "win_rate_before", "win_rate_after", "judge", "seconds"}
    assert names | {"tokens_per_s", "peak_memory_gib"} <= summary.keys()
    assert {"ref", "loss", "phases"} <= summary["method"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="peaks are those of the GPU")
def test_the_peak_of_a_phase_begins_with_it(tiny_args, tmp_path, without_drawings):
    held = bytearray(2**29)  # what was held and freed before counts for the run, not for its phases
    del held
    before_gib = machine.peak_memory_gib()
    assert call(*tiny_args, "--out", tmp_path / "run")[0] == 0
    phases = [line for line in lines_of(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "phase"]
    assert len(phases) == 2
    assert all(line["perf/peak_memory_gib"] < before_gib - 0.25 for line in phases)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_gib"] >= before_gib


def test_every_step_says_how_much_it_computed(trained):
    steps = [line for line in lines_of(trained[1] / "metrics.jsonl") if line["kind"] == "step"]
    assert all(line["perf/tflops"] > 0 for line in steps)
    assert not any("perf/mfu" in line for line in steps) or torch.cuda.is_available()


def test_report_is_written_anew(trained):
    _, run = trained
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    code, out, _ = call("report", run)
    assert (code, out.strip()) == (0, str(run / "report.html"))
    assert (run / "report.html").read_bytes() == before


def test_an_exported_model_is_that_of_peft_and_loads_alone(trained, tmp_path, tiny_model_dir):
    _, run = trained
    code, out, _ = call("export", run, "--out", tmp_path / "merged")
    assert (code, out.strip()) == (0, str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(base.state_dict()) - {"lm_head.weight"} | (set(file.keys()) & {"lm_head.weight"})
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(question(3), return_tensors="pt").input_ids
    plain = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, run / "checkpoint-6")
    assert relative_error(merged(ids).logits, adapted(ids).logits) < 1e-5
    assert relative_error(merged(ids).logits, plain) > 1e-3, "training changed the model"


def test_one_checkpoint_is_exported_by_its_folder(trained, tmp_path, monkeypatch):
    _, run = trained
    monkeypatch.chdir(run / "checkpoint-3")
    assert call("export", ".", "--out", tmp_path / "here")[0] == 0
    assert call("export", run / "checkpoint-3", "--out", tmp_path / "third")[0] == 0
    assert call("export", run / "checkpoint-6", "--out", tmp_path / "sixth")[0] == 0
    third, sixth = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).model.layers[0].mlp.up_proj.weight
        for n in ("third", "sixth")
    )
    assert not torch.equal(third, sixth)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("{run}", "{run}", "--out {run}: exists already"),
        ("{run}/checkpoint-4", "new", "checkpoint-4: no complete checkpoint there"),
        ("{run}/pairs", "new", "{run}/pairs: no run there (no config.toml)"),
    ],
)
def test_bad_exports_are_named(source, out, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"run": str(trained[1])}
    code, _, err = call("export", source.format(**names), "--out", out.format(**names))
    assert code == 2
    assert message.format(**names) in err
    assert err.startswith("error: ")
    assert files_below(tmp_path) == set()


def test_answers_judged_before_a_kill_are_counted_as_done(trained, tmp_path, without_drawings):
    run = tmp_path / "run"
    shutil.copytree(trained[1], run, ignore=shutil.ignore_patterns("checkpoint-*", "summary.json", "pairs"))
    rows = [row for row in lines_of(run / "eval.jsonl") if row["when"] == "before"]
    code, _, err = call("train", "--resume", run, "--set", f"run.output_dir={run}")
    assert code == 0, err
    assert f"evaluation before: {len(rows)}/{len(rows)}" in err
    assert "evaluation before: 0/" not in err


def test_a_finished_run_is_not_run_again(trained):
    _, run = trained
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    code, _, err = call("train", "--resume", run)
    assert code == 0
    assert "this run has finished" in err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("flag", "value", "message", "loads"),
    [
        ("--beta", "0.3", "method.beta = 0.3: the run to resume has 0.1", False),
        ("--engine", "vllm", "sampling.engine = vllm: the run to resume has hf", False),
        ("--pairs", "12", "method.pairs = 12: the run to resume has 24", True),  # as many as there are data
    ],
)
def test_settings_of_a_resumed_run_must_be_its_own(flag, value, message, loads, trained, monkeypatch):
    if not loads:
        monkeypatch.setattr("bpo_fast.setup.load_learner", None)
    code, _, err = call("train", "--resume", trained[1], flag, value)
    assert code == 2
    assert err.splitlines()[-1] == f"error: {message}"


def test_a_resumed_run_stays_in_its_folder(trained):
    code, _, err = call("train", "--resume", trained[1], "--out", "elsewhere")
    assert code == 2
    assert f"error: run.output_dir = elsewhere: --resume {trained[1]} goes on in the folder of the run" in err
    assert call("train", "--resume", trained[1], "--out", trained[1])[0] == 0


def test_an_annotator_that_judges_itself_is_said_to(tiny_args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*tiny_args, "--dry-run")
    assert code == 0
    assert "judge: the annotator itself" in err
    code, _, err = call(*tiny_args, "--judge", "toy_annotator:same", "--dry-run")
    assert code == 0
    assert "judge: the annotator itself" not in err


def test_a_dry_run_writes_nothing(tiny_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*tiny_args, "--out", "new", "--dry-run")
    assert code == 0
    assert "24 pairs, 6 steps, 2 phases" in err
    assert "evaluation data: 16 prompts of 16 rows" in err
    assert files_below(tmp_path) == set()


def test_training_data_alone_is_not_evaluated_on_other_data(tiny_args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    at = tiny_args.index("--eval-data")
    code, _, err = call(*tiny_args[:at], *tiny_args[at + 2 :], "--dry-run")
    assert code == 0
    assert "evaluation: no held-out data (--eval-data)" in err


def test_recorded_pairs_are_replayed(trained, tiny_args, tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*tiny_args, "--out", "again", "--from-pairs", trained[1], "--phases", "1")
    assert code == 0, err
    assert "sampling: 0/" not in err
    first = [p for f in range(2) for p in read_pairs(trained[1] / "pairs" / f"phase-0{f}.jsonl").pairs]
    again = read_pairs(tmp_path / "again" / "pairs" / "phase-00.jsonl")
    assert [(p.prompt, p.chosen, p.rejected) for p in again.pairs] == [(p.prompt, p.chosen, p.rejected) for p in first]
    steps = [m for m in lines_of(tmp_path / "again" / "metrics.jsonl") if m["kind"] == "step"]
    firsts = [m for m in lines_of(trained[1] / "metrics.jsonl") if m["kind"] == "step"]
    assert [m["loss"] for m in steps[:3]] == [m["loss"] for m in firsts[:3]], "the first phase is the same offline"
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["pairs"]["kept"] == 24


def test_preference_rows_are_trained_on_without_an_annotator(tiny_model_dir, tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": question(i), "chosen": f"Do {i}.", "rejected": "No idea."} for i in range(12)]
    args = [
        "train",
        "--model",
        tiny_model_dir,
        "--from-pairs",
        write_rows(tmp_path / "prefs.jsonl", rows),
        "--out",
        "run",
    ]
    code, _, err = call(*args, "--batch-pairs", "4", "--lora-r", "2", "--phases", "1", "--max-new-tokens", "24")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["pairs"]["kept"], summary["before"]) == (3, 12, {})
    assert [summary[key] for key in ("judge", "win_rate_before", "win_rate_after")] == [None] * 3


def test_pairs_of_a_larger_vocabulary_are_named(trained, tiny_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "phase-00.jsonl"
    shutil.copy(trained[1] / "pairs" / "phase-00.jsonl", path)
    header, first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    row["rejected"]["ids"][0] = 320
    path.write_text("\n".join([header, json.dumps(row), *rest]) + "\n")
    code, _, err = call(*tiny_args, "--out", "new", "--from-pairs", path)
    assert code == 2
    assert f"token id 320 of prompt {row['prompt']['id']}: the model has 320 rows" in err
    assert not (tmp_path / "new").exists()


def test_recorded_pairs_that_cannot_be_trained_on(trained, tiny_args, tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "phase-00.jsonl"
    header, first, *rest = (trained[1] / "pairs" / "phase-00.jsonl").read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([header, json.dumps(row | {"chosen": row["chosen"] | {"ids": []}}), *rest]) + "\n")
    code, _, err = call(*tiny_args, "--out", "new", "--from-pairs", path, "--dry-run")
    assert code == 0, err
    assert f"recorded pairs: {len(rest)} kept" in err
    assert ", 1 empty" in err
    long = row["chosen"] | {"ids": [5] * 9000}
    path.write_text("\n".join([header, json.dumps(row | {"chosen": long}), *rest]) + "\n")
    code, _, err = call(*tiny_args, "--out", "new", "--from-pairs", path, "--phases", "1")
    assert code == 0, err
    assert f"recorded pairs: {len(rest)} kept" in err
    assert ", 1 too long" in err
    counts = json.loads((tmp_path / "new" / "summary.json").read_text())["pairs"]
    assert (counts["kept"], counts["too_long"]) == (len(rest), 1)


def test_a_config_file_is_weaker_than_set_and_set_than_flags(tiny_args, tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[method]\nbeta = 0.5\nphases = 3\n[run]\nseed = 7\n")
    files = ("--config", "run.toml", "--set", "run.seed=8", "--set", "method.pairs=4", "--set", "eval.prompts=0")
    code, _, err = call(*tiny_args, *files, "--phases", "2", "--pairs", "8", "--out", "new")
    assert code == 0, err
    config = load(tmp_path / "new" / "config.toml")
    assert (config.method.beta, config.method.phases, config.run.seed, config.method.pairs) == (0.5, 2, 8, 8)


def test_sample_writes_a_row_a_completion(tiny_model_dir, tiny_data, tmp_path):
    args = (
        "--model",
        tiny_model_dir,
        "--data",
        f"{tiny_data.eval}[:4]",
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
        "--engine",
        "hf",
    )
    code, out, _ = call("sample", *args, "--n", "3", "--out", tmp_path / "s.jsonl")
    assert (code, out.strip()) == (0, str(tmp_path / "s.jsonl"))
    rows = lines_of(tmp_path / "s.jsonl")
    assert [r["prompt"] for r in rows] == [question(i) + " Assistant:" for i in range(64, 68) for _ in range(3)]
    assert len({r["completion"] for r in rows}) > 4
    code, _, err = call("sample", *args, "--out", tmp_path / "s.jsonl")
    assert (code, err, lines_of(tmp_path / "s.jsonl")) == (
        2,
        f"error: --out {tmp_path / 's.jsonl'}: already there\n",
        rows,
    )
    code, _, err = call("sample", *args, "--out", tmp_path / "s.jsonl" / "t.jsonl")
    assert (code, err) == (2, f"error: {tmp_path / 's.jsonl' / 't.jsonl'}: Not a directory\n"), "before any sampling"
    call("sample", *args, "--temperature", "0", "--out", tmp_path / "greedy.jsonl")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for row in lines_of(tmp_path / "greedy.jsonl"):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        own = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(own, skip_special_tokens=True).strip()
