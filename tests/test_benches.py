"""The benches of steps and loops on a toy: every number is there, and rows of other runs stay."""

import json

import pytest
from bpo_fast_bench import loop, step
from bpo_fast_bench.contenders import Shape, compare

TOY = {"peers": (), "lengths": ("helpfulness",), "pairs": 2, "rounds": 1, "threads": 1, "shape": Shape(32, 1, 400)}


@pytest.mark.parametrize("bench", ["step", "loop"])
def test_a_toy_run_writes_a_row(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.json"
    kept = [{"lengths": lengths, "form": "full"} for lengths in ("tldr", "helpfulness")]
    out.write_text(json.dumps({"rows": kept}))
    options = {"forms": ("full",), "out": str(out), **TOY}
    said = []
    if bench == "step":
        step.run(step.StepOptions(**options), said.append)
    else:
        loop.run(loop.LoopOptions(**options, steps=1), said.append)
    old, new = json.loads(out.read_text())["rows"]
    assert old == {"lengths": "tldr", "form": "full"}
    assert new["ours"]["pairs_per_s"] > 0
    assert new["ours"]["peak_extra_mib"] > 0
    assert len(new["ours"]["block_s"]) == 1
    assert new["machine"]["cpu"]
    assert said[0].startswith("helpfulness full: ours ")


def test_ratios_are_of_rates_and_of_peaks():
    found = {
        "ours": {"pairs_per_s": 6.0, "peak_extra_mib": 50.0},
        "trl": {"pairs_per_s": 2.0, "peak_extra_mib": 200.0},
    }
    row = compare(found, "ours", ("trl",), runs=5, form="lora5")
    assert (row["speedup/trl"], row["memory/trl"]) == (15.0, 0.25)
    assert row["trl"] == {"pairs_per_s": 0.4, "peak_extra_mib": 200.0, "runs": 5}


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^bench\.lengths = short: not one of tldr, helpfulness, long$"):
        step.run(step.StepOptions(lengths=("short",)))
    with pytest.raises(ValueError, match=r"^bench\.peers = oat: not one of trl$"):
        loop.run(loop.LoopOptions(peers=("oat",)))
