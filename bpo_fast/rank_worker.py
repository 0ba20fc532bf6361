"""A rank of a run, or of a stage before it, beside rank 0: what to do comes in as lines of JSON; nothing goes out.

It ends when rank 0 does, which alone is interrupted: SIGINT and SIGTERM to the whole job leave this one at its work. An
error is one line in the log, which rank 0 reads when the process has ended.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bpo_fast import config as configs
from bpo_fast.allocator import keep_freed_memory
from bpo_fast.cli_errors import reports_errors
from bpo_fast.config import Config
from bpo_fast.interrupts import interrupts_call
from bpo_fast.stage_config import RewardConfig, SftConfig
from bpo_fast.threads import call_when_orphaned, leaves_threads, share_cores

if TYPE_CHECKING:
    from bpo_fast.progress import Progress
    from bpo_fast.ranks import Ranks

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@reports_errors
def work() -> None:
    """Follows rank 0 through the run."""
    orders = _orders()
    order = next(orders)
    meeting = Path(order["meeting"])
    call_when_orphaned(partial(_end, meeting.parent), order["parent"])
    # torch is loaded here, after OpenMP's settings
    from bpo_fast.progress import Progress
    from bpo_fast.ranks import Group

    group = Group(order["rank"], order["size"], meeting, orders=orders)
    with Progress(quiet=True) as progress, closing(group) as ranks:
        _take_part(order["job"], order["device"], ranks, progress)


def _take_part(job: dict[str, Any], device: str, ranks: "Ranks", progress: "Progress") -> None:
    """What rank 0 does, by the name of its command."""
    if job["name"] == "train":
        from bpo_fast.train import run_rank

        config = configs.replace(Config(), job["config"] | {"run.device": device})
        resume = Path(job["resume"]) if job["resume"] else None
        run_rank(config, ranks, progress, resume=resume, from_pairs=job["from_pairs"])
    elif job["name"] == "sft":
        from bpo_fast.sft import train_rank

        train_rank(SftConfig(**job["config"] | {"device": device}), ranks, progress)
    else:
        from bpo_fast.reward import train_rank

        train_rank(RewardConfig(**job["config"] | {"device": device}), ranks, progress)


def _orders() -> Iterator[dict[str, Any]]:
    """Of rank 0; no buffer of sys.stdin is held by a thread that waits for the next when the process ends."""
    pipe = os.dup(0)  # an annotator, or a program that it starts, reads an empty standard input instead
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    rest = b""
    while found := os.read(pipe, 2**16):
        *lines, rest = (rest + found).split(b"\n")
        yield from map(json.loads, lines)


def _end(folder: Path) -> None:
    """In place of rank 0, whose temporary folder this is."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    share_cores()
    keep_freed_memory()
    with leaves_threads(), interrupts_call(lambda number, frame: None):
        app()
