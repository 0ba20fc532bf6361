"""The study of studies/helpdesk.md: learning rates, the runs, the comparisons that its plan names.

Nothing here looks at the rubric before the last run has ended: learning rates are chosen by the annotator, on prompts
and seeds of their own.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpo_fast.files import write_atomic
from bpo_fast.grid import RunSpec, read_grid
from bpo_fast.groups import Group, find_runs, read_groups
from bpo_fast.progress import Progress
from bpo_fast.run_folder import RunFolder, wins
from bpo_fast.stats import Interval, bootstrap, crossed_bootstrap
from bpo_fast.sweep import RESULTS_FILE, Row, Sweep, read_results
from bpo_fast.sweep_report import write_sweep_report

STUDIES = Path(__file__).parent / "studies"
RATE, JUDGE, PROXY, TASK = "optim.learning_rate", "rubric", "annotator", "helpfulness"
PRIMARY = (("bpo", 2), (("offline", 1), ("on-policy", "T")))


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Where the study's runs and results go.

    Attributes:
        out: folder of the sweeps.
        results: folder of study.json, summary.json and the figures.
        jobs: worker processes.
        rates_grid, grid, conditions_grid: the grids, in the order in which they run.
        dry_run: list the runs only.
    """

    out: Path = Path("sweeps/helpdesk")
    results: Path = Path("bench/results/helpdesk")
    jobs: int = 2
    rates_grid: Path = STUDIES / "helpdesk-lr.toml"
    grid: Path = STUDIES / "helpdesk.toml"
    conditions_grid: Path = STUDIES / "helpdesk-conditions.toml"
    dry_run: bool = False


def run(options: StudyOptions) -> dict[str, Any] | None:
    """Makes whatever is left of the study and writes its results.

    Returns:
        What RESULTS/study.json holds; None from a dry run.

    Raises:
        ValueError: a grid that is not there.
        RuntimeError: learning rates cannot be chosen because a run failed.
    """
    tuning = Sweep(read_grid(options.rates_grid), options.out / "rates")
    if options.dry_run:
        specs, conditions = read_grid(options.grid), read_grid(options.conditions_grid)
        print("\n".join(spec.name for spec in [*tuning.specs, *specs, *conditions]))
        print(f"{len(tuning.specs)} runs for learning rates, {len(specs)} for the study, {len(conditions)} conditions")
        return None
    with Progress() as progress:
        tuning.run(options.jobs, progress)
        if tuning.num_failed:
            raise RuntimeError(f"{tuning.num_failed} runs failed: no learning rate; see {tuning.folder / RESULTS_FILE}")
        rates = choose_rates(read_results(tuning.folder / RESULTS_FILE))
        progress.print(f"learning rates: {json.dumps(rates)}")
        study = Sweep(with_rates(read_grid(options.grid), rates), options.out / "runs")
        study.run(options.jobs, progress)
        write_results(study.folder, None, rates, options.results)  # what is there already, should the rest be cut short
        conditions = Sweep(with_rates(read_grid(options.conditions_grid), rates), options.out / "conditions")
        conditions.run(options.jobs, progress)
    return write_results(study.folder, conditions.folder, rates, options.results)


def choose_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate with the highest mean win rate under the annotator; of equal ones the smaller.

    Returns:
        "loss/method" -> rate.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        rates = found.setdefault(f"{row['loss']}/{row['method']}", {})
        rates.setdefault(row["extra"][RATE], []).append(row["after"]["win_rate"][PROXY])
    return {key: max(sorted(rates), key=lambda r: float(np.mean(rates[r]))) for key, rates in found.items()}


def with_rates(specs: Sequence[RunSpec], rates: Mapping[str, float]) -> list[RunSpec]:
    """The runs with their learning rates: of loss and method, online as on-policy, whatever else as BPO of the loss."""

    def rate(spec: RunSpec) -> float:
        method = "on-policy" if spec.method == "online" else spec.method
        return rates.get(f"{spec.loss}/{method}", rates[f"{spec.loss}/bpo"])

    return [dataclasses.replace(s, values={**s.values, RATE: rate(s)}) for s in specs]


def write_results(study: Path, conditions: Path | None, rates: Mapping[str, float], folder: Path) -> dict[str, Any]:
    """Writes the report of the study, its figures, and study.json: the comparisons of the runs that have finished."""
    write_sweep_report([study], folder)
    folders, failed = find_runs([study])
    found: dict[str, Any] = {"learning_rates": dict(rates), "failed": failed, "conditions": {}}
    found["primary"] = primary(read_groups(folders))
    if conditions is not None:
        folders, more_failed = find_runs([conditions])
        found["failed"] = failed + more_failed
        for name in dict.fromkeys(condition_of(run) for run in folders):
            found["conditions"][name] = primary(read_groups(run for run in folders if condition_of(run) == name))
    write_atomic(folder / "study.json", json.dumps(found, indent=1) + "\n")
    return found


def condition_of(run: Path) -> str:
    """The block of the grid that a run is of: its name up to the task."""
    return run.name.partition(f"-{TASK}-")[0]


def primary(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """BPO F = 2 against offline and against on-policy DPO, raw and at matched KL."""
    dpo = {(g.place.method, g.place.phases): g for g in groups if (g.place.loss, g.place.members) == ("dpo", 1)}
    ours, others = PRIMARY
    return [compare(dpo[ours], dpo[other]) for other in others if ours in dpo and other in dpo]


def compare(a: Group, b: Group) -> dict[str, Any]:
    """Win rate under the rubric of group a minus that of group b, seed by seed."""
    seeds = sorted(set(a.runs) & set(b.runs))
    tables = [np.array([_wins_by_prompt(g.runs[s]) for s in seeds]) for g in (a, b)]
    difference = tables[0] - tables[1]
    matched = [matched_difference(a.runs[s], b.runs[s]) for s in seeds]
    both = crossed_bootstrap(difference)
    found = {
        "a": a.place.label,
        "b": b.place.label,
        "num_seeds": len(seeds),
        "num_prompts": difference.shape[1],
        "win_rate_a": float(np.nanmean(tables[0])),
        "win_rate_b": float(np.nanmean(tables[1])),
        "difference": _interval(both),
        "difference_over_seeds": _interval(bootstrap(np.nanmean(difference, axis=1).tolist())),
        "difference_at_matched_kl": _interval(bootstrap(matched)),
        "holds": both.low > 0 or both.high < 0,
    }
    for key in ("kl", "mean_length", "distinct_2", "unique", "clipped_ratio"):
        x, y = a.values(key), b.values(key)
        known = [s for s in seeds if s in x and s in y]
        if known:
            found[f"{key}_difference"] = _interval(bootstrap([x[s] - y[s] for s in known]))
    return found


def matched_difference(a: RunFolder, b: RunFolder) -> float:
    """Win rates of two runs at the smaller of their final KLs, interpolated between their evaluations."""
    curves = [kl_curve(run) for run in (a, b)]
    kl = min(curve[0][-1] for curve in curves)
    rates = [float(np.interp(kl, *curve)) for curve in curves]
    return rates[0] - rates[1]


def kl_curve(run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """(KL to the start, win rate under the rubric) of the evaluations of a run, by rising KL up to that of its end."""
    lines = [line for line in run.evals if f"eval/win_rate/{JUDGE}" in line]
    points = [(max(0.0, line.get("eval/kl") or 0.0), line[f"eval/win_rate/{JUDGE}"]) for line in lines]
    kl, rates = zip(*sorted(p for p in points if p[0] <= points[-1][0]), strict=True)
    return np.array(kl), np.array(rates)


def table(found: Mapping[str, Any]) -> str:
    """The primary comparisons for a terminal."""
    lines = [f"learning rates: {json.dumps(found['learning_rates'])}"]
    compared = [("", row) for row in found["primary"]]
    compared += [(f"{name}: ", row) for name, rows in found["conditions"].items() for row in rows]
    for where, row in compared:
        lines.append(f"{where}{row['a']} - {row['b']}, {row['num_seeds']} paired seeds, {row['num_prompts']} prompts:")
        for key in ("difference", "difference_over_seeds", "difference_at_matched_kl"):
            mean, low, high = (100 * row[key][k] for k in ("mean", "low", "high"))
            lines.append(f"  {key.replace('_', ' ')}: {mean:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")
    return "\n".join(lines)


def _wins_by_prompt(run: RunFolder) -> list[float]:
    won = wins(run, "after", JUDGE)
    return [won[prompt] for prompt in sorted(won)]


def _interval(interval: Interval) -> dict[str, float]:
    return dataclasses.asdict(interval)
