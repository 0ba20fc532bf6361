"""What runs on a GPU, on one made of host memory (tests/stand_in): no speed, but every branch and every device.

With BPO_FAST_REQUIRE_STAND_IN a machine on which it cannot run is an error.
"""

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from prepared import Prepared
from safetensors.torch import load_file

from bpo_fast.attention import has_native

HERE = Path(__file__).parent / "stand_in"

REASONS = {
    "PyTorch has GPU kernels of its own": torch.version.cuda or torch.version.hip,
    "needs triton": importlib.util.find_spec("triton") is None,
    "needs a C++ compiler": not has_native(),
}
MISSING = ", ".join(reason for reason, missing in REASONS.items() if missing)
if MISSING and os.environ.get("BPO_FAST_REQUIRE_STAND_IN"):
    pytest.fail(f"the stand-in is required: {MISSING}", pytrace=False)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


# of what the commands import, and with the programs of on_gpu.py: one takes the interpreter 10 ms, whatever its size
IMPORTS = """
import pytest, bpo_fast.contest, bpo_fast.reward, bpo_fast.sample, bpo_fast.sft, bpo_fast.train
from bpo_fast_kernels import triton_adamw
triton_adamw.SIZES["adamw"]["SIZE"] = triton_adamw.CHUNK = 2**16
"""
FEW = ("--pairs", "8", "--max-new-tokens", "6", "--set", "eval.prompts=2", "--set", "eval.kl_prompts=2")
ON_GPU = ("--device", "cuda", "--set", "model.dtype=bfloat16")


@pytest.fixture(scope="module")
def prepared():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        from stand_in import environment

        env = environment()
        del env["PYTHONPATH"]  # that of `Prepared` has all of sys.path
        patch.syspath_prepend(HERE / "site")
        with Prepared(IMPORTS, env) as process:
            yield process


@pytest.fixture(scope="module")
def run(prepared):
    """Runs a command with the stand-in and returns what it says."""

    def run(*command, **env):
        return _said(prepared.command(*command, env=env))

    return run


def _said(done):
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def test_parts_of_a_run(prepared):
    command = f"-n 0 -p no:cacheprovider {HERE / 'on_gpu.py'}".split()
    assert "[100%]" in _said(prepared.run(f"import pytest; raise SystemExit(int(pytest.main({command})))"))


@pytest.fixture(scope="module")
def members(run, tiny_args, tmp_path_factory):
    """A run of three members."""
    out = tmp_path_factory.mktemp("members") / "run"
    form = ("--members", "3", "--set", "sampling.members=single", "--set", "sampling.top_p=0.9", "--loss", "ipo")
    return out, run(*tiny_args, *FEW, *ON_GPU, *form, "--ref", "ema", "--out", out)


def losses_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "form",
    [
        ["--ref-logps", "sampler"],
        ["--full", "--set", "optim.states=8bit", "--set", "model.activation_checkpointing=full", "--ref", "ema"],
        ["--full", "--set", "optim.offload=true", "--loss", "slic", "--set", "optim.microbatch_tokens=100"],
        [],
    ],
    ids=["lora", "8bit", "offload", "members"],
)
def test_train(run, members, tiny_args, tmp_path, form):
    out, said = members
    if form:
        out = tmp_path / "run"
        said = run(*tiny_args, *FEW, *ON_GPU, *form, "--out", out)
    assert "prompts are not shared" not in said
    losses = losses_of(out)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_two_devices_end_as_one(run, tiny_args, tmp_path):
    outs = [tmp_path / f"run-{num}" for num in (1, 2)]
    for num, out in enumerate(outs, 1):
        form = ("--devices", num, "--members", "2", "--set", "model.dtype=float32")
        run(*tiny_args, *FEW, "--device", "cuda", *form, "--out", out, CUDA_VISIBLE_DEVICES="0,1")
    one, two = (load_file(out / "checkpoint-2" / "adapter_model.safetensors") for out in outs)
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm(), name


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, members, tmp_path):
    out, _ = members
    whole = shutil.copytree(out / "checkpoint-2", tmp_path / "whole")
    shutil.rmtree(out / "checkpoint-2")
    assert (out / "checkpoint-1").is_dir()
    (out / "summary.json").unlink()
    run("train", "--resume", out)
    paths = list(whole.glob("*.safetensors"))
    assert paths
    for path in paths:
        assert path.read_bytes() == (out / "checkpoint-2" / path.name).read_bytes(), path.name


def test_models_are_trained_judged_and_written(run, tiny_model_dir, tiny_data, tmp_path):
    rows = [json.loads(line) for line in tiny_data.train.read_text().splitlines()][:12]
    pairs = tmp_path / "pairs.jsonl"
    better = [{"prompt": r["prompt"], "chosen": r["label"], "rejected": r["label"][::-1]} for r in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in better))
    device = ("--device", "cuda")
    run("reward", "--model", tiny_model_dir, "--data", pairs, "--out", tmp_path / "rm", *device)
    data = f"{tiny_data.train}[:12]"
    run("sft", "--model", tiny_model_dir, "--data", data, "--out", tmp_path / "sft", *device)
    given = ("--data", f"{tiny_data.eval}[:4]", "--engine", "hf", "--max-new-tokens", "4", *device)
    said = run("eval", tmp_path / "sft", "--judge", tmp_path / "rm", "--out", tmp_path / "eval", *given)
    assert "win rate" in said
    run("sample", "--model", tmp_path / "sft", "--n", "2", "--out", tmp_path / "said.jsonl", *given)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2 * 4


def test_benches(run, tmp_path):
    shape = ("--shapes", "16x64x300", "--peers", "none", "--quick")
    run("bench", "kernels", "--op", "step", "--head", "frozen", *shape, "--json", tmp_path / "kernels.json")
    problems = json.loads((tmp_path / "kernels.json").read_text())["problems"]
    rows = problems[0]["implementations"]
    assert all("seconds" in rows[name] for name in ("eager", "triton", "triton-gemm", "mm"))
    assert "seconds" in rows["native"] or rows["native"]["unavailable"]
    options = ("--op", "attention", "--op", "norm", "--op", "gate", "--quick", "--peers", "none")
    run("bench", "kernels", *options, "--json", tmp_path / "trunk.json")
    attention, *trunk = json.loads((tmp_path / "trunk.json").read_text())["problems"]
    assert attention["label"] == "attention 24/9 heads=2 P=8 bfloat16"
    assert all("seconds" in attention["implementations"][name] for name in ("eager", "varlen", "masked"))
    assert [problem["label"] for problem in trunk] == ["norm R=33 H=48 bfloat16", "gate R=33 H=48 bfloat16"]
    assert all("seconds" in problem["implementations"][name] for problem in trunk for name in ("eager", "triton"))
    shape = ("--shape", "32x1x300", "--pairs", "2", "--rounds", "1", "--peers", "none", "--lengths", "helpfulness")
    for bench, more in (("step", ()), ("loop", ("--steps", "1"))):
        out = tmp_path / f"{bench}.json"
        run("bench", bench, "--device", "cuda", "--form", "lora", *shape, *more, "--json", out)
        assert all(row["ours"]["pairs_per_s"] > 0 for row in json.loads(out.read_text())["rows"])


def test_doctor(run):
    said = run("doctor")
    assert "Stand-in, 16 GiB, sm_90" in said
    assert "variable-length kernel of torch" in said
