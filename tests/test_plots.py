import errno
import math
import re
import resource
import signal
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from fake_run import write_fake_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bpo_fast import plots
from bpo_fast.drawing import Plot
from bpo_fast.metrics import Metrics
from bpo_fast.run_folder import read_run, stage_seconds

TITLES = [
    "Win rate by judge",
    "Loss and margin",
    "Rewards",
    "Annotator scores",
    "Drift",
    "Completions",
    "Diversity",
    "Pairs",
    "Optimizer",
    "Time by stage",
    "Speed and memory",
]


def _drawn(run_dir):
    drawn, missing = plots.plots(read_run(run_dir))
    return {plot.title: plot for plot in drawn}, missing


def _overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of visible texts whose boxes overlap by more than a pixel in both directions."""
    FigureCanvasAgg(figure).draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            # Labels outside the limits exist but are not drawn.
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 4
    found = []
    for index, (one, a) in enumerate(boxes):
        for other, b in boxes[index + 1 :]:
            width = min(a.x1, b.x1) - max(a.x0, b.x0)
            height = min(a.y1, b.y1) - max(a.y0, b.y0)
            if width > 1 and height > 1:
                found.append((one, other))
    return found


@pytest.mark.parametrize(
    ("phases", "steps", "judges"),
    [
        (2, 40, ("rubric", "judge-rm")),
        (8, 300, ("a judge with a name that is much too long for a figure of this size", "b", "c", "d")),
        (60, 60, ("rubric",)),
    ],
)
def test_every_figure_is_drawn_without_overlaps(tmp_path, phases, steps, judges):
    drawn, missing = _drawn(write_fake_run(tmp_path, phases=phases, steps=steps, judges=judges))
    assert list(drawn) == TITLES
    assert missing == []
    assert [(title, pair) for title, plot in drawn.items() for pair in _overlaps(plot.figure)] == []


def test_one_phase_has_no_curves_over_phases(tmp_path):
    drawn, missing = _drawn(write_fake_run(tmp_path, phases=1, steps=10))
    assert list(drawn) == [title for title in TITLES if title not in plots.PHASE_FIGURES]
    assert missing == []


def test_empty_folder_names_what_is_missing(tmp_path):
    drawn, missing = _drawn(tmp_path)
    assert drawn == {}
    assert missing == TITLES[1:]


def test_points_are_those_of_the_file(tmp_path):
    metrics = Metrics(tmp_path)
    for step, loss in enumerate([0.5, math.nan, 0.25], start=1):
        metrics.log("step", step, {"loss": loss, "phase": step // 3})
    metrics.log(
        "phase", 0, {"phase": 0, "pairs/kept": 7, "pairs/tied": 2, "pairs/identical": 0, "timing/rollout_s": 1.5}
    )
    metrics.log(
        "phase", 2, {"phase": 1, "pairs/kept": 6, "pairs/tied": 3, "pairs/identical": 0, "timing/rollout_s": 2.0}
    )
    metrics.close()
    drawn, missing = _drawn(tmp_path)
    assert list(drawn) == ["Loss and margin", "Pairs", "Time by stage"]
    assert "Rewards" in missing
    (axis,) = drawn["Loss and margin"].figure.axes
    curve, boundary = axis.lines
    np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(curve.get_ydata(), [0.5, math.nan, 0.25])
    assert boundary.get_xdata() == [2.5, 2.5]
    bars = [(bar.get_y(), bar.get_height()) for bar in drawn["Pairs"].figure.axes[0].patches]
    assert bars == [(0, 7), (0, 6), (7, 2), (6, 3)]
    assert [bar.get_width() for bar in drawn["Time by stage"].figure.axes[0].patches] == [3.5]


def test_win_rates_show_the_share_of_prompts_won(tmp_path):
    run = read_run(write_fake_run(tmp_path))
    drawn, _ = _drawn(tmp_path)
    axis = drawn["Win rate by judge"].figure.axes[0]
    assert {line.get_solid_capstyle() for line in axis.lines} == {"butt"}  # a bar ends where its interval does
    texts = [text.get_text() for text in axis.texts]
    expected = []
    for judge in run.summary["judges"]:
        rates = [run.summary[when]["win_rate"][judge] for when in ("before", "after")]
        expected += [judge, f"before {100 * rates[0]:.0f}%", f"after {100 * rates[1]:.0f}%"]
    assert texts == expected


def test_evaluations_on_the_way(tmp_path):
    metrics = Metrics(tmp_path)
    for step, when in ((0, "before"), (5, "step"), (10, "after")):
        metrics.log("eval", step, {"eval/when": when, "eval/score/rubric": 0.1 * step, "eval/kl": 0.5 * step})
    metrics.close()
    drawn, _ = _drawn(tmp_path)
    scores, kl = drawn["Evaluation during the run"].figure.axes
    assert scores.get_title(loc="left") == "mean score"
    np.testing.assert_allclose(scores.lines[0].get_ydata(), [0.0, 0.5, 1.0])
    np.testing.assert_allclose(kl.lines[0].get_ydata(), [0.0, 2.5, 5.0])


def test_the_seconds_of_a_stage_are_counted_once(tmp_path):
    run = read_run(write_fake_run(tmp_path / "whole"))
    assert sum(stage_seconds(run).values()) == pytest.approx(run.summary["seconds"]["total"])
    killed = read_run(write_fake_run(tmp_path / "killed", finished=False))
    assert stage_seconds(killed)["rollout"] == pytest.approx(28.4)


def test_smoothing_keeps_lines_straight_and_ignores_gaps():
    line = 3.0 - 0.25 * np.arange(50)
    np.testing.assert_allclose(plots._smoothed(line, 5), line, atol=1e-9)
    gaps = np.where(np.arange(50) % 7 == 0, math.nan, line)
    np.testing.assert_allclose(plots._smoothed(gaps, 5), line, atol=1e-9)
    assert np.isnan(plots._smoothed(np.full(4, math.nan), 1)).all()
    noise = np.random.default_rng(0).normal(size=400)
    assert plots._smoothed(noise, 20).std() < 0.4 * noise.std()


def test_svg_stands_alone_on_a_page(tmp_path):
    drawn, _ = _drawn(write_fake_run(tmp_path, phases=3, steps=90))
    ids: list[str] = []
    for number, plot in enumerate(drawn.values()):
        svg = plot.svg(f"f{number}")
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == plot.title
        own = re.findall(r'\bid="([^"]+)"', svg)
        assert all(name in own for name in re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        ids += own
        # Text stays text, in the page's font; every color is the page's.
        assert "<text" in svg
        assert "DejaVu" not in svg
        assert not re.findall(r"(?:fill|stroke): (#\w+)", svg)
        assert not re.findall(r'(?:href|src)="(?!#)', svg)
    assert len(ids) == len(set(ids))
    assert plot.svg("f") == plot.svg("f")


def test_a_figure_that_cannot_be_written_is_named(tmp_path):
    plot = Plot("title", "caption", Figure())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        with pytest.raises(OSError) as caught:
            plot.save(tmp_path / "figure")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "figure.png"))
