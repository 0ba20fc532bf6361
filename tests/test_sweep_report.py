import json
import re
import statistics

import numpy as np
import pytest
from fake_sweep import write_fake_sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from typer.testing import CliRunner

from bpo_fast.cli import app
from bpo_fast.groups import curve_groups, find_runs, group_words, paired, read_groups
from bpo_fast.plots import Plot
from bpo_fast.sweep_curves import looks
from bpo_fast.sweep_plots import FIGURES, aggregate_rows, frequency_series, sweep_plots
from bpo_fast.sweep_report import write_sweep_report

GRID = """
[set]
"method.pairs" = 512
[[grid]]
loss = ["dpo", "ipo"]
method = ["offline", "online", "on-policy", "bpo"]
F = [1, 2, "T"]
seed = [1, 2, 3]
[[grid]]
method = ["ema"]
seed = [1, 2]
[[grid]]
M = [5]
seed = [1, 2, 3]
"""
TITLES = (
    "Win rate against F",
    "Aggregates",
    "Reference ablation",
    "Stability",
    "Reward and KL",
    "Two judges",
    "Margins and lengths",
    "Time and memory",
    "Time and memory by phase",
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_fake_sweep(tmp_path_factory.mktemp("report") / "sweep", GRID, failed=1)


@pytest.fixture(scope="module")
def groups(sweep):
    return read_groups(find_runs([sweep])[0])


@pytest.fixture(scope="module")
def report(sweep):
    """The page, and every figure on it by its title."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpo_fast.sweep_report.sweep_plots", lambda groups: drawn.extend(sweep_plots(groups)) or drawn)
        page = write_sweep_report([sweep], sweep).read_text(encoding="utf-8")
    return page, {plot.title: plot for plot in drawn}


@pytest.fixture(scope="module")
def page(report):
    return report[0]


@pytest.fixture(scope="module")
def plots(report):
    return report[1]


@pytest.fixture
def no_files(monkeypatch):
    """For the tests of the page alone."""
    monkeypatch.setattr(Plot, "save", lambda plot, stem: [])


@pytest.fixture
def no_figures(monkeypatch):
    """For the tests that look at text alone."""
    monkeypatch.setattr("bpo_fast.sweep_plots.FIGURES", ())


def call(*args):
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_runs_are_grouped_by_everything_but_the_seed(groups):
    found = {(g.place.loss, g.place.label): sorted(g.runs) for g in groups}
    assert found["dpo", "offline"] == [1, 2, 3]
    assert found["dpo", "EMA reference F=2"] == [1, 2]
    assert found["dpo", "BPO F=2 M=5"] == [1, 2]  # the third one failed
    assert len(found) == 2 * 5 + 2
    assert [g.place.label for g in groups][:4] == ["offline", "online F=2", "on-policy", "BPO F=2"]


def test_losses_have_the_names_of_their_papers(tmp_path, no_files):
    text = "[grid]\nloss = ['dpo', 'ipo', 'slic']\nmethod = ['offline', 'bpo']\n"
    sweep = write_fake_sweep(tmp_path / "s", text)
    page = write_sweep_report([sweep], sweep).read_text(encoding="utf-8")
    for words in ("helpfulness, DPO", "helpfulness, IPO", "helpfulness, SLiC"):
        assert words in page
    assert "SLIC" not in page
    labels = json.loads((sweep / "summary.json").read_text(encoding="utf-8"))["aggregates"]["rubric"]
    assert "SLiC, BPO F=2" in labels


def test_runs_that_differ_in_a_knob_stay_apart(tmp_path):
    folder = write_fake_sweep(tmp_path / "s", "[grid]\noptim.learning_rate = [1e-3, 0.01]\nseed = [1, 2]\n")
    found = read_groups(find_runs([folder])[0])
    assert [g.place.label for g in found] == ["BPO F=2 learning_rate=0.001", "BPO F=2 learning_rate=0.01"]
    assert [sorted(g.runs) for g in found] == [[1, 2], [1, 2]]


def test_folders_alone_say_what_they_are(sweep, groups):
    folders = sorted((sweep / "runs").iterdir())
    assert {g.place for g in read_groups(folders)} == {g.place for g in groups}


def test_offline_is_the_first_point_of_every_curve(groups):
    found = frequency_series(groups, "helpfulness", "ipo", "rubric")
    assert {m: list(by) for m, by in found.items()} == {"bpo": [1, 2, "T"], "online": [1, 2, "T"]}
    assert found["bpo"][1] == found["online"][1]
    assert found["bpo"]["T"] != found["online"]["T"]


def test_the_table_has_mean_and_std_over_seeds(groups, page):
    rates = [
        100 * x for x in next(g for g in groups if g.place.method == "offline").values("win_rate", "rubric").values()
    ]
    assert f"<td>{statistics.mean(rates):.1f}% ± {statistics.stdev(rates):.1f}</td>" in page


def test_the_page_is_one_file_and_holds_everything(sweep, page):
    assert re.findall(r"<figure[^>]*><h3>([^<]*)</h3>", page) == list(TITLES)
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.findall(r'(src|href)="(?!#)', page)
    assert "Against offline training" in page
    assert "Try the &lt;b&gt;settings&lt;/b&gt; page." in page
    assert "helpfulness-dpo-bpo-F2-M5-s3: failed: loss not finite" in page
    files = {p.name for p in (sweep / "figures").iterdir()}
    stems = [re.sub(r"\W+", "-", t.lower()) for t in TITLES]
    assert files == {f"{s}.{ending}" for s in stems for ending in ("png", "svg")}


def test_the_numbers_behind_the_page(sweep, groups, page):
    summary = json.loads((sweep / "summary.json").read_text(encoding="utf-8"))
    row = next(r for r in summary["groups"] if (r["loss"], r["label"]) == ("dpo", "BPO F=2"))
    own = {(g.place.loss, g.place.label): g.values("win_rate", "rubric") for g in groups}
    differences = [own["dpo", "BPO F=2"][s] - own["dpo", "offline"][s] for s in (1, 2, 3)]
    assert row["win_rate_minus_offline/rubric"]["mean"] == pytest.approx(statistics.mean(differences))
    assert row["win_rate/rubric"]["n"] == 3
    assert summary["aggregates"]["rubric"]["DPO, on-policy"]["runs"] == 3
    assert summary["not_finished"] == ["helpfulness-dpo-bpo-F2-M5-s3: failed: loss not finite"]


def test_strata_are_tasks(groups):
    rows = aggregate_rows(groups, "rubric")
    num, found = rows["DPO, BPO F=2", "bpo"]
    rates = list(next(g for g in groups if g.place.label == "BPO F=2").values("win_rate", "rubric").values())
    assert (num, found["median"].mean) == (3, pytest.approx(np.mean(rates)))


def overlaps(plot: Plot) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that cover each other, and texts that leave it."""
    figure = plot.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    drawn = [t for axis in figure.axes for side in (axis.xaxis, axis.yaxis) for t in side._update_ticks()]
    ticks = {id(t.label1) for t in drawn}
    known = {id(t.label1) for axis in figure.axes for s in (axis.xaxis, axis.yaxis) for t in s.get_major_ticks()}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    texts = [t for t in texts if id(t) not in known or id(t) in ticks]  # ticks out of view are not drawn
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    boxes = [(text, box) for text, box in boxes if box.width > 1]
    frame = figure.bbox.padded(2)
    found = [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if a != b and x.padded(-1).overlaps(y)]
    return found + [(a, "edge") for a, x in boxes if x.x0 < frame.x0 or x.x1 > frame.x1 or x.y1 > frame.y1]


def test_no_text_covers_another(plots):
    for title, plot in plots.items():
        assert overlaps(plot) == [], title


def test_long_labels_stay_in_their_panels(tmp_path, monkeypatch):
    folder = write_fake_sweep(tmp_path / "s", "[grid]\noptim.learning_rate = [1e-3, 0.01]\n")
    plot = plot_of(read_groups(find_runs([folder])[0]), "Time and memory by phase", monkeypatch)
    assert overlaps(plot) == []
    titles = [(axis, t) for axis in plot.figure.axes for t in axis.findobj(Text) if "learning_rate" in t.get_text()]
    assert len(titles) == 2
    assert all(title.get_window_extent().x1 <= axis.bbox.x1 for axis, title in titles)


def plot_of(groups, title: str, monkeypatch) -> Plot:
    """This figure alone."""
    monkeypatch.setattr("bpo_fast.sweep_plots.FIGURES", [kind for kind in FIGURES if kind.title == title])
    (plot,) = sweep_plots(groups)
    return plot


def titles_of(plot: Plot) -> list[str]:
    return [axis.get_title(loc="left") for axis in plot.figure.axes]


def test_every_task_and_loss_has_its_panels_and_every_group_its_curve(groups, plots):
    own = {loss: {g.place.label for g in groups if g.place.loss == loss} for loss in ("dpo", "ipo")}
    plot = plots["Reward and KL"]
    assert titles_of(plot) == [f"{loss}: win rate, {j}" for loss in ("DPO", "IPO") for j in ("rubric", "annotator")]
    for n, axis in enumerate(plot.figure.axes):
        assert set(axis.get_legend_handles_labels()[1]) == own["dpo" if n < 2 else "ipo"]
    plot = plots["Margins and lengths"]
    assert titles_of(plot)[::2] == ["DPO: margin, chosen - rejected", "IPO: margin, chosen - rejected"]
    assert [set(a.get_legend_handles_labels()[1]) for a in plot.figure.axes] == [
        own[x] for x in ("dpo", "dpo", "ipo", "ipo")
    ]
    assert titles_of(plots["Reference ablation"])[::2] == [f"win rate, rubric ({x}, F=2)" for x in ("DPO", "IPO")]
    (legend,) = plot.figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted(own["dpo"] | own["ipo"])


def test_what_has_no_curve_is_named(tmp_path, monkeypatch):
    grid = "[[grid]]\nmethod = ['offline', 'online', 'bpo', 'ema']\nF = [1, 2, 3, 4, 5, 6]\nM = [1, 5]\n"
    found = read_groups(find_runs([write_fake_sweep(tmp_path / "s", grid)])[0])
    plot = plot_of(found, "Reward and KL", monkeypatch)
    shown = set(plot.figure.axes[0].get_legend_handles_labels()[1])
    left = plot.caption.removesuffix(".").partition("left out: ")[2].split(", ")
    assert sorted([*shown, *left]) == sorted(g.place.label for g in found)
    assert (len(shown), len(left)) == (12, 20)
    assert {f"BPO F={n}" for n in range(2, 7)} <= shown
    assert {"offline", "online F=2", "EMA reference F=2"} <= shown
    by_phase = plot_of(found, "Time and memory by phase", monkeypatch).caption
    assert by_phase.endswith("the table of the phases has these as well: " + ", ".join(left) + ".")
    reference = plot_of(found, "Reference ablation", monkeypatch)
    assert titles_of(reference)[0] == "win rate, rubric (DPO, F=2)"
    assert "left out: online F=2 M=5, BPO F=2 M=5, " in reference.caption


def test_bpo_of_every_f_has_a_curve_however_many_there_are(tmp_path):
    grid = "[[grid]]\nmethod = ['offline', 'bpo']\nF = [1, 2, 3, 4, 'T']\nM = [1, 5]\nloss = ['dpo', 'ipo']\n"
    found = read_groups(find_runs([write_fake_sweep(tmp_path / "s", grid)])[0])
    kept = group_words(found, curve_groups(found, 2))
    assert kept == "; ".join(f"{x}: BPO F=2, BPO F=3, BPO F=4, BPO F=T" for x in ("DPO", "IPO"))
    kept = group_words(found, curve_groups(found, 6))
    assert kept.startswith("DPO: offline, BPO F=2, BPO F=2 M=5, BPO F=3, BPO F=4, BPO F=T; ")


def test_no_two_curves_look_the_same(groups):
    found = looks(groups)
    assert len({tuple(style.values()) for style in found.values()}) == len(found) == 7
    for a, b in (("online F=2", "BPO F=2"), ("on-policy", "BPO F=2"), ("online F=2", "on-policy")):
        assert np.linalg.norm(np.subtract(to_rgb(found[a]["color"]), to_rgb(found[b]["color"]))) > 0.3
    alone = looks([g for g in groups if g.place.method == "bpo"])
    assert len({style["color"] for style in alone.values()}) == len(alone) == 3


def test_bars_end_where_their_intervals_do(groups, plots):
    plot = plots["Aggregates"]
    bars = [line for axis in plot.figure.axes for line in axis.lines if len(line.get_xdata()) == 2]
    assert len(bars) == 4 * len(groups)
    assert {bar.get_solid_capstyle() for bar in bars} == {"butt"}


def test_bars_of_a_share_stay_within_0_and_1(sweep, monkeypatch):
    found = read_groups(find_runs([sweep])[0])
    for n, run in enumerate(run for g in found for run in g.runs.values()):
        run.summary["after"]["win_rate"]["rubric"] = (0.0, 0.02, 1.0)[n % 3]
    for title in ("Win rate against F", "Stability"):
        bars = [c for axis in plot_of(found, title, monkeypatch).figure.axes for c in axis.containers]
        ends = [y for bar in bars for lines in bar.lines[2] for segment in lines.get_segments() for y in segment[:, 1]]
        assert len(ends) > 2
        assert min(ends) >= 0.0
        assert max(ends) <= 1.0


def test_one_run_that_collapses_leaves_the_curves_of_kl_readable(sweep, monkeypatch):
    found = read_groups(find_runs([sweep])[0])
    for group in found:
        for line in next(iter(group.runs.values())).evals[1:]:
            line["eval/kl"] = 1500.0
    plot = plot_of(found, "Reference ablation", monkeypatch)
    kl = plot.figure.axes[1]
    assert (kl.get_yscale(), kl.get_ylim()[0]) == ("symlog", 0.0)
    bands = [path.vertices[:, 1] for band in kl.collections for path in band.get_paths()]
    assert min(y.min() for y in bands) >= 0.0
    online = next(line for line in kl.lines if line.get_label() == "online")
    assert max(online.get_ydata()) < 10.0  # the median of three
    axis = plot_of(found, "Reward and KL", monkeypatch).figure.axes[0]
    assert axis.get_xscale() == "symlog"
    line = next(line for line in axis.lines if line.get_label() == "online F=2")
    runs = next(g for g in found if g.place.label == "online F=2").runs.values()
    assert line.get_xdata()[-1] == statistics.median(run.evals[-1]["eval/kl"] for run in runs)


def test_two_runs_of_the_same_settings_are_not_lost_without_a_word(tmp_path, no_figures):
    grid = "[set]\n'method.pairs' = 32\n[[grid]]\nmethod = ['online', 'bpo']\nF = [2, 'T']\nseed = [1, 2]\n"
    folder = write_fake_sweep(tmp_path / "s", grid)
    page = write_sweep_report([folder], folder).read_text(encoding="utf-8")
    assert "<h1>bpo-fast: 8 runs, 4 of them told apart</h1>" in page
    names = re.findall(r"<li>(helpfulness[^:]*): the same settings and seed as (helpfulness[^<]*), which", page)
    assert sorted(names) == [
        ("helpfulness-dpo-bpo-FT-M1-s1", "helpfulness-dpo-bpo-F2-M1-s1"),
        ("helpfulness-dpo-bpo-FT-M1-s2", "helpfulness-dpo-bpo-F2-M1-s2"),
        ("helpfulness-dpo-on-policy-FT-M1-s1", "helpfulness-dpo-online-F2-M1-s1"),
        ("helpfulness-dpo-on-policy-FT-M1-s2", "helpfulness-dpo-online-F2-M1-s2"),
    ]


def test_paired_takes_the_seeds_that_both_have():
    found = paired({1: 0.5, 2: 0.7, 3: 0.9}, {2: 0.6, 3: 0.6})
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert paired({1: 0.5}, {2: 0.5}) is None


def test_the_command(sweep, tmp_path, no_figures):
    runs = sorted((sweep / "runs").iterdir())[:3]
    code, out, err = call("report", *runs, "--out", tmp_path / "r")
    assert (code, out.strip()) == (0, str(tmp_path / "r" / "report.html")), err
    assert find_runs([sweep / "results.jsonl"]) == find_runs([sweep])
    code, _, err = call("report", tmp_path)
    assert code == 2
    assert "not a run folder (no config.toml) and not a sweep (no results.jsonl)" in err


def test_a_run_is_not_written_over(sweep):
    run = min((sweep / "runs").iterdir())
    before = (run / "summary.json").read_bytes()
    code, _, err = call("report", sweep, "--out", run)
    assert (code, (run / "summary.json").read_bytes()) == (2, before)
    assert err.startswith(f"error: --out {run}: holds a run")


def test_a_sweep_without_a_finished_run(tmp_path):
    folder = write_fake_sweep(tmp_path / "s", "[grid]\nseed = [1]\n", failed=1)
    with pytest.raises(ValueError, match="no finished run there"):
        write_sweep_report([folder], folder)
