"""The figures of one run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bpo_fast.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PINK, STYLE, Plot, stack
from bpo_fast.run_folder import RunFolder, judges, printable, results, stage_seconds, wins
from bpo_fast.stats import bootstrap

WIDTH_IN = 4.4
MAX_POINTS = 1000
MAX_MARKED_PHASES = 16
SMOOTHED_FROM = 60


def plots(run: RunFolder) -> tuple[list[Plot], list[str]]:
    """Draw every figure whose numbers are there.

    Returns:
        The figures in reading order, and the titles of those that a complete run would have had as well.
    """
    drawn, missing = [], []
    optional = OPTIONAL_FIGURES + (PHASE_FIGURES if len(run.phases) == 1 else ())
    for title, caption, draw in FIGURES:
        with matplotlib.rc_context(STYLE):
            figure = draw(run)
        if figure is not None:
            drawn.append(Plot(title, caption, figure))
        elif title not in optional:
            missing.append(title)
    return drawn, missing


def _series(lines: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """[n] float64 positions and values of the lines that carry `y`; a null is NaN and leaves a gap."""
    points = [(line[x], line[y]) for line in lines if y in line and isinstance(line.get(x), int | float)]
    values = np.array([math.nan if value is None else value for _, value in points], dtype=np.float64)
    if not np.isfinite(values).any():
        return None
    return np.array([position for position, _ in points], dtype=np.float64), values


def _phase_series(run: RunFolder, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The same over phases, which people count from 1."""
    series = _series(run.phases, "phase", y)
    return None if series is None else (series[0] + 1, series[1])


def _panels(num: int, height: float = 1.75) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_IN, height * num + 0.35))
    axes = figure.subplots(num, 1, sharex=True, squeeze=False)
    for axis in axes[:, 0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    return figure, list(axes[:, 0])


def _legend(axis: Axes) -> None:
    axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=4, borderaxespad=0.1, columnspacing=1.0)


def _line(
    axis: Axes, series: tuple[np.ndarray, np.ndarray], color: str, label: str | None = None, starts: Sequence[int] = ()
) -> None:
    """A line with a marker at each of few points, or the smoothed line of each phase over the faint one of many."""
    x, y = series
    if len(x) < SMOOTHED_FROM:
        axis.plot(x, y, color=color, label=label, marker="o" if len(x) <= 24 else None)
        return
    stride = math.ceil(len(x) / MAX_POINTS)
    axis.plot(x[::stride], y[::stride], color=color, alpha=0.25, linewidth=0.8)
    # A refresh of the behavior makes the curve jump; smoothing across it would show a slope that never was.
    phases = np.split(np.arange(len(x)), np.searchsorted(x, starts))
    for rows in phases:
        axis.plot(x[rows][::stride], _smoothed(y[rows], len(y) // 30)[::stride], color=color, label=label)
        label = None


def _smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """The straight line fitted to the finite values within `half` positions, taken at each position."""
    position = np.arange(len(values), dtype=np.float64)
    finite = np.isfinite(values)
    y = np.where(finite, values, 0.0)
    low = np.maximum(position - half, 0).astype(int)
    high = np.minimum(position + half + 1, len(values)).astype(int)

    def window(terms: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(terms * finite)])
        return total[high] - total[low]

    num, x_sum, y_sum = window(np.ones_like(y)), window(position), window(y)
    spread = num * window(position**2) - x_sum**2
    slope = np.where(spread > 0, num * window(position * y) - x_sum * y_sum, 0.0) / np.maximum(spread, 1.0)
    return np.where(num > 0, (y_sum + slope * (num * position - x_sum)) / np.maximum(num, 1), math.nan)


def _phase_starts(run: RunFolder) -> list[int]:
    """First step of each phase but the first, unless there are too many phases to tell apart."""
    starts: dict[int, int] = {}
    for line in run.steps:
        if "phase" in line and "step" in line:
            starts.setdefault(line["phase"], line["step"])
    return list(starts.values())[1:] if len(starts) <= MAX_MARKED_PHASES else []


def _stacked(run: RunFolder, rows: Sequence[Sequence[tuple[str, str, str]]], titles: Sequence[str]) -> Figure | None:
    """Panels over steps, one a row of (metric, color, legend)."""
    found = [[(_series(run.steps, "step", y), color, label) for y, color, label in row] for row in rows]
    kept = [(title, row) for title, row in zip(titles, found, strict=True) if any(series for series, _, _ in row)]
    if not kept:
        return None
    figure, axes = _panels(len(kept))
    starts = _phase_starts(run)
    for axis, (title, row) in zip(axes, kept, strict=True):
        for series, color, label in row:
            if series is not None:
                _line(axis, series, color, label, starts)
        for start in starts:
            axis.axvline(start - 0.5, color=GRAY, linestyle=":", linewidth=1.0)
        axis.set_title(title)
        axis.yaxis.set_major_formatter("{x:g}")
        if len(row) > 1:
            _legend(axis)
    axes[-1].set_xlabel("optimizer step")
    return figure


def _by_phase(run: RunFolder, rows: Sequence[tuple[str, str, str]], *, from_zero: bool = True) -> Figure | None:
    """Panels over phases, one a (metric, color, title); from zero where a ratio of two heights has a meaning."""
    kept = [(series, color, title) for y, color, title in rows if (series := _phase_series(run, y))]
    if not kept or len(run.phases) == 1:
        return None
    figure, axes = _panels(len(kept))
    for axis, (series, color, title) in zip(axes, kept, strict=True):
        _line(axis, series, color)
        axis.set_title(title)
        axis.margins(y=0.15)
        if from_zero:
            axis.set_ylim(bottom=min(0.0, float(np.nanmin(series[1]))), top=1.2 * float(np.nanmax(series[1])) or 1.0)
    _phase_axis(axes[-1], run)
    return figure


def _phase_axis(axis: Axes, run: RunFolder) -> None:
    axis.set_xlabel("phase")
    num = len(run.phases)
    if num <= 10:
        axis.set_xticks([line["phase"] + 1 for line in run.phases if "phase" in line])
        axis.set_xlim(0.5, num + 0.5)


def _loss(run: RunFolder) -> Figure | None:
    rows = [[("loss", BLUE, "")], [("rewards/margins", GREEN, "")]]
    return _stacked(run, rows, ("loss", "margin: reward of chosen - reward of rejected"))


def _rewards(run: RunFolder) -> Figure | None:
    both = [("rewards/chosen", BLUE, "chosen"), ("rewards/rejected", ORANGE, "rejected")]
    return _stacked(run, [both, [("rewards/accuracies", GREEN, "")]], ("reward", "share of pairs in the right order"))


def _optimizer(run: RunFolder) -> Figure | None:
    return _stacked(run, [[("grad_norm", PINK, "")], [("learning_rate", GRAY, "")]], ("gradient norm", "learning rate"))


def _scores(run: RunFolder) -> Figure | None:
    rows = [("objective/scores", BLUE, "mean score"), ("objective/scores_margin", GREEN, "chosen - rejected")]
    return _by_phase(run, rows, from_zero=False)


def _drift(run: RunFolder) -> Figure | None:
    rows = [("objective/kl", ORANGE, "KL to the start (nats a completion)"), ("objective/entropy", PINK, "entropy")]
    return _by_phase(run, rows)


def _win_rates(run: RunFolder) -> Figure | None:
    rows = []
    for judge in dict.fromkeys([*results(run, "before").get("win_rate", {}), *judges(run.eval_rows)]):
        sides = [(when, list(wins(run, when, judge).values())) for when in ("before", "after")]
        if any(values for _, values in sides):
            rows.append((judge, [(when, bootstrap(values)) for when, values in sides if values]))
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH_IN, 0.85 * len(rows) + 0.9))
    axis = figure.subplots()
    for index, (judge, sides) in enumerate(rows):
        axis.text(0, index - 0.33, _shortened(judge), fontsize=9)
        for when, interval in sides:
            y = index + (0.22 if when == "after" else -0.06)
            color, face = (BLUE, BLUE) if when == "after" else (GRAY, "none")
            axis.plot([interval.low, interval.high], [y, y], color=color, linewidth=2)
            axis.plot(interval.mean, y, "o", color=color, markersize=6, markerfacecolor=face)
            text = f"{when} {100 * interval.mean:.0f}%"
            right = interval.high < 0.75
            axis.text(
                interval.high + 0.02 if right else interval.low - 0.02,
                y,
                text,
                va="center",
                ha="left" if right else "right",
                fontsize=8.5,
            )
    axis.axvline(0.5, color=GRAY, linestyle=":", linewidth=1.0)
    axis.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.55), yticks=[], xlabel="win rate against the reference text")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.spines["left"].set_visible(False)
    return figure


def _shortened(name: str, limit: int = 46) -> str:
    name = printable(name)
    return name if len(name) <= limit else "..." + name[3 - limit :]


def _lengths(run: RunFolder) -> Figure | None:
    rows = [
        ("completions/mean_length", BLUE, "mean completion length (tokens)"),
        ("completions/clipped_ratio", ORANGE, "share truncated"),
    ]
    return _by_phase(run, rows)


def _diversity(run: RunFolder) -> Figure | None:
    rows = [("completions/distinct_2", GREEN, "distinct-2"), ("completions/unique", PINK, "share of unique outputs")]
    return _by_phase(run, rows)


def _pairs(run: RunFolder) -> Figure | None:
    kinds = [("kept", BLUE), ("tied", ORANGE), ("identical", PINK), ("unscored", GRAY)]
    found = [(name, color, _phase_series(run, f"pairs/{name}")) for name, color in kinds]
    present = [(name, color, series) for name, color, series in found if series is not None and series[1].any()]
    if not present:
        return None
    figure, (axis,) = _panels(1, height=2.4)
    positions = present[0][2][0]
    stack(axis, positions, [(name, color, values) for name, color, (_, values) in present], width=0.7)
    axis.set_title("pairs")
    _legend(axis)
    _phase_axis(axis, run)
    return figure


def _seconds(run: RunFolder) -> Figure | None:
    seconds = stage_seconds(run)
    if not seconds:
        return None
    figure = Figure(figsize=(WIDTH_IN, 0.3 * len(seconds) + 0.8))
    axis = figure.subplots()
    names = list(seconds)
    bars = axis.barh(names, list(seconds.values()), color=BLUE, height=0.62)
    axis.bar_label(bars, [f"{value:,.1f}" for value in seconds.values()], padding=3, fontsize=8.5, color=INK)
    axis.invert_yaxis()
    axis.margins(x=0.16)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("seconds")
    return figure


def _machine(run: RunFolder) -> Figure | None:
    rows = [
        ("perf/tokens_per_s", GREEN, "tokens a second"),
        ("perf/peak_memory_gib", ORANGE, "peak memory (GiB)"),
    ]
    return _by_phase(run, rows)


def _during(run: RunFolder) -> Figure | None:
    """Evaluations inside the run, where there were any."""
    if not any(line.get("eval/when") == "step" for line in run.evals):
        return None
    names = [name for line in run.evals for name in line]
    section = "eval/win_rate/" if any(name.startswith("eval/win_rate/") for name in names) else "eval/score/"
    found = dict.fromkeys(name for name in names if name.startswith(section))
    figure, axes = _panels(2)
    for name, color in zip(found, (BLUE, ORANGE, GREEN, PINK), strict=False):
        if series := _series(run.evals, "step", name):
            _line(axes[0], series, color, _shortened(name.removeprefix(section), 20))
    axes[0].set_title("win rate" if section == "eval/win_rate/" else "mean score")
    _legend(axes[0])
    if series := _series(run.evals, "step", "eval/kl"):
        _line(axes[1], series, ORANGE)
    axes[1].set_title("KL to the start (nats a completion)")
    axes[1].set_xlabel("optimizer step")
    return figure


FIGURES: tuple[tuple[str, str, Callable[[RunFolder], Figure | None]], ...] = (
    (
        "Win rate by judge",
        "Share of held-out prompts whose output the judge scores above the reference text. Bars are 95% bootstrap "
        "intervals over prompts.",
        _win_rates,
    ),
    (
        "Loss and margin",
        "Dotted lines: a new phase begins and the behavior LLM is refreshed. Where there are two lines, the faint one "
        "is each step, the strong one is smoothed within the phase.",
        _loss,
    ),
    (
        "Rewards",
        "Reward: beta times the log-prob ratio of policy and reference; under BPO each phase starts at 0.",
        _rewards,
    ),
    ("Annotator scores", "What the annotator of the training thinks of the samples of each phase.", _scores),
    ("Drift", "How far the sampling policy is from the initial one, and how random it still is.", _drift),
    (
        "Completions",
        "Lengths and truncation of the sampled completions: the first places where hacking shows.",
        _lengths,
    ),
    ("Diversity", "Shares of distinct bigrams and of distinct outputs among the samples.", _diversity),
    ("Pairs", "Tied, identical and unscored pairs are dropped and not trained on.", _pairs),
    ("Optimizer", "Gradient norm before clipping, and the one schedule over all phases.", _optimizer),
    ("Time by stage", "Seconds of the whole run.", _seconds),
    ("Speed and memory", "Tokens sampled and trained on a second, and the peak of memory, by phase.", _machine),
    ("Evaluation during the run", "Held-out prompts, at the steps where the run was evaluated.", _during),
)
# Only runs with reference texts, and runs that were evaluated on the way, have these.
OPTIONAL_FIGURES = ("Win rate by judge", "Evaluation during the run")
# One phase is a point, not a curve: the table of the phases has its numbers.
PHASE_FIGURES = ("Annotator scores", "Drift", "Completions", "Diversity", "Speed and memory")
