"""The figures of many runs: what the methods, losses, phases and members of a sweep do to the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bpo_fast.drawing import FULL_WIDTH_IN, GRAY, HALF_WIDTH_IN, MAX_ROWS, STYLE, Plot, legend_below, rows_left_out
from bpo_fast.groups import (
    METHOD_WORDS,
    Group,
    Place,
    group_words,
    judge_names,
    main_judge,
    phase_order,
    tasks_and_losses,
    without,
)
from bpo_fast.run_folder import loss_name
from bpo_fast.stats import AGGREGATES, aggregates
from bpo_fast.sweep_costs import costs_by_phase, costs_left_out, costs_of_runs, phases_left_out
from bpo_fast.sweep_curves import (
    COLORS,
    curves_left_out,
    ensembles_left_out,
    judges_left_out,
    margins_and_lengths,
    reference_ablation,
    references_left_out,
    reward_and_kl,
    stability,
    std_bars,
)

MARKERS = {"bpo": "o", "online": "s", "on-policy": "D", "offline": "X", "ema": "^", "golden": "*", "moving-ref": "v"}


def sweep_plots(groups: Sequence[Group]) -> list[Plot]:
    """Every figure for which the runs have the numbers, in reading order."""
    drawn = []
    for kind in FIGURES:
        with matplotlib.rc_context(STYLE):
            figure = kind.draw(groups)
        if figure is not None:
            drawn.append(Plot(kind.title, f"{kind.caption} {kind.left_out(groups)}".strip(), figure))
    return drawn


def frequency_series(groups: Sequence[Group], task: str, loss: str, judge: str) -> dict[str, dict[Any, list[float]]]:
    """Win rates of every seed by method and F: {"bpo": {1: [...], 2: [...]}}, for one member.

    Offline runs are the point F = 1 of BPO and of online training, on-policy runs the point F = T of the latter.
    """
    found: dict[str, dict[Any, list[float]]] = {}
    for group in groups:
        place = group.place
        if place.task_and_loss != (task, loss):
            continue
        rates = list(group.values("win_rate", judge).values())
        for owner in _owners(place) if rates else ():
            found.setdefault(owner, {})[place.phases] = rates
    return {method: by_phases for method, by_phases in found.items() if len(by_phases) > 1}


def _owners(place: Place) -> tuple[str, ...]:
    """The methods that have a point of their curve over F there."""
    if place.members > 1 or place.extra:
        return ()
    return {"offline": ("bpo", "online"), "on-policy": ("online",)}.get(place.method, (place.method,))


def _frequency(groups: Sequence[Group]) -> Figure | None:
    judge = main_judge(groups)
    places = tasks_and_losses(groups)
    series = {place: frequency_series(groups, *place, judge) for place in places} if judge else {}
    series = {place: found for place, found in series.items() if found}
    if not series:
        return None
    tasks, losses = (list(dict.fromkeys(place[n] for place in series)) for n in (0, 1))
    width = max(HALF_WIDTH_IN, 3.1 * len(losses))
    figure = Figure(figsize=(width, 2.7 * len(tasks) + 0.3))
    axes = figure.subplots(len(tasks), len(losses), sharey=True, squeeze=False)
    phases = sorted({p for found in series.values() for by in found.values() for p in by}, key=phase_order)
    for row, task in enumerate(tasks):
        for column, loss in enumerate(losses):
            axis = axes[row, column]
            found = series.get((task, loss), {})
            for n, (method, by_phases) in enumerate(sorted(found.items())):
                known = [p for p in phases if p in by_phases]
                # a little apart, so that bars of equal height do not hide each other
                x = np.array([phases.index(p) for p in known]) + 0.08 * (n - (len(found) - 1) / 2)
                rates = [by_phases[p] for p in known]
                axis.errorbar(
                    x,
                    [np.mean(r) for r in rates],
                    std_bars(rates),
                    color=COLORS[method],
                    marker=MARKERS[method],
                    capsize=3,
                    label=METHOD_WORDS[method],
                )
            axis.set_title(f"{task}, {loss_name(loss)}" if len(tasks) > 1 else loss_name(loss))
            axis.set_xticks(range(len(phases)), [str(p) for p in phases])
            axis.set_xlim(-0.4, len(phases) - 0.6)
            axis.set_xlabel("phases F")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[row, 0].set_ylabel(f"win rate, {judge}")
    legend_below(figure, axes[0, 0])
    return figure


def _aggregates(groups: Sequence[Group]) -> Figure | None:
    judge = main_judge(groups)
    rows = aggregate_rows(groups, judge) if judge else {}
    if not rows or max(num for num, _ in rows.values()) < 2:
        return None
    rows = dict(list(rows.items())[:MAX_ROWS])
    figure = Figure(figsize=(FULL_WIDTH_IN, 0.27 * len(rows) + 1.0))
    axes = figure.subplots(1, len(AGGREGATES), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, AGGREGATES, strict=True):
        for y, (label, (_, found)) in enumerate(rows.items()):
            color = COLORS.get(label[1], GRAY)
            axis.plot([found[name].low, found[name].high], [y, y], color=color, linewidth=4, alpha=0.45)
            axis.plot(found[name].mean, y, "|", color=color, markersize=11, markeredgewidth=2)
        axis.set_title(name)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=3, min_n_ticks=2))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [label[0] for label in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    limits = [axis.get_xlim() for axis in axes[:-1]]
    for axis in axes[:-1]:
        axis.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    return figure


def aggregate_rows(groups: Sequence[Group], judge: str) -> dict[tuple[str, str], tuple[int, dict[str, Any]]]:
    """(label, method) -> (number of runs, aggregates over tasks and seeds), a row for each loss and place."""
    strata: dict[tuple[str, str], list[list[float]]] = {}
    several = len({g.place.loss for g in groups}) > 1
    for group in groups:
        rates = list(group.values("win_rate", judge).values())
        label = (f"{loss_name(group.place.loss)}, " if several else "") + group.place.label
        if rates:
            strata.setdefault((label, group.place.method), []).append(rates)
    return {key: (sum(map(len, runs)), aggregates(runs)) for key, runs in strata.items()}


def _overoptimised(groups: Sequence[Group]) -> Figure | None:
    judges = judge_names(groups)
    if len(judges) < 2:
        return None
    figure = Figure(figsize=(HALF_WIDTH_IN, 3.6))
    axis = figure.subplots()
    seen: set[str] = set()
    for group in groups:
        points = [
            (line[f"eval/score/{judges[1]}"], line[f"eval/score/{judges[0]}"])
            for run in group.runs.values()
            for line in run.evals
            if all(line.get(f"eval/score/{j}") is not None for j in judges[:2])
        ]
        if points:
            method = group.place.method
            label = None if method in seen else METHOD_WORDS.get(method, method)
            seen.add(method)
            axis.plot(
                *zip(*points, strict=True),
                MARKERS.get(method, "o"),
                color=COLORS.get(method, GRAY),
                alpha=0.45,
                markersize=4,
                markeredgewidth=0,
                label=label,
            )
    if not seen:
        return None
    axis.set(xlabel=f"mean score, {judges[1]}", ylabel=f"mean score, {judges[0]}")
    legend_below(figure, axis)
    return figure


def _off_the_frequency_curves(groups: Sequence[Group]) -> str:
    judge = main_judge(groups) or ""
    series = {place: frequency_series(groups, *place, judge) for place in tasks_and_losses(groups)}
    drawn = [g for g in groups if any(m in series[g.place.task_and_loss] for m in _owners(g.place))]
    left = group_words(groups, without(groups, drawn))
    return f"A curve has one member, no further settings and several F; left out: {left}." if left else ""


def _aggregates_left_out(groups: Sequence[Group]) -> str:
    return rows_left_out(len(aggregate_rows(groups, main_judge(groups) or "")))


def _curves_and_judges_left_out(groups: Sequence[Group]) -> str:
    return f"{curves_left_out(groups)} {judges_left_out(groups)}".strip()


@dataclass(frozen=True)
class Kind:
    """One figure of the report.

    Attributes:
        title, caption: of the figure; the caption says how to read it.
        draw: the figure, or None where the runs have not the numbers.
        left_out: one sentence on what is not in it and why, or "".
    """

    title: str
    caption: str
    draw: Callable[[Sequence[Group]], Figure | None]
    left_out: Callable[[Sequence[Group]], str] = lambda groups: ""


FIGURES = (
    Kind(
        "Win rate against F",
        "Mean over seeds, bars of one std within 0% and 100%. F = 1 is offline, where all curves start; T is a phase a "
        "step.",
        _frequency,
        _off_the_frequency_curves,
    ),
    Kind(
        "Aggregates",
        "Win rates over seeds and tasks with 95% stratified-bootstrap intervals. A small optimality gap is good.",
        _aggregates,
        _aggregates_left_out,
    ),
    Kind(
        "Reference ablation",
        "Evaluations on the way: medians over seeds, bands from the first to the third quartile.",
        reference_ablation,
        references_left_out,
    ),
    Kind(
        "Stability",
        "One member against an ensemble; curves: medians over seeds, bands from the first to the third quartile.",
        stability,
        ensembles_left_out,
    ),
    Kind(
        "Reward and KL",
        "Medians over seeds at each evaluation, from the start on; dots are the ends of the single runs.",
        reward_and_kl,
        _curves_and_judges_left_out,
    ),
    Kind(
        "Two judges",
        "Every evaluation of every run. Where one score rises and the other does not, it is over-optimised.",
        _overoptimised,
        judges_left_out,
    ),
    Kind("Margins and lengths", "Medians over seeds.", margins_and_lengths, curves_left_out),
    Kind("Time and memory", "Of a whole run; evaluations included.", costs_of_runs, costs_left_out),
    Kind(
        "Time and memory by phase",
        "Seconds of each phase by stage, each method on its own scale, and the peak of memory during it; means over "
        "seeds. Evaluations take no part in the seconds.",
        costs_by_phase,
        phases_left_out,
    ),
)
