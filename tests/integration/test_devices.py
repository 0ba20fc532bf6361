"""Runs on several devices, processes on a CPU: they end as on one, and are interrupted, killed and resumed like it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Forked
from safetensors.torch import load_file
from test_resume import HERE, contents, environment, settings
from tiny_world import rows_of_stages, run_cli, write_rows

from bpo_fast import config as configs
from bpo_fast.checkpoint import complete_checkpoints, save_weights
from bpo_fast.dryrun import dry_run
from bpo_fast.memory import GIB
from bpo_fast.metrics import read_metrics
from bpo_fast.optim import cut
from bpo_fast.progress import Progress
from bpo_fast.reward import train_reward
from bpo_fast.sft import train_sft
from bpo_fast.stage_config import RewardConfig, SftConfig
from bpo_fast.train import train

SHORT = {"method__pairs": 24, "method__phases": 2, "run__save_steps": 0, "eval__eval_steps": 0}


@pytest.fixture(autouse=True)
def _scorers(monkeypatch, forked_ranks, without_drawings):
    monkeypatch.syspath_prepend(HERE)


def sampled(run: Path):
    """Ids and scores of all that was sampled, in its order."""
    rows = [json.loads(line) for p in sorted((run / "pairs").iterdir()) for line in p.read_text().splitlines()[1:]]
    sides = [[row.get(side, {}).get("ids") for side in ("chosen", "rejected")] for row in rows]
    return [(*ids, row.get("chosen_score"), row.get("dropped")) for ids, row in zip(sides, rows, strict=True)]


@pytest.mark.parametrize(
    "knobs",
    [
        {"model__members": 2, "method__ref": "ema", "optim__microbatch_tokens": 200},
        {"model__full": True, "method__batch_pairs": 1, "method__pairs": 6, "method__loss": "slic"},  # empty shares
        {"method__phases": "on-policy", "method__ref_logps": "sampler", "method__loss": "ipo"},
        {"method__phases": 3, "method__sampler": "initial"},
    ],
    ids=["members", "empty shares", "on-policy", "sampled ahead"],
)
def test_two_devices_end_as_one(tiny_model_dir, tiny_data, tmp_path, knobs):
    runs, summaries = [tmp_path / "one", tmp_path / "two"], []
    for num, run in enumerate(runs, 1):
        config = settings(tiny_model_dir, tiny_data, run, **SHORT | knobs, run__devices=num)
        summaries.append(train(config, quiet=True))
    assert sampled(runs[0]) == sampled(runs[1])
    weights = [load_file(next(complete_checkpoints(run)[-1].glob("*model.safetensors"))) for run in runs]
    for name, one in weights[0].items():
        assert (weights[1][name] - one).norm() <= 1e-4 * one.norm(), name  # Adam's first steps make much of rounding
    steps = [[line for line in read_metrics(run) if line["kind"] == "step"] for run in runs]
    for one, two in zip(*steps, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
        assert two["num_tokens"] == one["num_tokens"]
    for key in ("pairs", "steps", "win_rate_after", "num_tokens"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[1]["after"]["kl"] == pytest.approx(summaries[0]["after"]["kl"], rel=0.01, abs=1e-4)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_on_two_devices_ends_as_on_one(tmp_path, stage):
    data, runs = write_rows(tmp_path / "rows.jsonl", rows_of_stages()), [tmp_path / "one", tmp_path / "two"]
    config_class, run_stage = (SftConfig, train_sft) if stage == "sft" else (RewardConfig, train_reward)
    small = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 300, "device": "cpu", "batch_tokens": 200, "epochs": 2}
    results = []
    for num, run in enumerate(runs, 1):
        config = config_class(data=str(data), out=str(run), devices=num, eval_fraction=0.2, **small)
        results.append(run_stage(config, progress=Progress(quiet=True)))
    histories = [(r["members"][0] if stage == "sft" else r)["history"] for r in results]
    for one, two in zip(*histories, strict=True):
        assert one["steps"] == two["steps"] == 3
        for key in ("train_loss", "loss"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    weights = [load_file(run / "model.safetensors") for run in runs]
    for name, one in weights[0].items():
        assert (weights[1][name] - one).norm() <= 1e-3 * one.norm(), name


def test_what_ends_a_stage_ends_all_of_its_processes(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "label": "yes"}) + "\n" for i in range(8)))
    small = ["--hidden", "32", "--layers", "1", "--heads", "2", "--vocab", "300", "--device", "cpu"]
    options = ["--devices", "2", "--epochs", "9", "--learning-rate", "1e30"]
    done = run_cli(["sft", "--data", data, "--out", tmp_path / "out", *small, *options], tmp_path, popen=Forked)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: sft: loss = ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_dry_run_holds_the_moments_of_one_rank(tiny_model_dir, tiny_data, tmp_path):
    predicted = []
    for num in (1, 2):  # with as many pairs a rank
        knobs = SHORT | {"model__full": True, "method__batch_pairs": 2 * num, "run__devices": num}
        predicted.append(dry_run(settings(tiny_model_dir, tiny_data, tmp_path / "none", **knobs), quiet=True))
    sizes = [tensor.numel() for tensor in load_file(tiny_model_dir / "model.safetensors").values()]
    left_to_others = sum(num - cut(num, 2)[1] for num in sizes)
    one, two = (found["predicted_gib"] * GIB for found in predicted)
    assert one - two == pytest.approx(8 * left_to_others)


def test_others_stay_for_the_last_checkpoint(tiny_model_dir, tiny_data, tmp_path, monkeypatch):
    """No evaluation holds them while rank 0 has yet to ask for their moments."""
    knobs = {"method__pairs": 4, "method__phases": 1, "eval__prompts": 0, "run__devices": 2}

    def save_weights_slowly(*given):
        time.sleep(2)
        save_weights(*given)

    monkeypatch.setattr("bpo_fast.checkpoint.save_weights", save_weights_slowly)
    train(settings(tiny_model_dir, tiny_data, tmp_path / "run", **SHORT | knobs), quiet=True)
    assert len(list(complete_checkpoints(tmp_path / "run")[-1].glob("optimizer-*-of-2.safetensors"))) == 2


def start(*options: str, cwd: Path = HERE, popen=Forked) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "bpo_fast", "train", *options]
    return popen(command, env=environment(), cwd=cwd, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen, run: Path, num: int) -> list[int]:
    """Waits until the run has logged so many steps; returns the processes that it has started."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"step",') >= num):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_gone(pids: list[int]) -> None:
    assert pids, "there was a second process"
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_and_killed_and_resumed_it_ends_bit_for_bit(tiny_model_dir, tiny_data, tmp_path, monkeypatch):
    knobs = {"run__devices": 2, "model__members": 2, "model__lora_dropout": 0.1}
    toml = tmp_path / "run.toml"
    toml.write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, "none", **knobs)))
    straight = start("--config", str(toml), "--out", str(tmp_path / "straight"))
    run, temporary = tmp_path / "stopped", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start("--config", str(toml), "--out", str(run))
    others = wait_for_steps(process, run, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_gone(others)  # an orphan ends by itself
    assert not list(temporary.glob("bpo-fast-*"))
    process = start("--resume", str(run))
    others = wait_for_steps(process, run, 4)
    for pid in others:  # which a job's end comes to, too
        os.kill(pid, signal.SIGTERM)
    wait_for_steps(process, run, 6)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "go on with --resume" in stderr
    assert_gone(others)
    last = start("--resume", str(run))
    assert last.wait(120) == 0, last.communicate()
    assert straight.wait(120) == 0, straight.communicate()
    for one, other in zip(contents(tmp_path / "straight"), contents(run), strict=True):
        assert one == other


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("devices", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_devices(tiny_model_dir, tiny_data, tmp_path, devices):
    # moments of 32 bits: between one and two devices, those of 8 make a code of a difference in rounding
    knobs = {"model__full": True, "run__save_steps": 0}
    toml = tmp_path / "run.toml"
    toml.write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, "none", **knobs)))
    straight = start("--config", str(toml), "--out", str(tmp_path / "straight"))
    run = tmp_path / "stopped"
    process = start("--config", str(toml), "--out", str(run), "--devices", str(devices[0]))
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.communicate()
    files = sorted(complete_checkpoints(run)[-1].glob("optimizer*"))
    names = ["optimizer-0-of-2", "optimizer-1-of-2"] if devices[0] == 2 else ["optimizer"]
    assert [file.stem for file in files] == names
    sizes = [sum(t.numel() for t in load_file(file).values()) for file in files]
    assert max(sizes) < 1.3 * sum(sizes) / len(sizes), "each keeps its part"
    last = start("--resume", str(run), "--devices", str(devices[1]))
    assert last.wait(120) == 0, last.communicate()
    assert straight.wait(120) == 0, straight.communicate()
    assert sampled(run) == sampled(tmp_path / "straight")
    one, other = (load_file(complete_checkpoints(r)[-1] / "model.safetensors") for r in (tmp_path / "straight", run))
    for name, weight in one.items():
        assert (other[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize(
    ("annotator", "code", "message"),
    [
        ("fails_beside_rank_0", 2, "error: annotator fails_beside_rank_0: ValueError: no scores here"),
        ("dies_beside_rank_0", 1, "error: rank 1 ended with code 7: the last words"),
    ],
)
def test_what_ends_another_rank_ends_the_run(tiny_model_dir, tiny_data, tmp_path, annotator, code, message):
    knobs = SHORT | {"run__devices": 2, "annotator__path": f"scorers:{annotator}"}
    toml = tmp_path / "run.toml"
    toml.write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, tmp_path / "run", **knobs)))
    process = start("--config", str(toml))
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == code, stderr
    assert stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in stderr
    assert not list((tmp_path / "run").rglob("phase-*"))


def test_moments_that_another_rank_cannot_write_are_one_line(tiny_model_dir, tiny_data, tmp_path):
    knobs = SHORT | {"run__devices": 2, "model__full": True, "annotator__path": "scorers:writes_little_beside_rank_0"}
    toml, run = tmp_path / "run.toml", tmp_path / "run"
    toml.write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, run, **knobs)))
    process = start("--config", str(toml))
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2, stderr
    assert stderr.splitlines()[-1].endswith(f"optimizer-1-of-2.safetensors: {os.strerror(errno.EFBIG)}")
    assert "Traceback" not in stderr
    assert not list(run.glob("*checkpoint*")), "nothing is half-written"
    assert not list(run.glob(".*"))


def test_files_of_the_working_folder_are_not_those_of_a_rank(tiny_model_dir, tiny_data, tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('not the real one')\n")
    toml = tmp_path / "run.toml"
    toml.write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, tmp_path / "run", **SHORT, run__devices=2)))
    process = start("--config", str(toml), cwd=tmp_path, popen=subprocess.Popen)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
