import json

import numpy as np
import pytest
from bpo_fast_bench.study import (
    STUDIES,
    choose_rates,
    compare,
    matched_difference,
    primary,
    table,
    with_rates,
    write_results,
)
from fake_sweep import write_fake_sweep

from bpo_fast.grid import read_grid
from bpo_fast.groups import find_runs, read_groups
from bpo_fast.run_folder import read_run
from bpo_fast.sweep_plots import FIGURES

GRID = '[set]\n"method.pairs" = 512\n[grid]\nmethod = ["offline", "bpo", "on-policy"]\nseed = [100, 101, 102, 103]\n'


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_fake_sweep(tmp_path_factory.mktemp("study") / "sweep", GRID)


def result(loss, method, rate, won):
    extra = {"optim.learning_rate": rate}
    return {"loss": loss, "method": method, "extra": extra, "after": {"win_rate": {"annotator": won}}}


def test_the_rate_that_the_annotator_likes_best_and_the_smaller_of_equals():
    rows = [result("dpo", "bpo", 1e-3, 0.5), result("dpo", "bpo", 1e-3, 0.7), result("dpo", "bpo", 3e-3, 0.61)]
    rows += [result("dpo", "bpo", 1e-2, 0.4), result("ipo", "bpo", 1e-2, 0.5), result("ipo", "bpo", 1e-3, 0.5)]
    assert choose_rates(rows) == {"dpo/bpo": 3e-3, "ipo/bpo": 1e-3}


def test_every_run_of_the_study_gets_a_rate():
    rates = {"dpo/offline": 1.0, "dpo/bpo": 2.0, "dpo/on-policy": 3.0, "ipo/bpo": 4.0, "slic/bpo": 5.0}
    specs = with_rates(read_grid(STUDIES / "helpdesk.toml"), rates)
    assert len({s.name for s in specs}) == len(specs)
    found = {(s.loss, s.method, s.members): s.values["optim.learning_rate"] for s in specs}
    assert found["dpo", "online", 1] == found["dpo", "on-policy", 1] == 3.0
    assert found["dpo", "bpo", 5] == found["dpo", "bpo", 1] == 2.0
    assert found["ipo", "offline", 1] == found["ipo", "online", 1] == 4.0


def test_the_tuning_shares_neither_seeds_nor_prompts_with_the_study():
    tuning, study = (read_grid(STUDIES / f"{name}.toml") for name in ("helpdesk-lr", "helpdesk"))
    study = [*study, *read_grid(STUDIES / "helpdesk-conditions.toml")]
    assert not {s.seed for s in tuning} & {s.seed for s in study}
    assert {s.values["data.eval_path"].rpartition("[")[2] for s in tuning} == {":128]"}
    assert {s.values["data.eval_path"].rpartition("[")[2] for s in study} == {"128:]"}
    assert all("rubric" not in str(s.values["eval.judges"]) for s in tuning)


def test_the_primary_comparison_by_hand(sweep):
    groups = read_groups(find_runs([sweep])[0])
    found = primary(groups)
    assert [(row["a"], row["b"], row["num_seeds"]) for row in found] == [
        ("BPO F=2", "offline", 4),
        ("BPO F=2", "on-policy", 4),
    ]
    by_label = {g.place.label: g for g in groups}
    won = {
        label: [
            [r["scores"]["rubric"] > r["label_scores"]["rubric"] for r in run.eval_rows if r["when"] == "after"]
            for _, run in sorted(by_label[label].runs.items())
        ]
        for label in ("BPO F=2", "offline")
    }
    expected = np.mean(won["BPO F=2"]) - np.mean(won["offline"])
    assert found[0]["difference"]["mean"] == pytest.approx(expected)
    assert found[0]["difference_over_seeds"]["mean"] == pytest.approx(expected)
    assert compare(by_label["offline"], by_label["offline"])["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def run_with(folder, *points):
    folder.mkdir()
    lines = [
        {"kind": "eval", "step": s, "eval/kl": kl, "eval/win_rate/rubric": rate} for s, (kl, rate) in enumerate(points)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def test_win_rates_at_matched_kl(tmp_path):
    a = run_with(tmp_path / "a", (0.0, 0.3), (1.0, 0.5), (4.0, 0.8))
    b = run_with(tmp_path / "b", (0.0, 0.3), (2.0, 0.5))
    assert matched_difference(a, b) == pytest.approx(0.6 - 0.5)
    assert matched_difference(b, a) == pytest.approx(0.5 - 0.6)
    fell = run_with(tmp_path / "fell", (0.0, 0.3), (9.0, 0.2), (4.0, 0.7))
    assert matched_difference(fell, a) == pytest.approx(0.7 - 0.8)
    assert matched_difference(fell, b) == pytest.approx(0.5 - 0.5)


def test_what_is_committed(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("bpo_fast.sweep_plots.FIGURES", FIGURES[:1])
    found = write_results(sweep, None, {"dpo/bpo": 3e-3}, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert found["conditions"] == {}
    assert (tmp_path / "summary.json").is_file()
    assert "BPO F=2 - offline, 4 paired seeds, 6 prompts:" in table(found)


def test_conditions_are_compared_each_by_itself(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("bpo_fast.sweep_plots.FIGURES", ())
    axes = 'method = ["offline", "bpo", "on-policy"]\nseed = [100, 101]\n'
    blocks = [
        f'[[grid]]\nname = "{name}"\n{axes}set."method.pairs" = {n}\n' for name, n in (("few", 128), ("many", 512))
    ]
    conditions = write_fake_sweep(tmp_path / "conditions", "".join(blocks))
    found = write_results(sweep, conditions, {}, tmp_path / "results")
    assert list(found["conditions"]) == ["few", "many"]
    assert [row["num_seeds"] for row in found["conditions"]["few"]] == [2, 2]
    assert "many: BPO F=2 - on-policy, 2 paired seeds, 6 prompts:" in table(found)
