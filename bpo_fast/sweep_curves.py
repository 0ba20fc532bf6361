"""The curves of many runs: how win rate, KL, margin and length go on, a row of panels for each task and loss."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bpo_fast.drawing import (
    AMBER,
    BLUE,
    FULL_WIDTH_IN,
    GRAY,
    GREEN,
    HALF_WIDTH_IN,
    INK,
    ORANGE,
    PINK,
    VIOLET,
    legend_below,
    paler,
)
from bpo_fast.groups import (
    METHOD_WORDS,
    Group,
    Place,
    curve_groups,
    group_words,
    judge_names,
    main_judge,
    of_place,
    place_words,
    tasks_and_losses,
    without,
)
from bpo_fast.run_folder import loss_name

COLORS = {"bpo": BLUE, "online": ORANGE, "on-policy": PINK, "offline": GRAY}
COLORS |= {"ema": GREEN, "golden": AMBER, "moving-ref": VIOLET}
VARIANT_MARKERS = "osD^vP*X"
PALEST = 0.55
REFERENCES = ("online", "on-policy", "ema", "golden", "bpo", "moving-ref")
WIDE_KL = 30.0  # nats; above that the axis is logarithmic from 1 on
MAX_MARKERS = 12
MAX_JUDGES = 2


def looks(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """How matplotlib draws the curve of each label, the same in every panel.

    A method has its color, paler for fewer phases, and a marker for each F; ensembles are dashed. Where there is one
    method, its variants have a color each.
    """
    places = sorted((g.place for g in groups), key=lambda place: place.order()[2:])
    variants: dict[str, dict[Hashable, None]] = {}
    for place in places:
        variants.setdefault(place.method, {})[place.phases, place.extra] = None
    labels = list(dict.fromkeys(place.label for place in places))
    found = {}
    for place in places:
        if len(variants) == 1:
            n = labels.index(place.label)
            color = [*COLORS.values(), INK][n % (len(COLORS) + 1)]
        else:
            own = list(variants[place.method])
            n = own.index((place.phases, place.extra))
            color = paler(COLORS.get(place.method, INK), PALEST * (1 - n / (len(own) - 1)) if len(own) > 1 else 0.0)
        line = "--" if place.members > 1 else "-"
        found[place.label] = {"color": color, "marker": VARIANT_MARKERS[n % len(VARIANT_MARKERS)], "linestyle": line}
    return found


def curve(group: Group, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [n], values [runs, n]) of an evaluation's number, at the steps where every run was evaluated."""
    return _series([run.evals for run in group.runs.values()], key, 2)


def reference_ablation(groups: Sequence[Group]) -> Figure | None:
    """Win rate and KL on the way, of one F of each task and loss."""
    judge, (shown, _) = main_judge(groups), _references(groups)
    shown = [found for found in shown if any(curve(g, f"eval/win_rate/{judge}") for g in found)]
    if not judge or not shown:
        return None
    figure, axes = _panels(len(shown))
    styles = looks([g for found in shown for g in found])
    labels = {
        g.place: " ".join(filter(None, [METHOD_WORDS[g.place.method], g.place.extra])) for found in shown for g in found
    }
    for row, found in zip(axes, shown, strict=True):
        _over_steps(row[0], found, f"eval/win_rate/{judge}", styles, labels)
        _over_steps(row[1], found, "eval/kl", styles, labels)
        place = found[0].place
        words = [place.task] if len({task for task, _ in tasks_and_losses(groups)}) > 1 else []
        row[0].set_title(f"win rate, {judge} ({', '.join([*words, loss_name(place.loss), f'F={place.phases}'])})")
        row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        row[1].set_title("KL to the start (nats)")
        _kl_axis(row[1], row[1].yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    legend_below(figure, *axes[:, 0])
    return figure


def references_left_out(groups: Sequence[Group]) -> str:
    """What the reference ablation could compare and does not."""
    left = group_words(groups, [g for found in _references(groups)[1] for g in found])
    return f"Of each task and loss the F with the most methods, then runs; left out: {left}." if left else ""


def stability(groups: Sequence[Group]) -> Figure | None:
    """Win rate on the way and at the end by the number of members, of one method and F of each task and loss."""
    judge, (shown, _) = main_judge(groups), _ensembles(groups)
    if not judge or not shown:
        return None
    figure, axes = _panels(len(shown))
    for row, found in zip(axes, shown, strict=True):
        labels = {g.place: f"{g.place.members} member{'' if g.place.members == 1 else 's'}" for g in found}
        styles = looks(found)
        _over_steps(row[0], found, f"eval/win_rate/{judge}", styles, labels)
        for n, group in enumerate(found):
            rates = list(group.values("win_rate", judge).values())
            if not rates:
                continue
            spread = 0.1 * (np.arange(len(rates)) % 3 - 1)
            color = styles[group.place.label]["color"]
            row[1].plot(n + spread, rates, "o", color=color, alpha=0.6, linestyle="none")
            row[1].errorbar(n + 0.25, np.mean(rates), std_bars([rates]), color=color, marker="_", capsize=4)
        place = place_words(groups, found[0].place.task_and_loss)
        row[0].set_title(f"win rate, {judge}" + (f" ({place})" if place else ""))
        row[1].set_title("final win rate by seed; bar: mean and std")
        row[1].set_xticks(range(len(found)), [labels[g.place] for g in found])
        row[1].set_xlim(-0.5, len(found) - 0.3)
        for axis in row:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[-1, 0].set_xlabel("optimizer step")
    legend_below(figure, *axes[:, 0])
    return figure


def ensembles_left_out(groups: Sequence[Group]) -> str:
    """What the figure of stability shows, and what it could compare and does not."""
    shown, left = _ensembles(groups)
    words = f"Of {group_words(groups, [found[0] for found in shown])}."
    if left:
        words += f" The most runs decide; left out: {group_words(groups, [g for found in left for g in found])}."
    return words


def reward_and_kl(groups: Sequence[Group]) -> Figure | None:
    """Win rate over KL, a column for each of the first judges."""
    shown = curve_groups(groups)
    judges = judge_names(shown)[:MAX_JUDGES]
    known = [g for g in shown if curve(g, "eval/kl") and any(curve(g, f"eval/win_rate/{j}") for j in judges)]
    if not known:
        return None
    places, styles = tasks_and_losses(known), looks(known)
    figure, axes = _panels(len(places), len(judges), width_in=HALF_WIDTH_IN * len(judges), height_in=3.1)
    for row, place in zip(axes, places, strict=True):
        title = place_words(groups, place)
        for axis, judge in zip(row, judges, strict=True):
            for group in of_place(known, place):
                win, kl = curve(group, f"eval/win_rate/{judge}"), curve(group, "eval/kl")
                if win is None or kl is None:
                    continue
                style = styles[group.place.label]
                axis.plot(np.median(kl[1], 0), np.median(win[1], 0), label=group.place.label, **style)
                axis.plot(kl[1][:, -1], win[1][:, -1], ".", color=style["color"], alpha=0.35, markersize=5)
            axis.set_title(f"{title}: win rate, {judge}" if title else f"win rate, {judge}")
            _kl_axis(axis, axis.xaxis)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes[-1]:
        axis.set_xlabel("KL to the start (nats a completion)")
    legend_below(figure, *axes.flat)
    return figure


def margins_and_lengths(groups: Sequence[Group]) -> Figure | None:
    """Margins of the training pairs and lengths of the greedy answers."""
    shown = curve_groups(groups)
    margins = {g.place: _series([run.steps for run in g.runs.values()], "rewards/margins", 1) for g in shown}
    known = [g for g in shown if margins[g.place] or curve(g, "eval/mean_length")]
    if not known:
        return None
    places, styles = tasks_and_losses(known), looks(known)
    figure, axes = _panels(len(places))
    for row, place in zip(axes, places, strict=True):
        own = of_place(known, place)
        for group in own:
            if found := margins[group.place]:
                steps, values = found
                style = styles[group.place.label] | {"markevery": -(-len(steps) // MAX_MARKERS)}
                row[0].plot(steps, np.median(values, 0), label=group.place.label, **style)
        _over_steps(row[1], own, "eval/mean_length", styles, {g.place: g.place.label for g in own}, band=False)
        title = place_words(groups, place)
        row[0].set_title(f"{title}: margin, chosen - rejected" if title else "margin: reward of chosen - rejected")
        row[1].set_title("mean length of greedy answers (tokens)")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    legend_below(figure, *axes.flat)
    return figure


def curves_left_out(groups: Sequence[Group]) -> str:
    """Groups without a curve for want of room, and by what rule."""
    left = group_words(groups, without(groups, curve_groups(groups)))
    return f"For want of room BPO of every F goes first and these are left out: {left}." if left else ""


def judges_left_out(groups: Sequence[Group]) -> str:
    """Judges after the first ones."""
    left = judge_names(groups)[MAX_JUDGES:]
    return f"The first {MAX_JUDGES} judges; left out: {', '.join(left)}." if left else ""


def std_bars(rates: Sequence[Sequence[float]]) -> np.ndarray:
    """[2, n] lengths of bars of one std below and above the mean of each n shares, within 0 and 1."""
    mean = np.array([np.mean(r) for r in rates])
    std = np.array([np.std(r, ddof=1) if len(r) > 1 else 0.0 for r in rates])
    return np.array([np.minimum(std, mean), np.minimum(std, 1.0 - mean)])


def _series(runs: Sequence[Sequence[Mapping[str, Any]]], key: str, least: int) -> tuple[np.ndarray, np.ndarray] | None:
    by_run = [{line["step"]: line[key] for line in lines if line.get(key) is not None} for lines in runs]
    by_run = [found for found in by_run if found]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if len(steps) < least:
        return None
    return np.array(steps), np.array([[found[s] for s in steps] for found in by_run], dtype=np.float64)


def _references(groups: Sequence[Group]) -> tuple[list[list[Group]], list[list[Group]]]:
    """Groups that differ in the reference, (those shown, those left out)."""
    own = [g for g in groups if g.place.method in REFERENCES and g.place.phases != 1]
    sets = _sets(own, lambda place: (place.phases, place.members))
    compared = [found for found in sets if len({g.place.method for g in found}) > 1]
    return _best_of_each(compared, lambda found: (len(found), sum(len(g.runs) for g in found)))


def _ensembles(groups: Sequence[Group]) -> tuple[list[list[Group]], list[list[Group]]]:
    """Groups that differ in their number of members, (those shown, those left out)."""
    sets = _sets(groups, lambda place: (place.method, place.phases, place.extra))
    return _best_of_each([found for found in sets if len(found) > 1], lambda found: min(len(g.runs) for g in found))


def _sets(groups: Sequence[Group], key: Callable[[Place], tuple]) -> list[list[Group]]:
    sets: dict[tuple, list[Group]] = {}
    for group in groups:
        sets.setdefault((*group.place.task_and_loss, *key(group.place)), []).append(group)
    return list(sets.values())


def _best_of_each(
    sets: Sequence[list[Group]], rank: Callable[[list[Group]], Any]
) -> tuple[list[list[Group]], list[list[Group]]]:
    """(the best set of each task and loss, the other sets)"""
    best: dict[tuple[str, str], list[Group]] = {}
    for found in sets:
        place = found[0].place.task_and_loss
        best[place] = max(best.get(place, found), found, key=rank)
    shown = list(best.values())
    return shown, [found for found in sets if not any(found is other for other in shown)]


def _over_steps(
    axis: Axes,
    groups: Sequence[Group],
    key: str,
    styles: Mapping[str, Mapping[str, Any]],
    labels: Mapping[Place, str],
    *,
    band: bool = True,
) -> None:
    """Medians over seeds, with a band from the first to the third quartile: one run that collapsed moves neither."""
    for group in groups:
        if found := curve(group, key):
            steps, values = found
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            style = styles[group.place.label]
            axis.plot(steps, middle, label=labels[group.place], **style)
            if band:
                axis.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _kl_axis(axis: Axes, along: Axis) -> None:
    """A run that collapses has a KL of hundreds of nats, and the others would lie on one spot."""
    is_x = along is axis.xaxis
    top = max(axis.get_xlim() if is_x else axis.get_ylim())
    if top <= WIDE_KL:
        return
    if is_x:
        axis.set_xscale("symlog", linthresh=1.0)
        axis.set_xlim(0.0, 1.5 * top)
    else:
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_ylim(0.0, 1.5 * top)
    along.set_major_formatter("{x:g}")


def _panels(
    num_rows: int, num_columns: int = 2, *, width_in: float = FULL_WIDTH_IN, height_in: float = 2.5
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width_in, height_in * num_rows + 0.7))
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)
