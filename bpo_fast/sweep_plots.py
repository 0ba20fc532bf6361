"""The figures of many runs: what the methods, losses, phases and members of a sweep do to the result."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bpo_fast.drawing import (
    AMBER,
    BLUE,
    FULL_WIDTH_IN,
    GRAY,
    GREEN,
    HALF_WIDTH_IN,
    MAX_ROWS,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    Plot,
    legend_below,
)
from bpo_fast.grid import EVERY_STEP
from bpo_fast.groups import METHOD_WORDS, Group, Place, judge_names, main_groups, main_place, tasks_and_losses
from bpo_fast.stats import AGGREGATES, aggregates
from bpo_fast.sweep_costs import costs_by_phase, costs_of_runs

COLORS = {"bpo": BLUE, "online": ORANGE, "on-policy": PINK, "offline": GRAY}
COLORS |= {"ema": GREEN, "golden": AMBER, "moving-ref": SKY}
MARKERS = {"bpo": "o", "online": "s", "on-policy": "D", "offline": "X", "ema": "^", "golden": "*", "moving-ref": "v"}
REFERENCES = ("online", "on-policy", "ema", "golden", "bpo", "moving-ref")
WIDE_KL = 30.0  # nats; above that the axis is logarithmic from 1 on


def sweep_plots(groups: Sequence[Group]) -> list[Plot]:
    """Every figure for which the runs have the numbers, in reading order."""
    drawn = []
    for title, caption, draw in FIGURES:
        with matplotlib.rc_context(STYLE):
            figure = draw(groups)
        if figure is not None:
            drawn.append(Plot(title, caption, figure))
    return drawn


def frequency_series(groups: Sequence[Group], task: str, loss: str, judge: str) -> dict[str, dict[Any, list[float]]]:
    """Win rates of every seed by method and F: {"bpo": {1: [...], 2: [...]}}, for one member.

    Offline runs are the point F = 1 of BPO and of online training, on-policy runs the point F = T of the latter.
    """
    found: dict[str, dict[Any, list[float]]] = {}
    for group in groups:
        place = group.place
        if (place.task, place.loss, place.members) != (task, loss, 1) or place.extra:
            continue
        rates = list(group.values("win_rate", judge).values())
        owners = {"offline": ("bpo", "online"), "on-policy": ("online",)}.get(place.method, (place.method,))
        for owner in owners if rates else ():
            found.setdefault(owner, {})[place.phases] = rates
    return {method: by_phases for method, by_phases in found.items() if len(by_phases) > 1}


def _frequency(groups: Sequence[Group]) -> Figure | None:
    judge = _main_judge(groups)
    places = tasks_and_losses(groups)
    series = {place: frequency_series(groups, *place, judge) for place in places} if judge else {}
    series = {place: found for place, found in series.items() if found}
    if not series:
        return None
    tasks, losses = (list(dict.fromkeys(place[n] for place in series)) for n in (0, 1))
    width = max(HALF_WIDTH_IN, 3.1 * len(losses))
    figure = Figure(figsize=(width, 2.7 * len(tasks) + 0.3))
    axes = figure.subplots(len(tasks), len(losses), sharey=True, squeeze=False)
    phases = sorted({p for found in series.values() for by in found.values() for p in by}, key=_phase_order)
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
                    [_std(r) for r in rates],
                    color=COLORS[method],
                    marker=MARKERS[method],
                    capsize=3,
                    label=METHOD_WORDS[method],
                )
            axis.set_title(f"{task}, {loss.upper()}" if len(tasks) > 1 else loss.upper())
            axis.set_xticks(range(len(phases)), [str(p) for p in phases])
            axis.set_xlim(-0.4, len(phases) - 0.6)
            axis.set_xlabel("phases F")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[row, 0].set_ylabel(f"win rate, {judge}")
    legend_below(figure, axes[0, 0])
    return figure


def _aggregates(groups: Sequence[Group]) -> Figure | None:
    judge = _main_judge(groups)
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
        label = (f"{group.place.loss.upper()}, " if several else "") + group.place.label
        if rates:
            strata.setdefault((label, group.place.method), []).append(rates)
    return {key: (sum(map(len, runs)), aggregates(runs)) for key, runs in strata.items()}


def curve(group: Group, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [n], values [runs, n]) of an evaluation's number, at the steps where every run was evaluated."""
    by_run = [
        {line["step"]: line[key] for line in run.evals if line.get(key) is not None} for run in group.runs.values()
    ]
    by_run = [found for found in by_run if found]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if len(steps) < 2:
        return None
    return np.array(steps), np.array([[found[s] for s in steps] for found in by_run], dtype=np.float64)


def _over_steps(axis: Axes, groups: Sequence[Group], key: str, labels: Mapping[Place, str]) -> bool:
    """Mean over seeds with a band of one std, a line a group; False if nobody has the numbers."""
    drawn = False
    for n, group in enumerate(groups):
        found = curve(group, key)
        if found is None:
            continue
        drawn = True
        steps, values = found
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
        color = _color(groups, n)
        axis.plot(steps, mean, color=color, marker="o", label=labels[group.place])
        axis.fill_between(steps, mean - std, mean + std, color=color, alpha=0.13, linewidth=0)
    axis.set_xlabel("optimizer step")
    return drawn


def _reference(groups: Sequence[Group]) -> Figure | None:
    judge = _main_judge(groups)
    sets: dict[tuple, list[Group]] = {}
    for group in groups:
        place = group.place
        if place.method in REFERENCES and place.phases != 1:
            sets.setdefault((place.task, place.loss, place.phases, place.members), []).append(group)
    compared = [found for found in sets.values() if len({g.place.method for g in found}) > 1]
    if not judge or not compared:
        return None
    best = max(compared, key=lambda found: (len(found), sum(len(g.runs) for g in found)))
    place = best[0].place
    figure, axes = _two_panels()
    labels = {g.place: METHOD_WORDS[g.place.method] for g in best}
    drawn = [
        _over_steps(axes[0], best, f"eval/win_rate/{judge}", labels),
        _over_steps(axes[1], best, "eval/kl", labels),
    ]
    if not drawn[0]:
        return None
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_title(f"win rate, {judge} ({place.loss.upper()}, F={place.phases})")
    axes[1].set_title("KL to the start (nats)")
    legend_below(figure, axes[0])
    return figure


def _stability(groups: Sequence[Group]) -> Figure | None:
    judge = _main_judge(groups)
    sets: dict[tuple, list[Group]] = {}
    for group in groups:
        place = group.place
        sets.setdefault((place.task, place.loss, place.method, place.phases, place.extra), []).append(group)
    compared = [found for found in sets.values() if len(found) > 1]
    if not judge or not compared:
        return None
    best = max(compared, key=lambda found: min(len(g.runs) for g in found))
    figure, axes = _two_panels()
    labels = {g.place: f"{g.place.members} member{'' if g.place.members == 1 else 's'}" for g in best}
    _over_steps(axes[0], best, f"eval/win_rate/{judge}", labels)
    for n, group in enumerate(best):
        rates = list(group.values("win_rate", judge).values())
        spread = 0.1 * (np.arange(len(rates)) % 3 - 1)
        color = _color(best, n)
        axes[1].plot(n + spread, rates, "o", color=color, alpha=0.6, linestyle="none")
        axes[1].errorbar(n + 0.25, np.mean(rates), _std(rates), color=color, marker="_", capsize=4)
    axes[0].set_title(f"win rate, {judge}")
    axes[1].set_title("final win rate by seed; bar: mean and std")
    axes[1].set_xticks(range(len(best)), [labels[g.place] for g in best])
    axes[1].set_xlim(-0.5, len(best) - 0.3)
    for axis in axes:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_below(figure, axes[0])
    return figure


def _reward_and_kl(groups: Sequence[Group]) -> Figure | None:
    shown = main_groups(groups)
    judges = judge_names(shown)[:2]
    curves = {j: [(g, curve(g, f"eval/win_rate/{j}"), curve(g, "eval/kl")) for g in shown] for j in judges}
    if not any(win is not None and kl is not None for found in curves.values() for _, win, kl in found):
        return None
    figure = Figure(figsize=(HALF_WIDTH_IN * len(judges), 3.2))
    axes = figure.subplots(1, len(judges), squeeze=False)[0]
    for axis, judge in zip(axes, judges, strict=True):
        for n, (group, win, kl) in enumerate(curves[judge]):
            if win is None or kl is None:
                continue
            color = _color(shown, n)
            middle = np.median(kl[1], 0), np.median(win[1], 0)  # a run that collapses has a KL of hundreds of nats
            axis.plot(*middle, color=color, marker="o", label=group.place.label)
            axis.plot(kl[1][:, -1], win[1][:, -1], ".", color=color, alpha=0.35, markersize=5)
        axis.set_title(f"{main_place(groups)}win rate, {judge}")
        axis.set_xlabel("KL to the start (nats a completion; lines: medians)")
        if axis.get_xlim()[1] > WIDE_KL:
            axis.set_xscale("symlog", linthresh=1.0)
            axis.set_xlim(left=0.0)
            axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_below(figure, axes[0])
    return figure


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


def _margins_and_lengths(groups: Sequence[Group]) -> Figure | None:
    shown = main_groups(groups)
    figure, axes = _two_panels()
    drawn = False
    for n, group in enumerate(shown):
        found = [
            {line["step"]: line["rewards/margins"] for line in r.steps if line.get("rewards/margins") is not None}
            for r in group.runs.values()
        ]
        steps = sorted(set.intersection(*map(set, found))) if found and all(found) else []
        if steps:
            drawn = True
            mean = np.mean([[by[s] for s in steps] for by in found], axis=0)
            axes[0].plot(steps, mean, color=_color(shown, n), label=group.place.label)
    labels = {g.place: g.place.label for g in shown}
    drawn |= _over_steps(axes[1], shown, "eval/mean_length", labels)
    if not drawn:
        return None
    axes[0].set_title(f"{main_place(groups)}margin: reward of chosen - rejected")
    axes[0].set_xlabel("optimizer step")
    axes[1].set_title("mean length of greedy answers (tokens)")
    legend_below(figure, axes[0] if axes[0].lines else axes[1])
    return figure


def _color(groups: Sequence[Group], n: int) -> str:
    """The method's own color, or one of the others where a method is there twice."""
    method = groups[n].place.method
    if [g.place.method for g in groups[:n]].count(method) == 0 and method in COLORS:
        return COLORS[method]
    free = [
        c for c in (*COLORS.values(), "#8856a7", "#222222") if c not in {COLORS.get(g.place.method) for g in groups}
    ]
    return (free or [GRAY])[n % max(1, len(free))]


def _main_judge(groups: Sequence[Group]) -> str | None:
    names = judge_names(groups)
    return names[0] if names else None


def _two_panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(FULL_WIDTH_IN, 3.2))
    return figure, list(figure.subplots(1, 2))


def _phase_order(phases: Any) -> float:
    return float("inf") if phases == EVERY_STEP else float(phases)


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


FIGURES: tuple[tuple[str, str, Callable[[Sequence[Group]], Figure | None]], ...] = (
    (
        "Win rate against F",
        "Mean over seeds, bars of one std. F = 1 is offline, where all curves start; T is a phase a step.",
        _frequency,
    ),
    (
        "Aggregates",
        "Win rates over seeds and tasks with 95% stratified-bootstrap intervals. A small optimality gap is good.",
        _aggregates,
    ),
    ("Reference ablation", "Evaluations on the way; bands of one std over seeds.", _reference),
    ("Stability", "One member against an ensemble.", _stability),
    (
        "Reward and KL",
        "Mean over seeds at each evaluation, from the start on; dots are the ends of the single runs.",
        _reward_and_kl,
    ),
    (
        "Two judges",
        "Every evaluation of every run. Where one score rises and the other does not, it is over-optimised.",
        _overoptimised,
    ),
    ("Margins and lengths", "Means over seeds.", _margins_and_lengths),
    ("Time and memory", "Of a whole run; evaluations included.", costs_of_runs),
    (
        "Time and memory by phase",
        "Seconds of each phase by stage, each method on its own scale, and the peak of memory during it; means over "
        "seeds. Evaluations take no part in the seconds.",
        costs_by_phase,
    ),
)
