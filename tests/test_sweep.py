"""Sweeps as a user runs them, with real worker processes on the tiny model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Forked, fork_processes_of
from tiny_world import run_cli

from bpo_fast import sweep
from bpo_fast.config import Config, replace, to_toml, with_full_paths
from bpo_fast.files import take_lock
from bpo_fast.grid import RunSpec
from bpo_fast.progress import Progress
from bpo_fast.sweep import Sweep, read_results, row_words
from bpo_fast.tasks import resolve

SPEC = RunSpec("a", "helpfulness", "dpo", "bpo", 2, 1, 42, values={"method.beta": 0.1})


@pytest.fixture(scope="module", autouse=True)
def _forks():
    """Sweeps and their workers begin as forks, but for those of `test_an_interrupted_sweep_goes_on`: see forks.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fork_processes_of("bpo_fast.sweep", monkeypatch)
        yield


def run_sweep(args, folder):
    return run_cli(["sweep", *args], folder, popen=Forked)


@pytest.fixture(scope="module")
def settings(tiny_model_dir, tiny_data):
    """[set] of a grid whose runs take a second or two."""
    knobs = {
        "model.path": str(tiny_model_dir),
        "model.lora_r": 4,
        "data.path": str(tiny_data.train),
        "data.eval_path": str(tiny_data.eval),
        "annotator.path": "toy_annotator:letters",
        "method.pairs": 24,
        "method.batch_pairs": 4,
        "sampling.max_new_tokens": 8,
        "sampling.engine": "hf",
        "optim.learning_rate": 1e-3,
        "eval.prompts": 6,
        "eval.kl_prompts": 4,
        "run.device": "cpu",
    }
    return "[set]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in knobs.items())


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """A sweep in which two of six runs fail: (folder, its process)."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = (
        settings
        + '[[grid]]\nF = [1, 2]\n[[grid]]\nname = "again"\n'
        + '[[grid]]\nannotator.path = ["toy_annotator:killed", "toy_annotator:raising"]\n'
        + '[[grid]]\nmethod = "golden"\nset.method.golden = "run:helpfulness-dpo-bpo-F2-M1-s42"\n'
    )
    (folder / "g.toml").write_text(grid, encoding="utf-8")
    return folder, run_sweep(["g.toml", "--jobs", "2"], folder)


def test_a_failing_run_is_recorded_and_the_rest_goes_on(swept):
    folder, done = swept
    assert done.returncode == 1, done.stderr
    assert "error: 2 of 6 runs failed; the same command tries them again" in done.stderr
    rows = {r["run"].removeprefix("helpfulness-"): r for r in read_results(folder / "sweeps" / "g" / "results.jsonl")}
    assert {name: r["status"] for name, r in rows.items()} == {
        "dpo-offline-F1-M1-s42": "finished",
        "dpo-bpo-F2-M1-s42": "finished",
        "again-helpfulness-dpo-bpo-F2-M1-s42": "finished",
        "dpo-bpo-F2-M1-s42-path=toy_annotator_killed": "failed",
        "dpo-bpo-F2-M1-s42-path=toy_annotator_raising": "failed",
        "dpo-golden-F2-M1-s42": "finished",
    }
    assert rows["dpo-bpo-F2-M1-s42-path=toy_annotator_killed"]["error"].startswith("the process ended with SIGKILL")
    raised = rows["dpo-bpo-F2-M1-s42-path=toy_annotator_raising"]
    assert raised["error"].startswith("annotator raising: KeyError: 'score of the reward service'")
    assert raised["extra"] == {"annotator.path": "toy_annotator:raising"}
    finished = rows["dpo-bpo-F2-M1-s42"]
    assert (finished["F"], finished["seed"], finished["steps"], finished["error"]) == (2, 42, 6, None)
    assert finished["after"]["win_rate"].keys() == {"letters"}


def test_a_run_is_the_same_after_another_one_in_its_process(swept):
    runs = swept[0] / "sweeps" / "g" / "runs"
    first, again = (runs / f"{n}helpfulness-dpo-bpo-F2-M1-s42" / "eval.jsonl" for n in ("", "again-"))
    assert first.read_bytes() == again.read_bytes()


def test_finished_runs_are_skipped_and_failed_ones_tried_again(swept):
    folder, _ = swept
    summaries = {p: p.stat().st_mtime_ns for p in (folder / "sweeps" / "g" / "runs").rglob("summary.json")}
    listed = run_sweep(["g.toml", "--dry-run"], folder)
    assert listed.stdout.endswith("6 runs, 2 to do\n")
    assert "helpfulness-dpo-offline-F1-M1-s42: letters " in listed.stdout
    done = run_sweep(["g.toml", "--jobs", "2"], folder)
    assert done.returncode == 1
    assert "sweep: 4/6  4 already done\n" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in summaries} == summaries


def test_other_settings_in_the_same_folder_are_refused(swept):
    folder, _ = swept
    done = run_sweep(["g.toml", "--set", "method.beta=0.7"], folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: method.beta = 0.7: the run in sweeps/g/runs/helpfulness-dpo-offline")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change", [("method.pairs = 24", "method.pairs = 16"), ("method.pairs = 24", "method.pairs = 32")]
)
def test_another_budget_is_another_run(swept, change):
    folder, _ = swept
    (folder / "changed.toml").write_text((folder / "g.toml").read_text().replace(*change), encoding="utf-8")
    done = run_sweep(["changed.toml", "--out", "sweeps/g"], folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {change[1]}: the run in sweeps/g/runs/helpfulness-dpo-offline")


def test_a_setting_that_is_gone_is_a_difference(swept):
    folder, _ = swept
    text = "".join(line for line in (folder / "g.toml").open() if not line.startswith("optim.learning_rate"))
    (folder / "shorter.toml").write_text(text, encoding="utf-8")
    done = run_sweep(["shorter.toml", "--out", "sweeps/g"], folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: optim.learning_rate = 5e-05: the run in sweeps/g/runs/helpfulness-dpo-offl")


def test_a_budget_that_the_data_cut_is_the_same_budget(settings, tmp_path):
    (tmp_path / "g.toml").write_text(settings.replace("method.pairs = 24", "method.pairs = 9999") + "[grid]\n")
    for status in ("1 runs, 1 to do", "1 runs, 0 to do"):
        assert run_sweep(["g.toml", "--dry-run"], tmp_path).stdout.endswith(status + "\n")
        done = run_sweep(["g.toml"], tmp_path)
        assert done.returncode == 0, done.stderr
    [row] = read_results(tmp_path / "sweeps" / "g" / "results.jsonl")
    assert (row["asked_pairs"], row["pairs"]["kept"] <= 64) == (9999, True)


def test_no_run_is_made_against_a_golden_run_that_failed(settings, tmp_path):
    grid = (
        settings.replace(":letters", ":raising")
        + "[[grid]]\n[[grid]]\nmethod = 'golden'\nset.method.golden = 'run:helpfulness-dpo-bpo-F2-M1-s42'\n"
    )
    (tmp_path / "g.toml").write_text(grid)
    done = run_sweep(["g.toml", "--jobs", "2"], tmp_path)
    assert done.returncode == 1
    rows = {r["method"]: r["error"] for r in read_results(tmp_path / "sweeps" / "g" / "results.jsonl")}
    assert rows["golden"] == "it needs helpfulness-dpo-bpo-F2-M1-s42, which failed"
    assert [p.name for p in (tmp_path / "sweeps" / "g" / "runs").iterdir()] == ["helpfulness-dpo-bpo-F2-M1-s42"]


def test_an_interrupted_sweep_goes_on(settings, tmp_path):
    (tmp_path / "g.toml").write_text(
        settings.replace(":letters", ":slow") + "[grid]\nF = ['T']\nseed = [1, 2]\nmethod.pairs = 24\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bpo_fast", "sweep", "g.toml", "--jobs", "1"]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    steps = tmp_path / "sweeps" / "g" / "runs" / "helpfulness-dpo-bpo-FT-M1-s1-pairs=24" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (steps.exists() and '"step"' in steps.read_text()):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "interrupted" in err
    assert read_results(tmp_path / "sweeps" / "g" / "results.jsonl") == []
    done = run_sweep(command[4:], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_results(tmp_path / "sweeps" / "g" / "results.jsonl")
    assert [(r["seed"], r["status"], r["steps"]) for r in rows] == [(1, "finished", 6), (2, "finished", 6)]


def test_a_disk_that_is_full_ends_the_sweep(tmp_path, monkeypatch):
    """The thread that writes results is not the one that is waited for."""
    specs = [dataclasses.replace(SPEC, name=name, needs=needs) for name, needs in (("a", None), ("b", "a"))]
    written, own = [], sweep.write_atomic

    def write(path, text):
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        own(path, text)

    monkeypatch.setattr(sweep, "write_atomic", write)
    monkeypatch.setattr(
        sweep._Worker, "ask", lambda self, request: {"status": "finished", "error": None, "summary": {}}
    )
    with pytest.raises(OSError, match="No space left"):
        Sweep(specs, tmp_path).run(2, Progress(quiet=True))
    assert read_results(tmp_path / "results.jsonl") == []


def test_a_second_sweep_does_not_disturb_the_first(tmp_path):
    busy = f"^{tmp_path}: another command is at work on this sweep$"
    with take_lock(tmp_path / sweep.LOCK_FILE, ""), pytest.raises(ValueError, match=busy):
        Sweep([], tmp_path).run(1, Progress(quiet=True))
    Sweep([], tmp_path).run(1, Progress(quiet=True))


@pytest.mark.parametrize(("says", "said"), [("", ""), ("echo no room >&2; ", ": no room")])
def test_a_worker_that_dies_is_not_given_the_words_of_one_before(says, said, tmp_path, monkeypatch):
    log = tmp_path / "worker-0.log"
    log.write_text("ValueError: of yesterday\n")
    worker = sweep._Worker(log)
    with log.open("a") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", f"read line; {says}kill -9 $$"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    monkeypatch.setattr(worker, "_started", lambda: process)
    assert worker.ask({})["error"] == f"the process ended with SIGKILL{said}"


def test_one_line_of_a_run():
    row = SPEC.place() | {"status": "failed", "error": "no data"}
    assert row_words(row) == "a: FAILED: no data"
    row |= {"status": "finished", "after": {"win_rate": {"rm": 0.5}, "kl": 1.25}, "seconds": {"total": 9.94}}
    assert row_words(row) == "a: rm 50.0%, KL 1.250, 9.9 s"


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", '{"run": "a"}\n'])
def test_what_is_no_results_file(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a results file"):
        read_results(path)


def test_a_sweep_of_nothing_yet(tmp_path):
    found = Sweep([SPEC], tmp_path)
    assert (found.waiting, found.num_failed) == ([SPEC], 0)


def test_a_run_holds_full_paths_and_an_older_one_its_alpha(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    spec = dataclasses.replace(SPEC, values={"data.path": "rows.jsonl[:9]", "model.lora_r": 4})
    run = tmp_path / "runs" / "a" / "config.toml"
    run.parent.mkdir(parents=True)
    config = with_full_paths(resolve(replace(Config(), spec.values)))
    for written in (config, replace(config, {"model.lora_alpha": 8.0})):
        run.write_text(to_toml(written))
        assert Sweep([spec], tmp_path).waiting == [spec]
    run.write_text(to_toml(replace(config, {"model.lora_alpha": 4.0})))
    with pytest.raises(ValueError, match=r"model\.lora_alpha = 8\.0: the run in .* has 4\.0"):
        Sweep([spec], tmp_path)


def test_settings_are_resolved_once_a_run(tmp_path, monkeypatch):
    resolved = []
    monkeypatch.setattr(sweep, "resolve", lambda config: resolved.append(config) or resolve(config))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.toml").write_text(to_toml(resolve(replace(Config(), SPEC.values))))
    (tmp_path / "runs" / "a" / "summary.json").write_text("{}")
    found = Sweep([SPEC], tmp_path)
    assert (found.rows["a"]["status"], found.rows["a"]["asked_pairs"]) == ("finished", 1024)
    assert len(resolved) == 1
