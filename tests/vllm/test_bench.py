"""The bench of sampling, small: three samplers of the same policy in one process, what a refresh copies, and memory."""

import json

import pytest
from bpo_fast_bench.sampling import SamplingBench, run, table

from bpo_fast.tasks import ASSETS


def test_the_bench_runs_every_sampler_and_copies_nothing(tmp_path):
    path = tmp_path / "results" / "sampling.json"
    small = {"model": str(ASSETS / "policy"), "memory_hidden": 64, "num_prompts": 8, "max_new_tokens": 16, "rounds": 1}
    results = run(SamplingBench(forms=("full",), **small, json_path=str(path)))
    found, memory = results["forms"]["full"], results["memory"]
    assert {len(found[name]) for name in ("vllm", "hf", "generate")} == {5}
    assert all(found[name]["tokens_per_s"] > 0 for name in ("vllm", "hf", "generate"))
    assert found["bytes_copied"] == 0
    assert min(found["greedy_agreement"].values()) >= 0.9
    assert max(found["logp_difference"][name]["max"] for name in ("vllm", "hf")) < 1e-3
    assert memory["full"]["bytes_copied"] == 0
    assert memory["full, two copies"]["bytes_copied"] > 0
    assert memory["full, two copies"]["weight_bytes"] == 2 * memory["full"]["weight_bytes"]
    assert json.loads(path.read_text())["memory"] == memory
    words = table({"forms": {"full": found}, "memory": {}})
    assert f"{found['against_generate']:.2f}x" in words


def test_unknown_forms_and_types_are_named():
    with pytest.raises(ValueError, match=r"bench\.form = half: not one of full; "):
        run(SamplingBench(forms=("half",)))
    with pytest.raises(ValueError, match=r"bench\.dtype = float8: not one of float32, bfloat16"):
        run(SamplingBench(dtype="float8"))
