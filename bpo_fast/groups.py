"""The runs of a sweep, or of any folders, grouped by everything but the seed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo_fast import config as configs
from bpo_fast.config import ON_POLICY
from bpo_fast.grid import EVERY_STEP, GOVERNED, METHODS
from bpo_fast.run_folder import RunFolder, loss_name, read_run, results
from bpo_fast.stats import Interval, bootstrap
from bpo_fast.sweep import FINISHED, RESULTS_FILE, read_results

METHOD_WORDS = {
    "offline": "offline",
    "online": "online",
    "on-policy": "on-policy",
    "bpo": "BPO",
    "ema": "EMA reference",
    "golden": "golden reference",
    "moving-ref": "moving reference",
}
ORDER = list(METHOD_WORDS)
MAX_CURVES = 12
MEASURES = ("kl", "mean_length", "clipped_ratio", "distinct_2", "unique")


@dataclass(frozen=True)
class Place:
    """Where a run stands in a grid, its seed aside.

    Attributes:
        task, loss, method, phases, members: as in a grid; phases is a number or "T".
        extra: further settings that tell it from others, as "name=value" words.
    """

    task: str
    loss: str
    method: str
    phases: int | str
    members: int
    extra: str = ""

    @property
    def label(self) -> str:
        """What a legend calls it, task and loss aside."""
        words = [METHOD_WORDS.get(self.method, self.method)]
        words += [f"F={self.phases}"] if self.method not in ("offline", "on-policy") else []
        words += [f"M={self.members}"] if self.members > 1 else []
        return " ".join([*words, *filter(None, [self.extra])])

    @property
    def task_and_loss(self) -> tuple[str, str]:
        """What its runs must share with others to be compared with them."""
        return self.task, self.loss

    @property
    def heading(self) -> str:
        """What a table calls task and loss."""
        return f"{self.task}, {loss_name(self.loss)}"

    def order(self) -> tuple:
        """Sorts as people read: task, loss, method, F, M."""
        method = ORDER.index(self.method) if self.method in ORDER else len(ORDER)
        return self.task, self.loss, method, phase_order(self.phases), self.members, self.extra


@dataclass
class Group:
    """Runs that differ in their seed alone: {seed: run}; further runs of those seeds are doubles and do not count."""

    place: Place
    runs: dict[int, RunFolder] = field(default_factory=dict)
    doubles: list[tuple[int, RunFolder]] = field(default_factory=list)

    def values(self, *keys: str, when: str = "after") -> dict[int, float]:
        """A number of every run that has it, by seed; `keys` lead to it in the results, as ("win_rate", "rubric")."""
        found: dict[int, float] = {}
        for seed, run in self.runs.items():
            value: Any = results(run, when)
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float):
                found[seed] = float(value)
        return found


def phase_order(phases: int | str) -> float:
    """Sorts numbers of phases, with a phase a step at the end."""
    return float("inf") if phases == EVERY_STEP else float(phases)


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Run folders behind the arguments of `bpo-fast report`.

    Args:
        paths: run folders, sweep folders, or results files of sweeps.

    Returns:
        (run folders, one line for each run of a sweep that has not finished)

    Raises:
        ValueError: a path that is none of them.
    """
    folders, notes = [], []
    for path in paths:
        if (path / "config.toml").is_file():
            folders.append(path)
            continue
        results_file = path / RESULTS_FILE if path.is_dir() else path
        if not results_file.is_file():
            raise ValueError(f"{path}: not a run folder (no config.toml) and not a sweep (no {RESULTS_FILE})")
        for row in read_results(results_file):
            if row["status"] != FINISHED:
                notes.append(f"{row['run']}: {row['status']}: {row['error']}")
                continue
            folder = results_file.parent / "runs" / row["run"]
            if not (folder / "config.toml").is_file():
                raise ValueError(f"{results_file}: {folder} is not there")
            folders.append(folder)
    return list(dict.fromkeys(folders)), notes


def read_groups(folders: Iterable[Path]) -> list[Group]:
    """Reads runs and groups them; runs that agree in everything the grid names but not in other knobs stay apart."""
    found: dict[tuple[Place, int], list[tuple[RunFolder, dict[str, Any]]]] = {}
    for folder in folders:
        run = read_run(folder)
        flat = configs.to_flat(configs.load(folder / "config.toml"))
        found.setdefault((_place(flat), flat["run.seed"]), []).append((run, flat))
    varying = _varying(runs for runs in found.values() if len(runs) > 1)
    groups: dict[Place, Group] = {}
    for (place, seed), runs in found.items():
        for run, flat in sorted(runs, key=lambda found: not found[0].summary):  # of doubles, one that has finished
            words = " ".join(f"{k.rpartition('.')[2]}={_text(flat[k])}" for k in varying)
            own = Place(place.task, place.loss, place.method, place.phases, place.members, words)
            group = groups.setdefault(own, Group(own))
            if group.runs.setdefault(seed, run) is not run:
                group.doubles.append((seed, run))
    return sorted(groups.values(), key=lambda g: g.place.order())


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """Mean of a - b over the seeds that both have, with its bootstrap interval over seeds; None if there are none."""
    seeds = [seed for seed in a if seed in b]
    return bootstrap([a[s] - b[s] for s in seeds]) if seeds else None


def tasks_and_losses(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(task, loss) pairs in order."""
    return list(dict.fromkeys(g.place.task_and_loss for g in groups))


def of_place(groups: Sequence[Group], place: tuple[str, str]) -> list[Group]:
    """The groups of one task and loss."""
    return [g for g in groups if g.place.task_and_loss == place]


def place_words(groups: Sequence[Group], place: tuple[str, str]) -> str:
    """Task and loss as a title names them: "" if the groups have no other, the loss alone if there is one task."""
    places = tasks_and_losses(groups)
    words = [place[0]] if len({task for task, _ in places}) > 1 else []
    words += [loss_name(place[1])] if len(places) > 1 else []
    return ", ".join(words)


def group_words(groups: Sequence[Group], some: Sequence[Group]) -> str:
    """Some of the groups by name: "DPO: offline, BPO F=2; IPO: offline"."""
    found = []
    for place in tasks_and_losses(some):
        labels = ", ".join(g.place.label for g in of_place(some, place))
        words = place_words(groups, place)
        found.append(f"{words}: {labels}" if words else labels)
    return "; ".join(found)


def without(groups: Sequence[Group], some: Sequence[Group]) -> list[Group]:
    """The groups but for these very ones."""
    ids = {id(g) for g in some}
    return [g for g in groups if id(g) not in ids]


def curve_groups(groups: Sequence[Group], num: int = MAX_CURVES) -> list[Group]:
    """The groups that curves are drawn of: of each task and loss the first `num` by this rule, in their own order.

    BPO of every F comes first and is kept however many there are. Then come the other methods with each of their F,
    those of one, two and all phases before those between; then ensembles and further settings of all of these.
    """
    kept = []
    for place in tasks_and_losses(groups):
        own = of_place(groups, place)
        plain = {id(g) for g in {(g.place.method, g.place.phases): g for g in reversed(own)}.values()}

        def rank(group: Group, plain: set[int] = plain) -> tuple[bool, bool, bool]:
            between = group.place.phases not in (1, 2, EVERY_STEP)
            return id(group) not in plain, group.place.method != "bpo", between

        num_bpo = sum(rank(g)[:2] == (False, False) for g in own)
        kept += sorted(sorted(own, key=rank)[: max(num, num_bpo)], key=lambda g: g.place.order())
    return kept


def judge_names(groups: Sequence[Group]) -> list[str]:
    """Judges of any run with win rates, in order; scores where nobody has a win rate."""
    return list(
        dict.fromkeys(j for g in groups for r in g.runs.values() for j in results(r, "after").get("win_rate") or {})
    )


def main_judge(groups: Sequence[Group]) -> str | None:
    """The first judge of any run; None if there is none."""
    return next(iter(judge_names(groups)), None)


def _place(flat: Mapping[str, Any]) -> Place:
    sampler, ref, phases = flat["method.sampler"], flat["method.ref"], flat["method.phases"]
    pairs, size = flat["method.pairs"], flat["method.batch_pairs"]
    phases = EVERY_STEP if phases == ON_POLICY or (pairs and size and phases == -(-pairs // size) > 1) else phases
    if phases == 1 and ref != "golden":
        method = "offline"
    else:
        names = [name for name, axes in METHODS.items() if axes == (sampler, ref)]
        method = names[0] if names else f"{sampler}/{ref}"
    if method == "online" and phases == EVERY_STEP:
        method = "on-policy"
    phases = 1 if method == "offline" else phases
    return Place(flat["task"], flat["method.loss"], method, phases, flat["model.members"])


def _varying(clashes: Iterable[Sequence[tuple[RunFolder, dict[str, Any]]]]) -> list[str]:
    names: dict[str, None] = {}
    for runs in clashes:
        first = runs[0][1]
        for _, flat in runs[1:]:
            for k in flat:
                if flat[k] != first[k] and k not in GOVERNED and not k.startswith("run."):
                    names[k] = None
    return list(names)


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= 24 else "..." + text[-21:]
