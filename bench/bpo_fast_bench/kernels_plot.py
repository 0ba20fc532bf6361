"""The figure of `bench kernels`: time and extra memory of every implementation, a row of panels a problem."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = {
    "native": "#1b7837",
    "triton": "#1b7837",
    "triton-gemm": "#5aae61",
    "torch": "#9970ab",
    "mm": "#bbbbbb",
    "mm-f32": "#bbbbbb",
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Write `path`.png and `path`.svg."""
    problems = record["problems"]
    figure, axes = plt.subplots(len(problems), 2, figsize=(9, 0.6 + 1.6 * len(problems)), squeeze=False)
    for (left, right), problem in zip(axes, problems, strict=True):
        rows = {name: row for name, row in problem["implementations"].items() if "seconds" in row}
        names, colors = list(rows), [COLORS.get(name, "#4575b4") for name in rows]
        ms = [1e3 * row["seconds"] for row in rows.values()]
        spread = [
            [1e3 * (row["seconds"] - row["p20"]) for row in rows.values()],
            [1e3 * (row["p80"] - row["seconds"]) for row in rows.values()],
        ]
        bars = left.barh(names, ms, xerr=spread, color=colors, error_kw={"lw": 1})
        left.bar_label(bars, labels=[f"{_short(value)} ms" for value in ms], padding=4, fontsize=7)
        left.margins(x=0.25)
        left.set_title(problem["label"], fontsize=8, loc="left")
        memory = [max(row["extra_mib"], 0.01) for row in rows.values()]
        bars = right.barh(names, memory, color=colors)
        right.set_xscale("log")
        right.set_xlim(min(memory) / 3, max(memory) * 5)
        right.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        right.xaxis.set_minor_formatter(NullFormatter())
        right.bar_label(bars, labels=[f"{_short(value)} MiB" for value in memory], padding=4, fontsize=7)
        right.set_title("extra memory (log)", fontsize=8, loc="left")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    env = record["environment"]
    commit = f"{env.get('git_commit', 'unknown')[:9]}{' with changes' if env.get('git_changed') else ''}"
    machine = env.get("gpu") or env["cpu"]
    figure.suptitle(f"{machine}, {env['threads']} threads, torch {env['torch']}, {commit}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)


def _short(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
