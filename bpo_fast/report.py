"""The report of one run."""

from pathlib import Path
from typing import Any

from rich.console import Console


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path."""
    path = run_dir / "report.html"
    path.write_text("<!doctype html>\n<title>bpo-fast</title>\n", encoding="utf-8")
    return path


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the closing table of a run."""
    console.print(summary)


def print_examples(eval_rows: list[dict[str, Any]], console: Console, n: int = 3) -> None:
    """Print `n` completions before and after."""
    console.print(eval_rows[:n])
