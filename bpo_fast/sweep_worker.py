"""A process of a sweep, `python -m bpo_fast.sweep_worker`: requests come in as lines of JSON, answers go out alike.

One process makes many runs, because starting Python and torch takes longer than a small run's sampling. An error that a
user can cause is an answer; any other ends the process, and its traceback is in the log of the worker.
"""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bpo_fast import config as configs
from bpo_fast import machine
from bpo_fast.allocator import keep_freed_memory
from bpo_fast.config import Config
from bpo_fast.export import export
from bpo_fast.sweep import FAILED, FINISHED, INTERRUPTED
from bpo_fast.threads import call_when_orphaned, leaves_threads
from bpo_fast.train import train


def run_one(request: Mapping[str, Any]) -> dict[str, Any]:
    """Makes, or goes on with, one run.

    Args:
        request: {"out": folder of the run, "values": knobs, "golden": run folder of the golden reference or None}.

    Returns:
        {"status", "error", "summary": of a finished run}
    """
    out, values = Path(request["out"]), dict(request["values"])
    answer: dict[str, Any] = {"status": FINISHED, "error": None, "summary": None}
    machine.reset_peak()  # peaks are those of one run, not of the process
    try:
        if request["golden"]:
            values["method.golden"] = str(_golden(Path(request["golden"])))
        config = configs.replace(Config(), values | {"run.output_dir": str(out)})
        resume = out if (out / "config.toml").is_file() else None
        answer["summary"] = train(config, resume=resume, quiet=True)
    except (ValueError, RuntimeError, OSError) as error:
        answer |= {"status": FAILED, "error": " ".join(str(error).split()) or type(error).__name__}
    except KeyboardInterrupt:
        answer |= {"status": INTERRUPTED}
    return answer


def _golden(run: Path) -> Path:
    """A finished run as a plain model folder, beside it; workers that want it at the same time make it once."""
    folder = run.with_name(f"{run.name}.merged")
    with run.with_name(f".{run.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            export(run, folder)
    return folder


def main() -> None:
    """Answers requests until the input ends."""
    # a worker whose sweep was killed must not write on beside the next one
    call_when_orphaned(lambda: os.kill(os.getpid(), signal.SIGTERM))
    # what libraries print must not get among the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for line in sys.stdin:
        answer = run_one(json.loads(line))
        answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        answers.flush()
        if answer["status"] == INTERRUPTED:
            break


if __name__ == "__main__":
    keep_freed_memory()
    with leaves_threads():
        main()
