"""The report of many runs: one page, the figures as files, and the numbers behind them."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpo_fast.files import write_atomic
from bpo_fast.groups import (
    MEASURES,
    Group,
    curve_groups,
    find_runs,
    group_words,
    judge_names,
    of_place,
    paired,
    read_groups,
    tasks_and_losses,
    without,
)
from bpo_fast.report import REPORT_FILE, badges, figures, html, html_page, html_text, notice, score_notes
from bpo_fast.run_folder import PHASE_STAGES, loss_name, number_text
from bpo_fast.stats import Interval
from bpo_fast.sweep_costs import PhaseCosts, phase_costs
from bpo_fast.sweep_plots import aggregate_rows, sweep_plots

SUMMARY_FILE = "summary.json"
NUM_PROMPTS, MAX_SIDES = 5, 6
MAX_PHASE_ROWS = 4
KINDS = {"kl": "score", "mean_length": "tenth", "clipped_ratio": "share", "distinct_2": "score", "unique": "share"}
WORDS = {"kl": "KL", "mean_length": "tokens", "clipped_ratio": "truncated", "distinct_2": "distinct-2"}
WORDS |= {"unique": "unique"}


def write_sweep_report(paths: Sequence[Path], out: Path) -> Path:
    """Writes OUT/report.html, OUT/figures/*.png and *.svg, and OUT/summary.json.

    Args:
        paths: run folders, sweep folders or results files.
        out: folder to write.

    Returns:
        The path of the page.

    Raises:
        ValueError: a path that is none of them, no finished run at all, or an `out` that is a run folder.
    """
    if (out / "config.toml").is_file():
        raise ValueError(f"--out {out}: holds a run, whose summary and report would be lost; choose another folder")
    folders, failed = find_runs(paths)
    groups = [g for g in read_groups(folders) if any(run.summary for run in g.runs.values())]
    if not groups:
        raise ValueError(f"{', '.join(map(str, paths))}: no finished run there")
    runs = [run for g in groups for run in [*g.runs.values(), *(double for _, double in g.doubles)]]
    unfinished = [f"{run.path.name}: not finished" for run in runs if not run.summary]
    for group in groups:
        group.runs = {seed: run for seed, run in group.runs.items() if run.summary}
    drawn = sweep_plots(groups)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for plot in drawn:
        plot.save(out / "figures" / re.sub(r"\W+", "-", plot.title.lower()))
    summary = summarise_groups(groups)
    write_atomic(out / SUMMARY_FILE, json.dumps(summary | {"not_finished": failed + unfinished}, indent=1) + "\n")
    num, doubles = sum(len(g.runs) for g in groups), _double_notes(groups)
    title = f"bpo-fast: {num + len(doubles)} runs" + (f", {num} of them told apart" if doubles else "")
    sections = [
        f"<h1>{html(title)}</h1>\n<p class=soft>{html(', '.join(map(str, paths)))}</p>",
        notice(failed + unfinished + doubles),
        _result_table(groups),
        figures(drawn),
        _comparison_table(summary),
        _completions(groups),
        _phase_table(groups),
    ]
    path = out / REPORT_FILE
    write_atomic(path, html_page(html(title), sections))
    return path


def summarise_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Mean and std over seeds of every group, what its phases cost, its aggregates, and its paired difference to
    offline training."""
    judges = judge_names(groups)
    rows = []
    for group in groups:
        base = _offline_of(group, groups)
        row: dict[str, Any] = {**dataclasses.asdict(group.place), "label": group.place.label}
        row["seeds"] = sorted(group.runs)
        for judge in judges:
            rates = group.values("win_rate", judge)
            row[f"win_rate/{judge}"] = _mean_std(rates)
            row[f"score/{judge}"] = _mean_std(group.values("score", judge))
            if base is not None and base is not group:
                row[f"win_rate_minus_offline/{judge}"] = _asdict(paired(rates, base.values("win_rate", judge)))
        row |= {key: _mean_std(group.values(key)) for key in MEASURES}
        costs = phase_costs(group)
        row["by_phase"] = _phases_asdict(costs) if costs else None
        rows.append(row)
    found: dict[str, Any] = {"judges": judges, "groups": rows, "aggregates": {}}
    for judge in judges:
        found["aggregates"][judge] = {
            label: {"runs": num, **{name: dataclasses.asdict(i) for name, i in intervals.items()}}
            for (label, _), (num, intervals) in aggregate_rows(groups, judge).items()
        }
    return found


def _offline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    place = group.place
    same = [g for g in groups if (g.place.task, g.place.loss, g.place.extra) == (place.task, place.loss, place.extra)]
    return next((g for g in same if g.place.method == "offline" and g.place.members == place.members), None)


def _mean_std(values: Mapping[int, float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.array(list(values.values()))
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if array.size > 1 else 0.0,
        "n": int(array.size),
    }


def _asdict(interval: Interval | None) -> dict[str, float] | None:
    return dataclasses.asdict(interval) if interval else None


def _phases_asdict(costs: PhaseCosts) -> dict[str, list[float]]:
    found = {"phase": costs.phases} | {f"{stage}_s": values for stage, values in costs.seconds.items()}
    found |= {} if costs.peak_gib is None else {"peak_memory_gib": costs.peak_gib}
    return {name: values.tolist() for name, values in found.items()}


def _double_notes(groups: Sequence[Group]) -> list[str]:
    """Runs that the numbers have under another name already, as online at F = 2 is on-policy where T = 2."""
    return [
        f"{run.path.name}: the same settings and seed as {group.runs[seed].path.name}, which stands for both"
        for group in groups
        for seed, run in group.doubles
        if run.summary
    ]


def _result_table(groups: Sequence[Group]) -> str:
    judges = judge_names(groups)
    heads = ["task, loss", "method", "seeds", *(f"win rate, {j}" for j in judges), *(f"score, {j}" for j in judges)]
    heads += [WORDS[key] for key in MEASURES]
    body = ""
    last = ""
    for group in groups:
        place = group.place.heading
        cells = [place if place != last else "", group.place.label, str(len(group.runs))]
        last = place
        cells += [_cell(group.values("win_rate", j), "share") for j in judges]
        cells += [_cell(group.values("score", j), "score") for j in judges]
        cells += [_cell(group.values(key), KINDS[key]) for key in MEASURES]
        body += _table_row(cells)
    head = "".join(f"<th>{html(h)}</th>" for h in heads)
    note = "Held-out prompts, greedy decoding; mean over seeds, after ± the standard deviation."
    return (
        f'<h2>Results</h2>\n<p class="soft">{note}</p>\n'
        f'<div class="wide"><table class="runs"><tr>{head}</tr>\n{body}</table></div>'
    )


def _cell(values: Mapping[int, float], kind: str) -> str:
    found = _mean_std(values)
    if found is None:
        return "n/a"
    mean, std = number_text(found["mean"], kind), number_text(found["std"], kind).removesuffix("%")
    return f"{mean} ± {std}" if found["n"] > 1 else mean


def _comparison_table(summary: Mapping[str, Any]) -> str:
    """Paired differences to offline training, seed by seed."""
    rows = ""
    for row in summary["groups"]:
        for judge in summary["judges"]:
            if change := row.get(f"win_rate_minus_offline/{judge}"):
                mean, low, high = (f"{100 * change[key]:+.1f}" for key in ("mean", "low", "high"))
                words = (
                    f"{row['task']}, {loss_name(row['loss'])}",
                    row["label"],
                    judge,
                    f"{mean} points",
                    f"{low} to {high}",
                )
                rows += _table_row(words)
    if not rows:
        return ""
    head = "<tr><th>task, loss</th><th>method</th><th>judge</th><th>win rate</th><th>95% interval</th></tr>\n"
    note = "Differences of the win rates on the seeds that both have; percentile bootstrap over seeds."
    table = f'<div class="wide"><table class="runs">{head}{rows}</table></div>'
    return f'<h2>Against offline training</h2>\n<p class="soft">{note}</p>\n{table}'


def _completions(groups: Sequence[Group]) -> str:
    """The first held-out prompts, answered before training and after by several methods, from the first seed."""
    own = of_place(groups, tasks_and_losses(groups)[0])
    shown = curve_groups(own, MAX_SIDES)
    runs = [(g.place.label, next(iter(g.runs.values()))) for g in shown]
    befores = {row["prompt_id"]: row for _, run in runs for row in run.eval_rows if row["when"] == "before"}
    afters = [(label, {r["prompt_id"]: r for r in run.eval_rows if r["when"] == "after"}) for label, run in runs]
    found = []
    for prompt_id, before in list(befores.items())[:NUM_PROMPTS]:
        sides = [("before", before), *((label, rows[prompt_id]) for label, rows in afters if prompt_id in rows)]
        cells = "".join(f'<div class="side"><h4>{html(when)}</h4>{_answer(row)}</div>' for when, row in sides)
        prompt = f'<div class="prompt">{html_text(before["prompt"])}</div>'
        found.append(f'<div class="example">{prompt}<div class="sides">{cells}</div></div>\n')
    if not found:
        return ""
    left = group_words(groups, without(groups, shown))
    note = f"The first {len(found)} held-out prompts, each method with its first seed."
    note += f" For want of room left out: {left}." if left else ""
    return f'<h2>Completions before and after</h2>\n<p class="soft">{html(note)}</p>\n{"".join(found)}'


def _answer(row: Mapping[str, Any]) -> str:
    return html_text(row["output"]) + badges(score_notes(row.get("scores")))


def _phase_table(groups: Sequence[Group]) -> str:
    """What the phases of every group cost; those of a group with many are put together to a few rows."""
    rows, last = "", ("", "")
    for group in groups:
        costs = phase_costs(group)
        if costs is None:
            continue
        for span in np.array_split(np.arange(len(costs.phases)), min(len(costs.phases), MAX_PHASE_ROWS)):
            first, final = costs.phases[span[0]], costs.phases[span[-1]]
            place = group.place.heading, group.place.label
            cells = [place[0] if place[0] != last[0] else "", place[1] if place != last else ""]
            last = place
            cells.append(str(first) if first == final else f"{first} to {final}")
            cells += [_seconds(costs.seconds[s][span].mean()) if s in costs.seconds else "n/a" for s in PHASE_STAGES]
            cells.append("n/a" if costs.peak_gib is None else number_text(float(costs.peak_gib[span].max()), "score"))
            rows += _table_row(cells)
    if not rows:
        return ""
    heads = ["task, loss", "method", "phase", *(f"{stage} (s)" for stage in PHASE_STAGES), "peak memory (GiB)"]
    head = "<tr>" + "".join(f"<th>{html(h)}</th>" for h in heads) + "</tr>\n"
    note = "Means over seeds. A row of several phases has the mean seconds of one of them, and the highest peak."
    table = f'<div class="wide"><table class="runs">{head}{rows}</table></div>'
    return f'<h2>Phases</h2>\n<p class="soft">{note}</p>\n{table}'


def _seconds(value: float) -> str:
    return number_text(float(value), "tenth" if value >= 10 else "score")


def _table_row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html(cell)}</td>" for cell in cells) + "</tr>\n"
