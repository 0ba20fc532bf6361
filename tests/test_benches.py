"""The benches of steps and loops on a toy: every number is there, and rows of other runs stay."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from bpo_fast_bench import contenders, loop, sampling, stages, step
from bpo_fast_bench.contenders import Work, compare, line, measure, pick_peers, write_rows
from bpo_fast_bench.shapes import SHAPES, Shape, make_model, parse_shape
from forks import fork_processes_of

from bpo_fast import policy
from bpo_fast.stages import Steps
from bpo_fast.types import Prompt

TOY = {"peers": (), "lengths": ("helpfulness",), "pairs": 2, "rounds": 1, "threads": 1, "shape": Shape(32, 1, 400)}
TOY |= {"device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(("bench", "dtype"), [("step", "float32"), ("loop", "bfloat16")])
def test_a_toy_run_writes_a_row(bench, dtype, tmp_path, monkeypatch):
    if bench == "loop":  # in a step's contender torch.compile would wait for threads that a fork has not
        fork_processes_of("bpo_fast_bench.contenders", monkeypatch)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.json"
    full = "full" if dtype == "float32" else "full, dtype = bfloat16"  # a CPU's own goes without saying
    full += "" if bench == "step" else ", steps = 1"  # nor do the steps of a phase, where nothing was asked for
    kept = [{"lengths": lengths, "form": full} for lengths in ("tldr", "helpfulness")]
    out.write_text(json.dumps({"rows": kept}))
    options = {"forms": ("full",), "out": str(out), **TOY, "dtype": dtype}
    said = []
    if bench == "step":
        step.run(step.StepOptions(**options, compiled=True), said.append)
    else:
        loop.run(loop.LoopOptions(**options, steps=1), said.append)
    old, new, *others = json.loads(out.read_text())["rows"]
    assert [r["form"] for r in others] == (
        [] if bench == "step" else [f"{full}, ref_logps = sampler", f"{full}, states = 8bit"]
    )
    assert old == {"lengths": "tldr", "form": full}
    assert new["ours"]["pairs_per_s"] > 0
    assert len(new["ours"]["block_s"]) == 1
    assert new["machine"]["cpu"]
    assert said[0].startswith(f"helpfulness {full}: ours ")
    if bench == "step":
        assert new["ours"]["tflops"] > 0
        assert new["compiled"]["pairs_per_s"] > 0
        assert new["speedup/compiled"] == pytest.approx(
            new["ours"]["pairs_per_s"] / new["compiled"]["pairs_per_s"], abs=0.01
        )
        assert "; compiled " in said[0]


@pytest.mark.parametrize(("bench", "dtype"), [(step, "bfloat16"), (loop, "float32")])
def test_weights_are_of_the_type_that_was_asked_for(bench, dtype, tmp_path, monkeypatch):
    make_model(TOY["shape"], tmp_path, "float32")
    options = step.StepOptions(**TOY | {"dtype": dtype})
    loaded, load = [], policy.load_policy

    def seen(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("bpo_fast.policy.load_policy", seen)
    monkeypatch.setattr("bpo_fast.setup.load_policy", seen)
    blocks = bench._ours(options.contender("step", "ours", "helpfulness", 0, str(tmp_path)).case)
    next(blocks)
    assert next(blocks) > 0
    blocks.close()
    assert {str(p.dtype) for p in loaded[0].parameters()} == {f"torch.{dtype}"}


def test_stages_are_rows_of_their_own(tmp_path, monkeypatch):
    fork_processes_of("bpo_fast_bench.contenders", monkeypatch)
    options = TOY | {"forms": ("sft-lora", "reward"), "out": str(tmp_path / "out.json")}
    said = []
    stages.run(stages.StageOptions(**options), said.append)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["sft-lora", "reward"]
    assert all(row["ours"]["pairs_per_s"] > 0 for row in rows)
    assert [line.split(":")[0] for line in said] == [f"helpfulness {form}" for form in options["forms"]]


@pytest.mark.parametrize("form", ["sft", "sft-lora", "reward"])
def test_a_stage_is_timed_on_the_rows_that_trl_has(form, tmp_path, monkeypatch):
    """As many tokens a row, and as many that the loss looks at."""
    make_model(Shape(32, 1, 21000), tmp_path, "float32")
    options = stages.StageOptions(**TOY)
    case = options.contender("stages", f"ours {form}", "helpfulness", stages.STAGES[form], str(tmp_path)).case
    seen = []

    class Seen(Steps):
        def __init__(self, parameters, config, rows, num, ranks):
            seen.append(rows)
            super().__init__(parameters, config, rows, num, ranks)

    monkeypatch.setattr("bpo_fast.stages.Steps", Seen)
    blocks = stages._ours(case, form)
    next(blocks)
    assert next(blocks) > 0
    blocks.close()
    [rows] = seen
    prompt, completion = contenders.LENGTHS["helpfulness"]
    assert set(rows.lengths) == {prompt + (2 if form == "reward" else 1) * completion}
    assert set(rows.num_terms) == {1 if form == "reward" else completion}


def test_who_fails_leaves_a_reason_and_the_others_go_on(tmp_path):
    options = step.StepOptions(**TOY)
    make_model(options.shape, tmp_path / "model", "float32")
    folders = {"full": tmp_path / "model", "trl": tmp_path / "nowhere"}
    contestants = {name: options.contender("step", "ours", "helpfulness", 0, str(f)) for name, f in folders.items()}
    found = measure(contestants, 1)
    assert found["full"]["pairs_per_s"] > 0
    assert found["full"]["peak_extra_mib"] > 0  # of a process of its own: forks begin with memory of the tests
    assert found["trl"]["failed"].startswith("exit code 1: ")
    row = compare(found, "full", ("trl",), runs=1, lengths="helpfulness", form="full")
    assert row["trl"] == found["trl"]
    assert not any(key.endswith("/trl") for key in row)
    assert line(row).endswith(f"; trl failed ({found['trl']['failed']})")
    contenders.check_ours([row])
    one = contestants["full"]
    one.start()
    os.kill(one._process.pid, signal.SIGKILL)
    with pytest.raises(contenders.ContenderFailed, match=r"^killed, as the system does when memory runs out$"):
        one.block()
    row = compare(found, "trl", ("full",), runs=1, lengths="tldr", form="full")
    assert line(row).startswith("tldr full: ours failed (exit code 1: ")
    with pytest.raises(ValueError, match=r"^bench\.lengths = tldr, bench\.form = full: ours failed, exit code 1: "):
        contenders.check_ours([row])


def test_what_failed_does_not_replace_what_was_measured(tmp_path):
    good, failed, said = {"pairs_per_s": 2.0, "peak_extra_mib": 1.0}, {"failed": "exit code 1: no memory left"}, []
    name = {"lengths": "tldr", "form": "full"}

    def rows_after(**found):
        row = compare(found, "ours", [who for who in found if who != "ours"], runs=1, **name)
        write_rows(tmp_path / "out.json", step.StepOptions(**TOY), [row], said.append)
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        return [who for who in ("ours", "trl") if who in row and "failed" not in row[who]]

    assert rows_after(ours=failed) == []  # there is nothing to lose
    assert rows_after(ours=good) == ["ours"]
    assert said == []
    assert rows_after(ours=failed, trl=good) == ["ours"]
    assert said.pop() == f"tldr full: ours failed, the earlier row stays in {tmp_path / 'out.json'}"
    assert rows_after(ours=good, trl=failed) == ["ours"]  # trl was not there
    assert rows_after(ours=good, trl=good) == ["ours", "trl"]
    assert said == []
    assert rows_after(ours=good, trl=failed) == ["ours", "trl"]
    assert said.pop() == f"tldr full: trl failed, the earlier row stays in {tmp_path / 'out.json'}"
    assert rows_after(ours=good) == ["ours"]


def test_a_trainer_that_stops_does_not_leave_its_bench_waiting(tmp_path):
    """Out of memory in TRL's first step, for one."""
    make_model(TOY["shape"], tmp_path, "float32")

    class Trainer:
        def train(self):
            raise torch.OutOfMemoryError("17 GiB")

    case = step.StepOptions(**TOY).contender("step", "trl", "helpfulness", 0, str(tmp_path)).case
    blocks = contenders.trl_blocks(case, lambda settings, **parts: Trainer())
    assert next(blocks) == Work()
    with pytest.raises(torch.OutOfMemoryError, match="17 GiB"):
        next(blocks)


def test_ratios_are_of_rates_and_of_peaks():
    found = {
        "ours": {"pairs_per_s": 6.0, "peak_extra_mib": 50.0},
        "trl": {"pairs_per_s": 2.0, "peak_extra_mib": 200.0},
    }
    row = compare(found, "ours", ("trl",), runs=5, form="lora5")
    assert (row["speedup/trl"], row["memory/trl"]) == (15.0, 0.25)
    assert row["trl"] == {"pairs_per_s": 0.4, "peak_extra_mib": 200.0, "runs": 5}


def test_the_rate_of_the_mathematics_is_that_of_ours_for_all():
    one = {"peak_extra_mib": 1.0}
    found = {
        "ours": {**one, "pairs_per_s": 6.0, "work": Work(flop_a_pair=5e12, peak_tflops=100.0)},
        "trl": {**one, "pairs_per_s": 2.0, "work": Work()},
    }
    row = compare(found, "ours", ("trl",), runs=1, lengths="tldr", form="full")
    assert [(row[who]["tflops"], row[who]["mfu"]) for who in ("ours", "trl")] == [(30.0, 0.3), (10.0, 0.1)]
    json.dumps(row)
    assert line(row).startswith("tldr full: ours 6.00 pairs/s, 1 MiB, 30 TFLOP/s, MFU 0.300; trl 2.00 pairs/s")


def test_peers_that_are_not_installed(monkeypatch):
    said = []
    monkeypatch.setattr(contenders, "find_spec", lambda name: 1)
    assert pick_peers("auto", ("trl", "trl-precomputed"), said.append) == ("trl", "trl-precomputed")
    assert pick_peers("none", ("trl",), said.append) == ()
    assert pick_peers("oat", ("trl",), said.append) == ("oat",)  # the bench refuses it by name
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "trl" else 1)
    assert said == []
    assert pick_peers("auto", ("trl",), said.append) == ()
    assert said == ['peers: trl is left out (trl not installed; pip install "bpo-fast[bench]")']
    with pytest.raises(ValueError, match=r"^bench\.peers = trl: trl not installed; pip install"):
        pick_peers("trl", ("trl",))


def test_shapes():
    assert parse_shape("0.5b") == SHAPES["0.5b"]
    assert parse_shape("32x1x400") == Shape(32, 1, 400)
    for odd in ("7b", "32x1", "32x0x400", "axbxc"):
        with pytest.raises(ValueError, match=rf"^bench\.shape = {odd}: not toy, 0\.5b, 1\.5b or HIDDENxLAYERSxVOC"):
            parse_shape(odd)
    with pytest.raises(ValueError, match=r"^bench\.device = cuda:9: this machine has"):
        step.run(step.StepOptions(device="cuda:9"))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^bench\.lengths = short: not one of tldr, helpfulness, long$"):
        step.run(step.StepOptions(lengths=("short",)))
    with pytest.raises(ValueError, match=r"^bench\.dtype = float16: not one of float32, bfloat16$"):
        step.run(step.StepOptions(dtype="float16"))
    with pytest.raises(ValueError, match=r"^bench\.peers = oat: not one of trl$"):
        loop.run(loop.LoopOptions(peers=("oat",)))


@pytest.mark.parametrize(("dtype", "same"), [(torch.float32, 15), (torch.bfloat16, 4)])
def test_engines_may_part_as_far_as_roundings_go(dtype, same):
    prompts = [Prompt(i, "", (1,)) for i in range(16)]

    def engine(shift):
        def generate(prompts, params, **call):
            return [[SimpleNamespace(ids=(p.id + shift * (p.id >= shift),))] for p in prompts]

        return SimpleNamespace(generate=generate)

    assert sampling._agreement(engine(same), engine(0), prompts, dtype) == same / 16
    with pytest.raises(RuntimeError, match="agree on"):
        sampling._agreement(engine(same - 1), engine(0), prompts, dtype)
