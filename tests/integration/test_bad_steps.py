"""Steps whose loss is not finite: skipped, counted, and too many in a row stop the run with their batch on disk."""

import json
import math

import pytest
from tiny_world import question, write_rows

from bpo_fast import config as configs
from bpo_fast.metrics import read_metrics
from bpo_fast.pairs import read_pairs
from bpo_fast.policy import Policy
from bpo_fast.train import train

NUM_STEPS = 7


@pytest.fixture
def run(tiny_model_dir, tmp_path, monkeypatch, without_drawings):
    """Trains a pair a step; the loss of the steps in `bad` is NaN. Returns the lines of the steps."""

    def start(bad, max_bad_steps=3):
        calls, loss = [], Policy.loss

        def stub(policy, *args, **options):
            total, parts = loss(policy, *args, **options)
            calls.append(0)
            return (total * math.nan if len(calls) - 1 in bad else total), parts

        monkeypatch.setattr(Policy, "loss", stub)
        rows = [{"prompt": question(i), "chosen": f"Do {i}.", "rejected": "No idea."} for i in range(NUM_STEPS)]
        values = {
            "model.path": str(tiny_model_dir),
            "model.lora_r": 2,
            "method.pairs": NUM_STEPS,
            "method.batch_pairs": 1,
            "method.phases": 1,
            "optim.learning_rate": 1e-2,
            "optim.schedule": "constant",
            "optim.max_bad_steps": max_bad_steps,
            "eval.prompts": 0,
            "run.output_dir": str(tmp_path / "run"),
        }
        try:
            train(configs.load(None, values), from_pairs=str(write_rows(tmp_path / "prefs.jsonl", rows)))
        finally:
            monkeypatch.setattr(Policy, "loss", loss)
        return [line for line in read_metrics(tmp_path / "run") if line["kind"] == "step"]

    start.folder = tmp_path / "run"
    return start


def test_bad_steps_are_skipped_and_counted_and_said_at_the_end(run, capsys):
    bad = {0, 1, 3, 4, 6}  # never three in a row
    steps = run(bad)
    assert [line["bad_step"] for line in steps] == [int(i in bad) for i in range(NUM_STEPS)]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["steps"], summary["bad_steps"]) == (NUM_STEPS, 5)
    assert "5 of 7 steps changed nothing: their loss or gradient was not finite" in capsys.readouterr().out
    assert not (run.folder / "bad-batch.jsonl").exists()
    # weights and moments of the steps between stayed finite
    assert steps[0]["rewards/margins"] == steps[1]["rewards/margins"] == steps[2]["rewards/margins"] == 0.0
    assert all(math.isfinite(line["rewards/margins"]) for line in steps)
    assert steps[5]["rewards/margins"] != 0.0


def test_a_run_without_bad_steps_says_nothing_of_them(run, capsys):
    assert sum(line["bad_step"] for line in run(set())) == 0
    assert json.loads((run.folder / "summary.json").read_text())["bad_steps"] == 0
    assert "not finite" not in capsys.readouterr().out


def test_bad_steps_in_a_row_stop_the_run_with_the_batch_on_disk(run):
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row \(optim\.max_bad_steps\); see .*bad-batch"):
        run({1, 2, 4, 5, 6})
    steps = [line for line in read_metrics(run.folder) if line["kind"] == "step"]
    assert [line["bad_step"] for line in steps] == [0, 1, 1, 0, 1, 1, 1]
    (pair,) = read_pairs(run.folder / "bad-batch.jsonl").pairs
    trained = read_pairs(run.folder / "pairs" / "phase-00.jsonl").pairs
    assert pair == trained[6], "the last batch, with its reference"
    assert pair.ref_logps is not None
    assert not (run.folder / "summary.json").exists()
