"""A sweep folder as real runs leave it, made of invented numbers, for the tests of the report of many runs."""

import json
import random
from pathlib import Path

from bpo_fast import config as configs
from bpo_fast.config import Config
from bpo_fast.grid import RunSpec, read_grid
from bpo_fast.metrics import Metrics
from bpo_fast.tasks import resolve

GAIN = {"offline": 0.18, "online": 0.22, "on-policy": 0.27, "bpo": 0.3, "ema": 0.21, "golden": 0.25, "moving-ref": 0.19}
STEPS = 32
JUDGES = ("rubric", "annotator")


def write_fake_sweep(folder: Path, grid: str, *, failed: int = 0, with_phases: bool = True) -> Path:
    """Writes the runs of a grid (TOML text); the last `failed` of them have failed.

    Without phases no line of metrics.jsonl says what a phase cost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.toml").write_text(grid, encoding="utf-8")
    specs = read_grid(folder / "grid.toml")
    rows = []
    for spec in specs[: len(specs) - failed]:
        _write_run(folder / "runs" / spec.name, spec, with_phases)
        rows.append(spec.place() | {"status": "finished", "error": None})
    rows += [s.place() | {"status": "failed", "error": "loss not finite"} for s in specs[len(specs) - failed :]]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def rates_of(spec: RunSpec, draw: random.Random) -> list[tuple[int, float, float]]:
    """(step, win rate, KL) before, half-way and after."""
    phases = 6.0 if spec.phases == "T" else float(spec.phases)
    gain = GAIN[spec.method] + 0.02 * min(phases, 6) + draw.gauss(0, 0.03 / spec.members)
    return [(STEPS * k // 2, 0.31 + gain * (k / 2) ** 0.7, 1.4 * k + abs(draw.gauss(0, 0.1)) * k) for k in range(3)]


def _write_run(run_dir: Path, spec: RunSpec, with_phases: bool) -> None:
    draw = random.Random(spec.name)
    (run_dir).mkdir(parents=True)
    config = resolve(configs.replace(Config(), {**spec.values, "run.output_dir": str(run_dir)}))
    (run_dir / "config.toml").write_text(configs.to_toml(config), encoding="utf-8")
    (run_dir / "env.json").write_text("{}", encoding="utf-8")
    metrics = Metrics(run_dir)
    points = rates_of(spec, draw)
    sides = [_side(rate, kl, draw) for _, rate, kl in points]
    for (step, _, _), side, when in zip(points, sides, ("before", "step", "after"), strict=True):
        values = {"eval/when": when} | {f"eval/{k}": v for k, v in side.items() if not isinstance(v, dict)}
        values |= {f"eval/{k}/{j}": x for k, v in side.items() if isinstance(v, dict) for j, x in v.items()}
        metrics.log("eval", step, values)
    for step in range(1, STEPS + 1):
        metrics.log("step", step, {"loss": 0.6, "rewards/margins": step / STEPS + draw.gauss(0, 0.1)})
    m = spec.members
    num_phases = STEPS if spec.phases == "T" else int(spec.phases)
    for phase in range(num_phases if with_phases else 0):
        metrics.log("phase", (phase + 1) * STEPS // num_phases, phase_values(phase, num_phases, m, spec.seed))
    metrics.close()
    rows = [_row(i, when, draw) for when in ("before", "after") for i in range(6)]
    (run_dir / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    seconds = {"eval": 8.0, "rollout": 9.0, "annotate": 3.0, "ref": 3.0, "train": 6.0 * m, "total": 29.5 + 6 * (m - 1)}
    summary = {"before": sides[0], "after": sides[2], "steps": STEPS, "seconds": seconds}
    summary |= {"peak_memory_gib": 0.6 + 0.05 * m, "judges": list(JUDGES)}
    (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def phase_values(phase: int, num_phases: int, members: int, seed: int) -> dict[str, float]:
    """What a phase cost; the later ones of a run sample longer."""
    rollout_s = 9.0 * 2 * (phase + 1) / (num_phases * (num_phases + 1))
    values = {"phase": phase, "timing/rollout_s": rollout_s, "timing/annotate_s": 3.0 / num_phases}
    values |= {"timing/ref_s": 3.0 / num_phases, "timing/train_s": 6.0 * members / num_phases}
    return values | {"perf/peak_memory_gib": 0.5 + 0.05 * members + 0.01 * seed + 0.04 * (phase + 1) / num_phases}


def _side(rate: float, kl: float, draw: random.Random) -> dict:
    return {
        "win_rate": {"rubric": rate, "annotator": min(1.0, rate + 0.1 * kl / 2)},
        "score": {"rubric": 4 + 6 * rate, "annotator": -1.5 + 0.8 * kl},
        "kl": kl,
        "mean_length": 24 + 7 * kl,
        "clipped_ratio": 0.01,
        "distinct_2": 0.58 - 0.05 * kl,
        "unique": 0.9 - 0.02 * kl,
    }


def _row(i: int, when: str, draw: random.Random) -> dict:
    output = (
        "Try the <b>settings</b> page." if when == "before" else "Of course. Press Reset, then hold it for ten seconds."
    )
    return {
        "when": when,
        "step": 0 if when == "before" else STEPS,
        "prompt_id": i,
        "prompt": f"How do I reset printer {i}? Assistant:",
        "label": "Press Reset.",
        "output": output,
        "num_tokens": 9,
        "truncated": False,
        "scores": {j: draw.gauss(when == "after", 1) for j in JUDGES},
        "label_scores": dict.fromkeys(JUDGES, 0.3),
    }
