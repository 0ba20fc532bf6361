"""A rank of a run beside rank 0: what to do comes in as lines of JSON; nothing goes out.

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
from typing import Any

import typer

from bpo_fast import config as configs
from bpo_fast.allocator import keep_freed_memory
from bpo_fast.cli_errors import reports_errors
from bpo_fast.config import Config
from bpo_fast.interrupts import interrupts_call
from bpo_fast.threads import call_when_orphaned, leaves_threads, share_cores

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
    from bpo_fast.train import run_rank

    group = Group(order["rank"], order["size"], meeting, orders=orders)
    config = configs.replace(Config(), order["config"])
    resume = Path(order["resume"]) if order["resume"] else None
    with Progress(quiet=True) as progress, closing(group) as ranks:
        run_rank(config, ranks, progress, resume=resume, from_pairs=order["from_pairs"])


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
