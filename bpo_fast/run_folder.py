"""What a run folder says, for people: read whatever is there and name what is not."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHOD_NAMES = {
    ("policy", "behavior"): "BPO",
    ("policy", "initial"): "online",
    ("policy", "ema"): "online with an EMA reference",
    ("policy", "golden"): "online with a golden reference",
    ("initial", "initial"): "offline",
    ("initial", "behavior"): "moving reference on fixed data",
    ("initial", "ema"): "EMA reference on fixed data",
    ("initial", "golden"): "golden reference on fixed data",
}
PHASE_STAGES: tuple[str, ...] = ("rollout", "annotate", "ref", "train")
STAGES = (*PHASE_STAGES, "eval")
LOSS_NAMES = {"dpo": "DPO", "ipo": "IPO", "slic": "SLiC"}
REFERENCES = {
    "behavior": "the behavior LLM (the policy at the start of the phase)",
    "initial": "the initial policy",
    "ema": "a moving average of the policy",
    "golden": "a finished better policy",
}


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder.
        config: config.toml as nested tables; config_text: the same as written.
        env: env.json.
        steps, phases, evals: the lines of metrics.jsonl by kind, in order.
        eval_rows: the lines of eval.jsonl.
        summary: summary.json.
        missing: one sentence for each file that is not there or cannot be read.
    """

    path: Path
    config: dict[str, Any]
    config_text: str
    env: dict[str, Any]
    steps: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]
    summary: dict[str, Any]
    missing: list[str]


@dataclass(frozen=True)
class Measure:
    """One row of the result table: a number before and after training.

    Attributes:
        name: what is measured, in words.
        kind: how to write it: "share" in [0, 1], "tenth" or "score".
        before, after: the values; None if unknown.
    """

    name: str
    kind: str
    before: float | None
    after: float | None

    def texts(self) -> tuple[str, str, str]:
        """Before, after and change as a person reads them."""
        change = None if self.before is None or self.after is None else self.after - self.before
        return number_text(self.before, self.kind), number_text(self.after, self.kind), _change_text(change, self.kind)


@dataclass(frozen=True)
class Example:
    """One evaluation prompt with its output before and after training, either of which may be absent."""

    prompt: str
    label: str | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    change: float | None = None


@dataclass
class _Reader:
    path: Path
    missing: list[str] = field(default_factory=list)

    def text(self, name: str, why: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            self.missing.append(f"{name} is missing: {why}.")
        except (OSError, UnicodeDecodeError) as error:
            self.missing.append(f"{name} cannot be read: {error}.")
        return ""

    def toml(self, name: str, text: str) -> dict[str, Any]:
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            self.missing.append(f"{name} is not TOML: {error}.")
            return {}

    def json(self, name: str, why: str) -> dict[str, Any]:
        text = self.text(name, why)
        rows = self._rows(name, [text] if text else [])
        return rows[0] if rows else {}

    def jsonl(self, name: str, why: str) -> list[dict[str, Any]]:
        # Not splitlines(): JSON text may hold U+2028. What a killed process was writing has no newline yet.
        return self._rows(name, self.text(name, why).split("\n")[:-1])

    def _rows(self, name: str, texts: list[str]) -> list[dict[str, Any]]:
        rows, num_bad = [], 0
        for text in texts:
            if text.strip():
                try:
                    row = json.loads(text)
                except json.JSONDecodeError:
                    row = None
                rows += [row] if isinstance(row, dict) else []
                num_bad += not isinstance(row, dict)
        if num_bad:
            self.missing.append(f"{name} is damaged: {num_bad} of {num_bad + len(rows)} JSON objects cannot be read.")
        return rows


def read_run(run_dir: Path) -> RunFolder:
    """Read a run folder; a file that is absent or damaged is named in `missing` and stands empty.

    Raises:
        ValueError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run folder")
    reader = _Reader(run_dir)
    config_text = reader.text("config.toml", "the settings of the run are unknown")
    metrics = reader.jsonl("metrics.jsonl", "there is nothing to plot")
    rows = reader.jsonl("eval.jsonl", "there are no completions to show and no intervals")
    whole = [row for row in rows if all(key in row for key in ("when", "prompt_id", "prompt", "output"))]
    if len(whole) < len(rows):
        reader.missing.append(f"eval.jsonl: {len(rows) - len(whole)} rows lack when, prompt_id, prompt or output.")
    return RunFolder(
        path=run_dir,
        config=reader.toml("config.toml", config_text),
        config_text=config_text,
        env=reader.json("env.json", "machine and versions are unknown"),
        steps=[line for line in metrics if line.get("kind") == "step"],
        phases=[line for line in metrics if line.get("kind") == "phase"],
        evals=[line for line in metrics if line.get("kind") == "eval"],
        eval_rows=whole,
        summary=reader.json("summary.json", "the run was stopped before its end, or is still going"),
        missing=reader.missing,
    )


def method_words(method: Mapping[str, Any], steps: int | None = None) -> str:
    """Say in words what `ref`, `sampler`, `loss`, `phases` and `members` mean together in a run of so many steps."""
    ref, sampler = method.get("ref", "behavior"), method.get("sampler", "policy")
    phases, members = method.get("phases", "?"), method.get("members", 1)
    name = METHOD_NAMES.get((sampler, ref), f"sampler {sampler}, reference {ref}")
    if phases == 1 and ref in ("behavior", "initial"):
        name, ref = "offline", "initial"
    when = f"{phases} phase{'' if phases == 1 else 's'}"
    if phases == "on-policy" or (phases == steps and phases != 1):
        name, when = f"on-policy {name}", "a new phase every step"
    who = f"{members} member{'' if members == 1 else 's'}"
    loss = loss_name(method.get("loss", "?"))
    return f"{name}: {loss} against {REFERENCES.get(ref, ref)}, {when}, {who}"


def loss_name(loss: str) -> str:
    """What figures, tables and reports call a loss of the settings."""
    return LOSS_NAMES.get(loss, str(loss))


def results(run: RunFolder, when: str) -> dict[str, Any]:
    """The results "before" or "after": from summary.json, else from the last such line of metrics.jsonl."""
    if run.summary.get(when):
        return run.summary[when]
    lines = [line for line in run.evals if line.get("eval/when") == when]
    found: dict[str, Any] = {"win_rate": {}, "score": {}}
    for name, value in (lines[-1] if lines else {}).items():
        section, _, leaf = name.removeprefix("eval/").partition("/")
        if leaf and section in ("win_rate", "score"):
            found[section][leaf] = value
        elif name.startswith("eval/"):
            found[section] = value
    return found


def stage_seconds(run: RunFolder) -> dict[str, float]:
    """Seconds by stage: from summary.json, else summed over metrics.jsonl."""
    found = run.summary.get("seconds") or {}
    if not found:
        lines = run.phases + run.evals
        found = {stage: sum(line.get(f"timing/{stage}_s") or 0.0 for line in lines) for stage in STAGES}
    return {stage: found[stage] for stage in STAGES if found.get(stage)}


def measures(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Measure]:
    """The rows of the result table that have a value on either side."""

    def judged(section: str) -> list[str]:
        return list(dict.fromkeys([*before.get(section, {}), *after.get(section, {})]))

    def row(name: str, kind: str, *keys: str) -> Measure:
        return Measure(name, kind, _get(before, keys), _get(after, keys))

    rows = [row(f"win rate, {judge}", "share", "win_rate", judge) for judge in judged("win_rate")]
    rows += [row(f"mean score, {judge}", "score", "score", judge) for judge in judged("score")]
    rows += [
        row("KL to the start (nats)", "score", "kl"),
        row("mean length (tokens)", "tenth", "mean_length"),
        row("truncated", "share", "clipped_ratio"),
        row("distinct-2", "score", "distinct_2"),
        row("unique outputs", "share", "unique"),
    ]
    return [measure for measure in rows if measure.before is not None or measure.after is not None]


def wins(run: RunFolder, when: str, judge: str) -> dict[int, float]:
    """1.0 or 0.0 by prompt id: does the judge score the output strictly above the reference text?"""
    found = {}
    for row in run.eval_rows:
        score, label_score = _get(row, ("scores", judge)), _get(row, ("label_scores", judge))
        if row.get("when") == when and score is not None and label_score is not None:
            found[row["prompt_id"]] = float(score > label_score)
    return found


def examples(eval_rows: Sequence[Mapping[str, Any]], judge: str | None) -> list[Example]:
    """Join the rows of eval.jsonl by prompt, in order of first appearance; `change` is by `judge`."""
    sides: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in eval_rows:
        sides.setdefault(row["prompt_id"], {})[row["when"]] = row
    found = []
    for side in sides.values():
        before, after = side.get("before"), side.get("after")
        any_side = before or after
        if any_side is None:
            continue
        old, new = (_get(row, ("scores", judge)) if row and judge else None for row in (before, after))
        change = None if old is None or new is None else new - old
        found.append(Example(any_side["prompt"], any_side.get("label"), before, after, change))
    return found


def judges(eval_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the judges that scored the rows, in order."""
    return list(dict.fromkeys(judge for row in eval_rows for judge in row.get("scores") or {}))


def number_text(value: Any, kind: str) -> str:
    """A number as a person reads it: a "share" in percent, a "count" whole, "tenth" or "score" (to 0.001) as it is."""
    if not isinstance(value, int | float):
        return "n/a"
    if kind == "share":
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if kind == "count" else f"{value:.1f}" if kind == "tenth" else f"{value:.3f}"


def _change_text(change: float | None, kind: str) -> str:
    if change is None:
        return "n/a"
    return (
        f"{100 * change:+.1f} points" if kind == "share" else f"{change:+.1f}" if kind == "tenth" else f"{change:+.3f}"
    )


def pairs_words(pairs: Mapping[str, Any]) -> str:
    """Counts of pairs in words; the truncated ones are among the kept."""
    shown = {k: n for k, n in pairs.items() if k != "truncated" and (n or k not in ("empty", "too_long", "cut"))}
    words = [f"{count} {name.replace('_', ' ')}" for name, count in shown.items()]
    if words and pairs.get("truncated"):
        words[0] += f" ({pairs['truncated']} with a truncated completion)"
    return ", ".join(words)


def printable(text: str) -> str:
    """Text of a model, made safe to show: control characters other than newline and tab become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _get(tree: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None
