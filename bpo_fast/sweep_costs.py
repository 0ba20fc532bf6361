"""What runs cost: seconds by stage and peak memory, of whole runs and phase by phase."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bpo_fast.drawing import (
    BLUE,
    FULL_WIDTH_IN,
    GRAY,
    GREEN,
    HALF_WIDTH_IN,
    MAX_ROWS,
    ORANGE,
    PINK,
    legend_below,
    rows_left_out,
    stack,
)
from bpo_fast.groups import Group, curve_groups, group_words, of_place, place_words, tasks_and_losses, without
from bpo_fast.run_folder import PHASE_STAGES, STAGES, stage_seconds

COLORS: dict[str, str] = dict(zip(STAGES, (BLUE, ORANGE, GREEN, PINK, GRAY), strict=True))
NUM_COLUMNS = 4
NUM_TITLE_CHARS = 22
MAX_MARKERS = 24


@dataclass(frozen=True)
class PhaseCosts:
    """What each phase of a group costs, in the mean over the runs that say so.

    Attributes:
        phases: [F] numbers of the phases, from 1.
        seconds: stage -> [F] float64 seconds of the phase; evaluations are in none of the stages.
        peak_gib: [F] float64 peak of memory during the phase; None if no run says so.
    """

    phases: np.ndarray
    seconds: dict[str, np.ndarray]
    peak_gib: np.ndarray | None


def phase_costs(group: Group) -> PhaseCosts | None:
    """The costs of the phases that every run of the group has gone through; None if nothing was recorded."""
    by_run = [{line["phase"]: line for line in run.phases if "phase" in line} for run in group.runs.values()]
    by_run = [lines for lines in by_run if lines]
    phases = sorted(set.intersection(*map(set, by_run))) if by_run else []

    def mean(key: str) -> np.ndarray | None:
        rows: list[list[Any]] = [[lines[p].get(key) for p in phases] for lines in by_run]
        known = [row for row in rows if None not in row]
        return np.mean(known, axis=0) if phases and known else None

    seconds = {stage: mean(f"timing/{stage}_s") for stage in PHASE_STAGES}
    found = {stage: values for stage, values in seconds.items() if values is not None}
    peak_gib = mean("perf/peak_memory_gib")
    return PhaseCosts(np.array(phases) + 1, found, peak_gib) if found or peak_gib is not None else None


def costs_of_runs(groups: Sequence[Group]) -> Figure | None:
    """Seconds by stage and peak memory of whole runs, a row a group."""
    rows = []
    for group in groups:
        stages = [stage_seconds(run) for run in group.runs.values()]
        peaks = [r.summary["peak_memory_gib"] for r in group.runs.values() if r.summary.get("peak_memory_gib")]
        if any(stages):
            mean = {name: float(np.mean([s.get(name, 0.0) for s in stages])) for name in STAGES}
            words = filter(None, [place_words(groups, group.place.task_and_loss), group.place.label])
            rows.append((", ".join(words), mean, float(np.mean(peaks)) if peaks else None))
    rows = rows[:MAX_ROWS]
    if not rows:
        return None
    figure = Figure(figsize=(FULL_WIDTH_IN, 0.27 * len(rows) + 1.3))
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
    left = np.zeros(len(rows))
    for name, color in COLORS.items():
        seconds = np.array([stages[name] for _, stages, _ in rows])
        if seconds.any():
            axes[0].barh(range(len(rows)), seconds, left=left, color=color, height=0.66, label=name)
            left += seconds
    for y, (_, _, peak) in enumerate(rows):
        if peak is not None:
            axes[1].plot(peak, y, "o", color=ORANGE)
    axes[0].set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_title("seconds by stage, mean over seeds")
    axes[1].set_title("peak memory (GiB)")
    axes[1].set_xlim(0, 1.15 * max((peak for _, _, peak in rows if peak), default=1.0))
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
    legend_below(figure, axes[0])
    return figure


def costs_left_out(groups: Sequence[Group]) -> str:
    """Rows that costs_of_runs has no room for."""
    return rows_left_out(sum(any(stage_seconds(run) for run in group.runs.values()) for group in groups))


def costs_by_phase(groups: Sequence[Group]) -> Figure | None:
    """Two panels a group of one task and loss: stacked seconds, and below them peak memory."""
    kept = _phase_groups(groups)
    shown = [(g.place.label, costs) for g in kept if (costs := phase_costs(g))]
    if not shown:
        return None
    num_columns = min(NUM_COLUMNS, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    figure = Figure(figsize=(max(HALF_WIDTH_IN, FULL_WIDTH_IN * num_columns / NUM_COLUMNS), 3.1 * num_rows + 0.4))
    panels = figure.subplots(2 * num_rows, num_columns, squeeze=False, height_ratios=(1.7, 1) * num_rows)
    columns = [(panels[2 * row, n], panels[2 * row + 1, n]) for row in range(num_rows) for n in range(num_columns)]
    top_gib = max((float(c.peak_gib.max()) for _, c in shown if c.peak_gib is not None), default=1.0)
    for upper, lower in columns[len(shown) :]:
        upper.remove()
        lower.remove()
    for n, ((upper, lower), (label, costs)) in enumerate(zip(columns, shown, strict=False)):
        parts = [(stage, COLORS[stage], values) for stage, values in costs.seconds.items()]
        stack(upper, costs.phases, parts, width=0.7 if len(costs.phases) <= 8 else 1.0)
        upper.set_title(textwrap.fill(label, NUM_TITLE_CHARS))
        if costs.peak_gib is not None:
            marker = "o" if len(costs.phases) <= MAX_MARKERS else None
            lower.plot(costs.phases, costs.peak_gib, color=ORANGE, marker=marker)
        lower.set_ylim(0, 1.15 * top_gib)
        lower.set_xlabel("phase")
        for axis in (upper, lower):
            _phase_axis(axis, costs.phases)
        if n % num_columns == 0:
            upper.set_ylabel("seconds")
            lower.set_ylabel("peak (GiB)")
    if words := place_words(groups, kept[0].place.task_and_loss):
        figure.suptitle(words, x=0.01, ha="left", fontsize=9.5)
    legend_below(figure, columns[0][0])
    return figure


def phases_left_out(groups: Sequence[Group]) -> str:
    """Groups that costs_by_phase does not draw though it could."""
    left = group_words(groups, [g for g in without(groups, _phase_groups(groups)) if phase_costs(g)])
    return f"For want of room one task and loss; the table of the phases has these as well: {left}." if left else ""


def _phase_groups(groups: Sequence[Group]) -> list[Group]:
    """The curves' groups of the first task and loss that have recorded what a phase cost."""
    known = [g for g in groups if phase_costs(g)]
    return of_place(curve_groups(known), tasks_and_losses(known)[0]) if known else []


def _phase_axis(axis: Axes, phases: np.ndarray) -> None:
    beside = 1.0 if len(phases) == 1 else 0.5  # one bar of the whole width would not look like one
    axis.set_xlim(phases[0] - beside, phases[-1] + beside)
    if len(phases) <= 8:
        axis.set_xticks(phases)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4))
