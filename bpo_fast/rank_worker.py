"""A rank of a run, or of another command, beside rank 0: what to do comes in as lines of JSON; nothing goes out.

It ends when rank 0 does, which alone is interrupted: SIGINT and SIGTERM to the whole job leave this one at its work. An
error is one line in the log, which rank 0 reads when the process has ended.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib import import_module
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

# what all processes of a command call with its settings, their ranks and a progress
PARTS = {
    "train": "bpo_fast.train:run_rank",
    "sft": "bpo_fast.sft:train_rank",
    "reward": "bpo_fast.reward:train_rank",
    "eval": "bpo_fast.contest:evaluate_rank",
    "sample": "bpo_fast.sample:sample_rank",
}
STAGES = {config.stage: config for config in (SftConfig, RewardConfig)}

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
    name, values = job["name"], job["config"]
    options = {key: value for key, value in job.items() if key not in ("name", "config")}
    module, function = PARTS[name].split(":")
    if name in STAGES:
        config = STAGES[name](**values | {"device": device})
    else:
        config = configs.replace(Config(), values | {"run.device": device})
    getattr(import_module(module), function)(config, ranks, progress, **options)


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
