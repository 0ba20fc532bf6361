"""Runs `train` in forked children that are killed with SIGKILL, again and again, until one gets through.

Usage: kill_driver.py STRAIGHT.toml KILLED.toml SEED NUM_RANDOM. The imports are paid once, here: a child starts in
milliseconds. One child runs the first configuration undisturbed and shows what a run takes on this machine; those of
the second die at moments drawn at random, and once inside each of the places in `PLACES`. Moments are counted in a
child's own processor time, so that a busy machine, or a compiler that it waits for, does not move them.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from bpo_fast import config as configs
from bpo_fast import files
from bpo_fast.annotate import Checked
from bpo_fast.engine.hf import HfEngine
from bpo_fast.loop import Loop
from bpo_fast.metrics import Metrics
from bpo_fast.optim import Optimizer
from bpo_fast.reference import Reference
from bpo_fast.train import train

# (owner, name of the function, die before or after its work, at which call)
PLACES = [
    (Path, "replace", "before", 2),
    (HfEngine, "_decode", "before", 2),
    (Checked, "score", "after", 3),
    (Path, "replace", "after", 2),
    (Reference, "logps", "after", 1),
    (Path, "rename", "before", 1),
    (Optimizer, "step", "after", 1),
    (Path, "rename", "after", 1),
    (Metrics, "log", "after", 2),
    (files, "_sync", "before", 3),
    (Optimizer, "step", "before", 2),
    (files, "_sync", "after", 9),
    (Metrics, "log", "before", 2),
    (Loop, "finish", "before", 1),
]


def die_at(owner, name: str, when: str, call: int) -> None:
    """Arms one place: the process kills itself there."""
    inner, calls = getattr(owner, name), [0]

    def armed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        out = inner(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, name, armed)


def child(config, run: Path, place) -> int:
    """Forks a child that runs, or goes on with, the run; returns its pid."""
    pid = os.fork()
    if pid == 0:
        if place is not None:
            die_at(*place)
        code = 1
        try:
            resume = run if (run / "config.toml").exists() else None
            settings = configs.load(run / "config.toml") if resume else config
            train(settings, resume=resume, quiet=True)
            code = 0
        finally:
            os._exit(code)
    return pid


def cpu_s(pid: int, limit: float) -> float:
    """Processor seconds of a child when it has reached `limit`, or ended."""
    clock, seconds = (~pid << 3) | 2, 0.0  # Linux's name for the clock of another process
    while seconds < limit and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seconds = time.clock_gettime(clock)
        time.sleep(0.002)
    return seconds


def main() -> None:
    """Kills until done; prints the number of kills and of those by place."""
    straight, config = configs.load(sys.argv[1]), configs.load(sys.argv[2])
    pid = child(straight, Path(str(straight.run.output_dir)), None)
    run_s = cpu_s(pid, float("inf"))
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit(1)
    run = Path(str(config.run.output_dir))
    rng = random.Random(int(sys.argv[3]))
    # in the order in which a run gets to them, with kills at random moments between
    plan = list(reversed(PLACES))
    for _ in range(int(sys.argv[4])):
        plan.insert(rng.randint(1, len(plan)), None)
    num_kills = num_places = 0
    while True:
        place = plan.pop() if plan else None
        last = place is None and not plan
        pid = child(config, run, place)
        if place is None and not last:
            cpu_s(pid, rng.uniform(0.01, 0.1) * run_s)
            os.kill(pid, signal.SIGKILL)  # a child that has ended is not gone before it is waited for
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status)
        num_kills += killed
        num_places += killed and place is not None
        if not killed and (last or os.WEXITSTATUS(status) != 0):
            print(num_kills, num_places)
            sys.exit(os.WEXITSTATUS(status))


main()
