"""What tests share beside fixtures: questions, answers, rows on disk, the command line as a subprocess."""

import json
import os
import subprocess
import sys
from pathlib import Path

NOUNS = ("printer", "router", "invoice", "window", "parcel", "garden", "kettle", "bicycle")
VERBS = ("reset", "open", "clean", "return", "move", "sell", "fix", "paint")


def question(i: int) -> str:
    """A short question, different for every i below 512."""
    return f"How do I {VERBS[i % 8]} the {NOUNS[i // 8 % 8]} in room {i // 64}?"


def answer(i: int) -> str:
    """The reference text of `question(i)`."""
    return f"You {VERBS[i % 8]} the {NOUNS[i // 8 % 8]} with care."


def rows_of_stages() -> list[dict[str, str]]:
    """Rows that SFT and a reward model can be trained on: 41 prompts, answers of three lengths."""
    answers = ["an apple", "a pear and a plum", "a cherry, a melon and a grape"]
    sides = [(answers[i % 3], answers[i % 2]) for i in range(41)]
    return [{"prompt": f"Number {i}?", "chosen": a, "rejected": b, "label": a} for i, (a, b) in enumerate(sides)]


def write_rows(path: Path, rows) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run_cli(
    args, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120, popen=subprocess.Popen
) -> subprocess.CompletedProcess:
    """Runs `python -m bpo_fast ARGS` in `cwd`; `toy_annotator` can be imported there."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "bpo_fast", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with popen(command, cwd=cwd, env=os.environ | own | (env or {}), **pipes) as process:
        try:
            said = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *said)
