"""What the phases of many runs cost: the numbers, and how the report shows them."""

import json
import re
import statistics

import pytest
from fake_sweep import STEPS, phase_values, write_fake_sweep

from bpo_fast.groups import Group, find_runs, read_groups
from bpo_fast.run_folder import PHASE_STAGES
from bpo_fast.sweep_costs import phase_costs
from bpo_fast.sweep_plots import sweep_plots
from bpo_fast.sweep_report import write_sweep_report

GRID = """
[set]
"method.pairs" = 512
[[grid]]
method = ["offline", "on-policy", "bpo"]
seed = [1, 2, 3]
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_fake_sweep(tmp_path_factory.mktemp("costs") / "sweep", GRID)


def groups_of(sweep) -> dict[str, Group]:
    return {g.place.label: g for g in read_groups(find_runs([sweep])[0])}


def table_of(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index("<h2>Phases</h2>") :])
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]


def test_costs_are_means_over_seeds_phase_by_phase(sweep):
    groups = groups_of(sweep)
    for label, num_phases in (("offline", 1), ("BPO F=2", 2), ("on-policy", STEPS)):
        costs = phase_costs(groups[label])
        assert costs is not None
        assert costs.phases.tolist() == list(range(1, num_phases + 1))
        for phase in range(num_phases):
            by_seed = [phase_values(phase, num_phases, 1, seed) for seed in (1, 2, 3)]
            for stage in PHASE_STAGES:
                assert costs.seconds[stage][phase] == pytest.approx(by_seed[0][f"timing/{stage}_s"])
            peak_gib = statistics.mean(v["perf/peak_memory_gib"] for v in by_seed)
            assert costs.peak_gib is not None
            assert costs.peak_gib[phase] == pytest.approx(peak_gib)


def test_runs_without_a_number_do_not_count(sweep):
    group = groups_of(sweep)["BPO F=2"]
    for key, value in (("timing/ref_s", None), ("perf/peak_memory_gib", None), ("timing/rollout_s", 100.0)):
        group.runs[1].phases[1][key] = value
    for run in group.runs.values():
        del run.phases[0]["timing/annotate_s"]
    group.runs[3].phases.clear()
    costs = phase_costs(group)
    assert costs is not None
    assert list(costs.seconds) == ["rollout", "ref", "train"]
    assert costs.seconds["ref"].tolist() == [1.5, 1.5]
    assert costs.seconds["rollout"].tolist() == pytest.approx([3.0, 53.0])
    assert costs.peak_gib is not None
    assert costs.peak_gib.tolist() == pytest.approx([phase_values(p, 2, 1, 2)["perf/peak_memory_gib"] for p in (0, 1)])
    group.runs[1].phases.clear()
    group.runs[2].phases.clear()
    assert phase_costs(group) is None


def test_the_figure_has_the_numbers(sweep):
    plots = {plot.title: plot for plot in sweep_plots(list(groups_of(sweep).values()))}
    figure = plots["Time and memory by phase"].figure
    seconds, peaks = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title(loc="left") for axis in seconds] == ["offline", "on-policy", "BPO F=2"]
    for axis, num_phases in zip(seconds, (1, STEPS, 2), strict=True):
        bars = axis.containers
        assert [len(stage) for stage in bars] == [num_phases] * len(PHASE_STAGES)
        assert sum(bar.get_height() for stage in bars for bar in stage) == pytest.approx(9 + 3 + 3 + 6)
        assert axis.get_ylim()[0] == 0.0
    assert [len(axis.lines[0].get_ydata()) for axis in peaks] == [1, STEPS, 2]


def test_many_phases_are_a_few_rows_of_the_table(sweep, tmp_path):
    head, *rows = table_of(write_sweep_report([sweep], tmp_path / "r").read_text(encoding="utf-8"))
    assert head[2:] == ["phase", "rollout (s)", "annotate (s)", "ref (s)", "train (s)", "peak memory (GiB)"]
    assert rows[0] == ["helpfulness, DPO", "offline", "1", "9.000", "3.000", "3.000", "6.000", "0.610"]
    names = [row[1:3] for row in rows]
    spans = [["on-policy", "1 to 8"], ["", "9 to 16"], ["", "17 to 24"], ["", "25 to 32"]]
    assert names == [["offline", "1"], *spans, ["BPO F=2", "1"], ["", "2"]]
    mean_s = statistics.mean(phase_values(p, STEPS, 1, 1)["timing/rollout_s"] for p in range(8, 16))
    assert rows[2][3:] == [f"{mean_s:.3f}", "0.094", "0.094", "0.188", "0.590"]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text(encoding="utf-8"))
    found = {row["label"]: row["by_phase"] for row in summary["groups"]}
    assert found["BPO F=2"]["train_s"] == [3.0, 3.0]
    assert len(found["on-policy"]["peak_memory_gib"]) == STEPS


def test_runs_that_did_not_record_phases_have_a_report(sweep, tmp_path):
    old = write_fake_sweep(tmp_path / "old", "[[grid]]\nmethod = ['ema']\nseed = [1]\n", with_phases=False)
    page = write_sweep_report([old], tmp_path / "r").read_text(encoding="utf-8")
    assert "<h3>Time and memory</h3>" in page
    assert "by phase" not in page
    assert "<h2>Phases</h2>" not in page
    assert json.loads((tmp_path / "r" / "summary.json").read_text(encoding="utf-8"))["groups"][0]["by_phase"] is None
    page = write_sweep_report([old, sweep], tmp_path / "both").read_text(encoding="utf-8")
    assert "EMA reference F=2" in page
    assert "EMA reference F=2" not in [row[1] for row in table_of(page)]
