"""Grids of runs: TOML in, a list of runs out; imports no torch.

    [set]                           # any knob, for every run
    "optim.learning_rate" = 1e-3
    [[grid]]                        # one or more blocks, run in this order
    name = "primary"                # optional; it goes in front of the names of the runs
    loss = ["dpo"]                  # axes: task, loss, method, F, M, seed, or any knob; the last one varies fastest
    method = ["offline", "bpo"]
    F = [1, 2, "T"]
    seed = [42, 43]
    set."eval.prompts" = 64         # any knob, for the runs of this block

In text values {task}, {loss}, {method}, {seed} are the run's own and {assets} is the embedded world.
`method.golden = "run:NAME"` is the finished run NAME of the same sweep.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from bpo_fast import config as configs
from bpo_fast.config import KNOBS, ON_POLICY, Config, did_you_mean
from bpo_fast.plan import make_plan
from bpo_fast.tasks import ASSETS, resolve

METHODS = {
    "offline": ("initial", "initial"),
    "online": ("policy", "initial"),
    "on-policy": ("policy", "initial"),
    "bpo": ("policy", "behavior"),
    "ema": ("policy", "ema"),
    "golden": ("policy", "golden"),
    "moving-ref": ("initial", "behavior"),
}
AXES = ("task", "loss", "method", "F", "M", "seed")
# knobs that the axes set
GOVERNED = {"task": "task", "method.loss": "loss", "method.sampler": "method", "method.ref": "method"}
GOVERNED |= {"method.phases": "F", "model.members": "M", "run.seed": "seed"}
DEFAULTS: dict[str, list[Any]] = {"task": ["helpfulness"], "loss": ["dpo"], "method": ["bpo"], "F": [2], "M": [1]}
DEFAULTS |= {"seed": [42]}
EVERY_STEP = "T"
GRID_ENDING = ".toml"
NEEDS = "run:"


@dataclass(frozen=True)
class RunSpec:
    """One run of a grid.

    Attributes:
        name: folder of the run inside the sweep, unique.
        task, loss, method, phases, members, seed: its place in the grid; phases is a number or "T".
        extra: values of further axes by knob.
        values: dotted knobs of its configuration, without the output folder.
        needs: name of the run that must be finished first, or None.
    """

    name: str
    task: str
    loss: str
    method: str
    phases: int | str
    members: int
    seed: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None

    def place(self) -> dict[str, Any]:
        """What a results line says of it."""
        found = {"run": self.name, "task": self.task, "loss": self.loss, "method": self.method, "F": self.phases}
        return found | {"M": self.members, "seed": self.seed, "extra": dict(self.extra)}


def shipped_grids() -> dict[str, Path]:
    """Grids that come with the package, by name."""
    folder = Path(str(files("bpo_fast") / "grids"))
    return {p.stem: p for p in sorted(folder.glob(f"*{GRID_ENDING}"))}


def find_grid(name: str) -> Path:
    """The file of a grid that is named or given by path; ValueError if there is none."""
    grids = shipped_grids()
    if name in grids:
        return grids[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix == GRID_ENDING or "/" in name:
        raise ValueError(f"{name}: no such grid file")
    raise ValueError(f"{name}: no such grid{did_you_mean(name, grids) or '; shipped are ' + ', '.join(grids)}")


def read_grid(path: Path, overrides: Mapping[str, Any] | None = None) -> list[RunSpec]:
    """The runs of a grid, in its order, each once.

    F = 1 makes online, bpo, ema and moving-ref the same run as offline, and F = T makes online the same as on-policy
    (their identities hold bit for bit): such a run is made once, under the name of the latter.

    Args:
        path: TOML file.
        overrides: dotted knobs that are stronger than every `set`, weaker than the axes.

    Raises:
        ValueError: the file, with the key or value that is wrong.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    for key in tree:
        if key not in ("grid", "set"):
            raise ValueError(
                f"{path}: {key}: no such key{did_you_mean(key, ('grid', 'set')) or '; there are grid, set'}"
            )
    blocks = tree.get("grid", [])
    blocks = blocks if isinstance(blocks, list) else [blocks]
    if not blocks:
        raise ValueError(f"{path}: no [grid] in it")
    tables = [("set", tree.get("set", {})), *(("grid", block) for block in blocks)]
    tables += [("set", block.get("set", {})) for block in blocks if isinstance(block, dict)]
    for key, value in tables:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key} = {value!r}: not a table")
    common = configs.flatten(tree.get("set", {}))
    specs: dict[str, RunSpec] = {}
    for block in blocks:
        try:
            found = _runs_of(block, common, overrides or {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for spec in found:
            other = specs.setdefault(spec.name, spec)
            for name in sorted({*spec.values, *other.values}):
                if spec.values.get(name) != other.values.get(name):
                    raise ValueError(
                        f"{path}: two runs are {spec.name}, with {name} = {other.values.get(name)} and"
                        f" {spec.values.get(name)}; give one block a name"
                    )
    for spec in specs.values():
        if spec.needs and spec.needs not in specs:
            raise ValueError(
                f"{path}: method.golden = {NEEDS}{spec.needs}: no such run in the grid{did_you_mean(spec.needs, specs)}"
            )
    return list(specs.values())


def _runs_of(block: Mapping[str, Any], common: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[RunSpec]:
    label = block.get("name", "")
    if not isinstance(label, str) or not re.fullmatch(r"[\w.-]*", label):
        raise ValueError(f"grid.name = {label!r}: letters, digits, '-', '_' and '.' only")
    settings = {**common, **configs.flatten(block.get("set", {})), **overrides}
    own = {key: value for key, value in block.items() if key not in ("name", "set")}
    axes = {name: _axis(name, value) for name, value in configs.flatten(own).items()}
    axes |= {name: value for name, value in DEFAULTS.items() if name not in axes}
    for name in settings:
        if name in GOVERNED:
            raise ValueError(f"set.{name}: is an axis; it belongs under [grid] as {GOVERNED[name]}")
    names = list(axes)
    specs = []
    for values in itertools.product(*axes.values()):
        specs.append(_spec(label, dict(zip(names, values, strict=True)), settings))
    return specs


def _axis(name: str, value: Any) -> list[Any]:
    if name in GOVERNED and name not in AXES:
        raise ValueError(f"grid.{name}: is the axis {GOVERNED[name]}")
    if name not in AXES and name not in KNOBS:
        raise ValueError(f"grid.{name}: no such axis{did_you_mean(name, [*AXES, *KNOBS])}")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"grid.{name} = []: no value")
    if name == "method":
        for method in values:
            if not isinstance(method, str) or method not in METHODS:
                hint = did_you_mean(str(method), METHODS) or f"; there are {', '.join(METHODS)}"
                raise ValueError(f"grid.method = {method!r}: no such method{hint}")
    if name == "F":
        for phases in values:
            if phases != EVERY_STEP and (isinstance(phases, bool) or not isinstance(phases, int) or phases < 1):
                raise ValueError(f'grid.F = {phases!r}: a number of phases, or "{EVERY_STEP}" for one a step')
    return values


def _spec(label: str, place: dict[str, Any], settings: Mapping[str, Any]) -> RunSpec:
    method, phases = place["method"], place["F"]
    if method == "offline" or (phases == 1 and method in ("online", "bpo", "ema", "moving-ref")):
        method, phases = "offline", 1
    elif method == "on-policy" or (phases == EVERY_STEP and method == "online"):
        method, phases = "on-policy", EVERY_STEP
    extra = {name: value for name, value in place.items() if name not in AXES}
    sampler, ref = METHODS[method]
    values = dict(settings) | extra
    values |= {"task": place["task"], "method.loss": place["loss"], "model.members": place["M"]}
    values |= {"run.seed": place["seed"], "method.sampler": sampler, "method.ref": ref}
    values |= {"method.phases": ON_POLICY if phases == EVERY_STEP else phases}
    if ref != "golden":
        values.pop("method.golden", None)
    words = {"task": place["task"], "loss": place["loss"], "method": method, "seed": place["seed"], "assets": ASSETS}
    values = {name: _filled(value, words) for name, value in values.items()}
    name = "-".join(
        map(str, (place["task"], place["loss"], method, f"F{phases}", f"M{place['M']}", f"s{place['seed']}"))
    )
    name = "-".join([*filter(None, [label]), name, *(f"{k.rpartition('.')[2]}={_short(v)}" for k, v in extra.items())])
    golden = str(values.get("method.golden", ""))
    config = resolve(configs.replace(Config(), values))
    assert config.method.pairs, "resolve() has set it"
    make_plan(config.method, config.method.pairs)  # or there are more phases than steps
    return RunSpec(
        name=name,
        task=config.task,
        loss=config.method.loss,
        method=method,
        phases=phases,
        members=config.model.members,
        seed=config.run.seed,
        extra=extra,
        values=values,
        needs=golden.removeprefix(NEEDS) if golden.startswith(NEEDS) else None,
    )


def _filled(value: Any, words: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_filled(item, words) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\{(\w+)\}", lambda m: str(words.get(m[1], m[0])), value)


def _short(value: Any) -> str:
    """A value in the name of a folder."""
    text = "+".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)[-40:]
