"""The bench of sampling, small: three samplers of the same policy in one process, and what a refresh copies."""

import pytest
from bpo_fast_bench.sampling import SamplingBench, run, table


def test_the_bench_runs_every_sampler_and_copies_nothing(tmp_path):
    path = tmp_path / "results" / "sampling.json"
    small = {"memory_hidden": 0, "num_prompts": 8, "max_new_tokens": 16, "rounds": 1}
    found = run(SamplingBench(forms=("full",), **small, json_path=str(path)))["forms"]["full"]
    assert {len(found[name]) for name in ("vllm", "hf", "generate")} == {5}
    assert all(found[name]["tokens_per_s"] > 0 for name in ("vllm", "hf", "generate"))
    assert found["bytes_copied"] == 0
    assert found["greedy_agreement"] >= 0.9
    assert path.exists()
    words = table({"forms": {"full": found}, "memory": {}})
    assert f"{found['against_generate']:.2f}x" in words


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"bench\.form = half: not one of full; "):
        run(SamplingBench(forms=("half",)))
