"""A run folder as a real run leaves it, made of invented numbers, for the tests of the report."""

import json
import math
import random
from pathlib import Path

from bpo_fast import config as config_module
from bpo_fast.metrics import Metrics

BEFORE = (
    "You can press the button. The button is a button. Please press it.",
    "I am not sure about that. Try again later.",
    "Open the settings page, choose printer and",
)
AFTER = (
    "Open the settings page, choose Printer, and press Reset. If the light stays red, unplug it for ten seconds.",
    "Certainly. First sign in, then open Billing and choose the invoice you need. Does that help?",
    "Hold the power button for five seconds until the green light blinks, then let go and wait for the chime.",
)


def write_fake_run(
    run_dir: Path,
    *,
    phases: int = 2,
    steps: int = 40,
    judges: tuple[str, ...] = ("rubric", "judge-rm"),
    num_prompts: int = 48,
    labels: bool = True,
    finished: bool = True,
) -> Path:
    """Write every file of a run folder; `finished=False` stops where a killed run would."""
    draw = random.Random(7)
    run_dir.mkdir(parents=True, exist_ok=True)
    values = {"method.phases": phases, "method.pairs": 512, "run.output_dir": "runs/demo"}
    resolved = config_module.load(None, values)
    (run_dir / "config.toml").write_text(config_module.to_toml(resolved), encoding="utf-8")
    env = {"bpo_fast": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "cpu": "AMD EPYC"}
    env |= {"cores": 2, "memory_gib": 23.5, "gpu": None, "platform": "Linux x86_64", "git_commit": "35cdb99" + "0" * 33}
    env |= {"command": "bpo-fast train --task helpfulness --phases 2", "OMP_NUM_THREADS": "2"}
    (run_dir / "env.json").write_text(json.dumps(env), encoding="utf-8")
    (run_dir / "pairs").mkdir(exist_ok=True)
    metrics = Metrics(run_dir)
    metrics.log("eval", 0, _eval_values("before", judges, labels))
    for phase in range(phases):
        (run_dir / "pairs" / f"phase-{phase:02d}.jsonl").write_text("", encoding="utf-8")
        metrics.log("phase", phase * steps // phases, _phase_values(draw, phase, phases, steps))
        for step in range(phase * steps // phases + 1, (phase + 1) * steps // phases + 1):
            metrics.log("step", step, _step_values(draw, step, steps, phase, phases))
    if finished:
        metrics.log("eval", steps, _eval_values("after", judges, labels))
        rows = _eval_rows(draw, "before", 0, judges, num_prompts, labels)
        rows += _eval_rows(draw, "after", steps, judges, num_prompts, labels)
        lines = [json.dumps(row) + "\n" for row in rows]
        (run_dir / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = _summary(rows, judges, phases, steps, labels)
        (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    metrics.close()
    return run_dir


def _step_values(draw: random.Random, step: int, steps: int, phase: int, phases: int) -> dict:
    inside = step / steps * phases - phase
    margin = 1.2 * inside + draw.gauss(0, 0.15)
    return {
        "loss": math.log1p(math.exp(-margin)) + draw.gauss(0, 0.02),
        "learning_rate": 5e-5 * (1 - step / steps),
        "grad_norm": abs(draw.gauss(2, 0.5)),
        "num_tokens": step * 64 * 180,
        "rewards/chosen": 0.4 * margin + draw.gauss(0, 0.05),
        "rewards/rejected": -0.6 * margin + draw.gauss(0, 0.05),
        "rewards/accuracies": min(1.0, 0.5 + 0.3 * inside + abs(draw.gauss(0, 0.05))),
        "rewards/margins": margin,
        "logps/chosen": -80 + draw.gauss(0, 2),
        "logps/rejected": -90 + draw.gauss(0, 2),
        "phase": phase,
        "policy_version": step,
        "pairs/step": 16,
    }


def _phase_values(draw: random.Random, phase: int, phases: int, steps: int) -> dict:
    total = 512 // phases
    tied, identical, unscored = total // 16, total // 32 + phase % 3, total // 64
    share = phase / phases
    return {
        "phase": phase,
        "policy_version": phase * steps // phases,
        "pairs/kept": total - tied - identical - unscored,
        "pairs/tied": tied,
        "pairs/identical": identical,
        "pairs/truncated": total // 10,
        "pairs/unscored": unscored,
        "objective/scores": -0.4 + 1.1 * share + draw.gauss(0, 0.02),
        "objective/scores_margin": 1.6 - 0.4 * share,
        "objective/kl": 6.5 * share,
        "objective/entropy": 1.9 - 0.5 * share,
        "completions/mean_length": 38 + 12 * share,
        "completions/min_length": 4,
        "completions/max_length": 128,
        "completions/clipped_ratio": 0.08 + 0.03 * share,
        "completions/distinct_2": 0.41 - 0.05 * share,
        "completions/unique": 0.97 - 0.03 * share,
        "timing/rollout_s": 14.2,
        "timing/annotate_s": 3.1,
        "timing/ref_s": 2.4,
        "timing/train_s": 24.0,
        "perf/tokens_per_s": 2300.0 + 50 * share,
        "perf/peak_memory_gib": 1.31 + 0.02 * share,
    }


def _eval_values(when: str, judges: tuple[str, ...], labels: bool) -> dict:
    after = when == "after"
    values: dict[str, float | str] = {"eval/when": when}
    for judge in judges:
        if labels:
            values[f"eval/win_rate/{judge}"] = 0.71 if after else 0.42
        values[f"eval/score/{judge}"] = 0.8 if after else -0.2
    return values | {
        "eval/kl": 5.9 if after else 0.0,
        "eval/mean_length": 47.5 if after else 36.2,
        "eval/clipped_ratio": 0.06 if after else 0.09,
        "eval/distinct_2": 0.36 if after else 0.41,
        "eval/unique": 0.96 if after else 0.99,
        "timing/eval_s": 8.7,
    }


def _eval_rows(
    draw: random.Random, when: str, step: int, judges: tuple[str, ...], num_prompts: int, labels: bool
) -> list[dict]:
    rows = []
    for prompt_id in range(num_prompts):
        output = draw.choice(AFTER if when == "after" else BEFORE)
        center = 0.7 if when == "after" else -0.2
        rows.append(
            {
                "when": when,
                "step": step,
                "prompt_id": prompt_id,
                "prompt": f"How do I reset the printer in room {prompt_id}? Assistant:",
                "label": "Press Reset on its settings page." if labels else None,
                "output": output,
                "num_tokens": len(output.split()),
                "truncated": output.endswith("and"),
                "scores": {judge: draw.gauss(center, 0.6) for judge in judges},
                "label_scores": {judge: draw.gauss(0.1, 0.4) if labels else None for judge in judges},
            }
        )
    return rows


def _summary(rows: list[dict], judges: tuple[str, ...], phases: int, steps: int, labels: bool) -> dict:
    sides = {}
    for when in ("before", "after"):
        values = _eval_values(when, judges, labels)
        side = [row for row in rows if row["when"] == when]
        sides[when] = {
            "win_rate": {
                judge: sum(row["scores"][judge] > row["label_scores"][judge] for row in side) / len(side)
                for judge in judges
                if labels
            },
            "score": {judge: sum(row["scores"][judge] for row in side) / len(side) for judge in judges},
            **{key: values[f"eval/{key}"] for key in ("kl", "mean_length", "clipped_ratio", "distinct_2", "unique")},
        }
    return {
        "task": "helpfulness",
        "method": {"ref": "behavior", "loss": "dpo", "phases": phases, "sampler": "policy", "members": 1},
        "model": "embedded help-desk policy",
        "data": "embedded help-desk prompts",
        "annotator": "embedded reward model",
        "judge": judges[0] if judges else None,
        **{f"win_rate_{when}": sides[when]["win_rate"].get(judges[0]) if judges else None for when in sides},
        "judges": list(judges),
        **sides,
        "pairs": {"kept": 455, "tied": 32, "identical": 17, "truncated": 51, "unscored": 8},
        "steps": steps,
        "seconds": {"eval": 17.4, "rollout": 28.4, "annotate": 6.2, "ref": 4.8, "train": 48.0, "total": 104.8},
        "tokens_per_s": 2310.0,
        "peak_memory_gib": 1.33,
        "policy_version": steps,
    }
