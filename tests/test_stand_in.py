"""What runs on a GPU, on one made of host memory (tests/stand_in): no speed, but every branch and every device.

With BPO_FAST_REQUIRE_STAND_IN a machine on which it cannot run is an error.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bpo_fast.attention import has_native

HERE = Path(__file__).parent / "stand_in"
BPO_FAST = [sys.executable, "-W", "ignore", "-m", "bpo_fast"]

REASONS = {
    "PyTorch has GPU kernels of its own": torch.version.cuda or torch.version.hip,
    "needs triton": importlib.util.find_spec("triton") is None,
    "needs a C++ compiler": not has_native(),
}
MISSING = ", ".join(reason for reason, missing in REASONS.items() if missing)
if MISSING and os.environ.get("BPO_FAST_REQUIRE_STAND_IN"):
    pytest.fail(f"the stand-in is required: {MISSING}", pytrace=False)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


@pytest.fixture
def run(monkeypatch):
    """Runs a command with the stand-in and returns what it says."""
    monkeypatch.syspath_prepend(HERE)
    from stand_in import environment

    def run(command):
        env = environment() | {"OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] += f":{HERE.parent}"  # toy_annotator
        done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    return run


def test_parts_of_a_run(run):
    said = run([sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", HERE / "on_gpu.py"])
    assert "[100%]" in said


@pytest.mark.parametrize(
    "form",
    [
        ["--ref-logps", "sampler"],
        ["--full", "--set", "optim.states=8bit", "--set", "model.activation_checkpointing=full", "--ref", "ema"],
        ["--full", "--set", "optim.offload=true", "--loss", "slic", "--set", "optim.microbatch_tokens=100"],
        ["--members", "3", "--set", "sampling.members=single", "--set", "sampling.top_p=0.9", "--loss", "ipo"],
    ],
    ids=["lora", "8bit", "offload", "members"],
)
def test_train(run, tiny_args, tmp_path, form):
    out = tmp_path / "run"
    said = run([*BPO_FAST, *tiny_args, "--device", "cuda", "--set", "model.dtype=bfloat16", *form, "--out", out])
    assert "prompts are not shared" not in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))


def test_two_devices_end_as_one(run, tiny_args, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    outs = [tmp_path / f"run-{num}" for num in (1, 2)]
    for num, out in enumerate(outs, 1):
        form = ("--devices", str(num), "--members", "2", "--set", "model.dtype=float32")
        run([*BPO_FAST, *tiny_args, "--device", "cuda", *form, "--out", out])
    one, two = (load_file(out / "checkpoint-6" / "adapter_model.safetensors") for out in outs)
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm(), name


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, tiny_args, tmp_path):
    out = tmp_path / "run"
    run([*BPO_FAST, *tiny_args, "--device", "cuda", "--members", "2", "--ref", "ema", "--out", out])
    (out / "checkpoint-6").rename(tmp_path / "whole")
    (out / "summary.json").unlink()
    run([*BPO_FAST, "train", "--resume", out])
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (out / "checkpoint-6" / path.name).read_bytes(), path.name


def test_models_are_trained_judged_and_written(run, tiny_model_dir, tiny_data, tmp_path):
    rows = [json.loads(line) for line in tiny_data.train.read_text().splitlines()]
    pairs = tmp_path / "pairs.jsonl"
    better = [{"prompt": r["prompt"], "chosen": r["label"], "rejected": r["label"][::-1]} for r in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in better))
    device = ("--device", "cuda")
    run([*BPO_FAST, "reward", "--model", tiny_model_dir, "--data", pairs, "--out", tmp_path / "rm", *device])
    run([*BPO_FAST, "sft", "--model", tiny_model_dir, "--data", tiny_data.train, "--out", tmp_path / "sft", *device])
    given = ("--data", tiny_data.eval, "--engine", "hf", "--max-new-tokens", "8", *device)
    said = run([*BPO_FAST, "eval", tmp_path / "sft", "--judge", tmp_path / "rm", "--out", tmp_path / "eval", *given])
    assert "win rate" in said
    run([*BPO_FAST, "sample", "--model", tmp_path / "sft", "--n", "2", "--out", tmp_path / "said.jsonl", *given])
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2 * 16


def test_benches(run, tmp_path):
    shape = ("--shapes", "16x64x300", "--peers", "none", "--quick")
    run(
        [*BPO_FAST, "bench", "kernels", "--op", "step", "--head", "frozen", *shape, "--json", tmp_path / "kernels.json"]
    )
    problems = json.loads((tmp_path / "kernels.json").read_text())["problems"]
    rows = problems[0]["implementations"]
    assert all("seconds" in rows[name] for name in ("eager", "triton", "triton-gemm", "mm"))
    assert "seconds" in rows["native"] or rows["native"]["unavailable"]
    options = ("--op", "attention", "--op", "norm", "--op", "gate", "--quick", "--peers", "none")
    run([*BPO_FAST, "bench", "kernels", *options, "--json", tmp_path / "trunk.json"])
    attention, *trunk = json.loads((tmp_path / "trunk.json").read_text())["problems"]
    assert attention["label"] == "attention 24/9 heads=2 P=8 bfloat16"
    assert all("seconds" in attention["implementations"][name] for name in ("eager", "varlen", "masked"))
    assert [problem["label"] for problem in trunk] == ["norm R=33 H=48 bfloat16", "gate R=33 H=48 bfloat16"]
    assert all("seconds" in problem["implementations"][name] for problem in trunk for name in ("eager", "triton"))
    shape = ("--shape", "32x1x300", "--pairs", "2", "--rounds", "1", "--peers", "none", "--lengths", "helpfulness")
    for bench, more in (("step", ()), ("loop", ("--steps", "1"))):
        out = tmp_path / f"{bench}.json"
        run([*BPO_FAST, "bench", bench, "--device", "cuda", "--form", "lora", *shape, *more, "--json", out])
        assert all(row["ours"]["pairs_per_s"] > 0 for row in json.loads(out.read_text())["rows"])


def test_doctor(run):
    said = run([*BPO_FAST, "doctor"])
    assert "Stand-in, 16 GiB, sm_90" in said
    assert "variable-length kernel of torch" in said
