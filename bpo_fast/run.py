"""The run folder: what a run writes first, how it is found again, and how it is interrupted.

RUN/config.toml  env.json  metrics.jsonl  pairs/phase-00.jsonl  checkpoint-<step>/
    eval.jsonl  summary.json  report.html
"""

import json
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from bpo_fast import config as configs
from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.config import Config
from bpo_fast.doctor import environment
from bpo_fast.evaluate import EvalRow
from bpo_fast.files import read_json, read_jsonl, remove_temporaries, take_lock, write_atomic
from bpo_fast.interrupts import interrupts_call
from bpo_fast.ranks import Ranks

MAY_CHANGE = {
    *("run.output_dir", "run.save_steps", "run.save_total_limit", "run.report_to", "run.devices"),
    *("sampling.batch_size", "annotator.timeout_s", "annotator.retries", "annotator.requests"),
}


class Run:
    """A run folder; rank 0 writes to it.

    Args:
        path: the folder.
        resume: True if it must already hold a run.

    Attributes:
        was_finished: whether it held a finished run when it was opened.
    """

    def __init__(self, path: Path, *, resume: bool):
        self.path = path
        self.resume = resume
        self.was_finished = (path / "summary.json").exists()
        self.seconds: dict[str, float] = {}
        self._critical = False
        self._pending = False
        self._lock: IO[str] | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint of a resumed run."""
        found = complete_checkpoints(self.path)
        return found[-1] if self.resume and found else None

    def hold(self) -> None:
        """Keeps other commands from going on with the run until `close`; ValueError if one is doing so."""
        self._lock = take_lock(self.path / "config.toml", f"{self.path}: another command is at work on this run")

    def close(self) -> None:
        """Lets other commands go on with the run."""
        if self._lock is not None:
            self._lock.close()

    def pairs_path(self, phase: int) -> Path:
        """Where the pairs of a phase are."""
        return self.path / "pairs" / f"phase-{phase:02d}.jsonl"

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run, all or nothing."""
        write_atomic(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json, which only a finished run has."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def read_eval(self) -> list[EvalRow]:
        """Rows of eval.jsonl."""
        path = self.path / "eval.jsonl"
        return read_jsonl(path) if path.exists() else []

    def write_eval(self, rows: list[EvalRow]) -> None:
        """Writes eval.jsonl anew."""
        write_atomic(self.path / "eval.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def interruptible(self) -> AbstractContextManager[None]:
        """SIGINT and SIGTERM raise KeyboardInterrupt inside, but never within `critical`."""
        return interrupts_call(self._interrupt)

    @contextmanager
    def critical(self) -> Iterator[None]:
        """Weights and moments change together inside; an interrupt waits for the end."""
        self._critical = True
        try:
            yield
        finally:
            self._critical = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._critical:
            self._pending = True
        else:
            raise KeyboardInterrupt


def open_run(
    config: Config, *, resume: Path | None, command: list[str], ranks: Ranks | None = None
) -> tuple[Config, Run]:
    """Opens a new run folder, or an old one to go on with.

    Args:
        config: resolved settings.
        resume: folder of the run to go on with, or None for a new one.
        command: what the user typed, for env.json.
        ranks: of the run; rank 0 makes the folder, the others are told where it is.

    Returns:
        (the settings with the output folder filled in, the run)

    Raises:
        ValueError: a new run in a folder that holds one, or settings that differ from those of the run to resume.
    """
    ranks = ranks or Ranks()
    if not ranks.is_main:
        path = Path(ranks.gather("")[0])
        return configs.replace(config, {"run.output_dir": str(path)}), Run(path, resume=resume is not None)
    config, run = _open_as_main(config, resume, command)
    ranks.gather(str(run.path))
    return config, run


def _open_as_main(config: Config, resume: Path | None, command: list[str]) -> tuple[Config, Run]:
    if resume is not None:
        check_same(config, resume)
        run = Run(resume, resume=True)
        if not run.was_finished:
            run.hold()
        remove_temporaries(resume)
        if not (resume / "env.json").exists():
            run.write_json("env.json", environment(command))
        return config, run
    path = Path(config.run.output_dir or _new_name(config))
    check_free(path)
    config = configs.replace(config, {"run.output_dir": str(path)})
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(path / "config.toml", configs.to_toml(configs.with_full_paths(config)))
    run = Run(path, resume=False)
    run.hold()
    run.write_json("env.json", environment(command))
    return config, run


def check_free(path: Path) -> None:
    """Raises ValueError if a new run cannot be in `path`."""
    if path.is_dir() and (path / "config.toml").exists():
        raise ValueError(f"run.output_dir = {path}: holds another run; go on with --resume, or choose another --out")
    # what is left of a run that was killed before it had written its settings does not count
    if path.is_dir() and set(path.iterdir()) - set(path.glob(".*.tmp")):
        raise ValueError(f"run.output_dir = {path}: is not empty; choose another --out")
    if any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
        raise ValueError(f"run.output_dir = {path}: is not a folder; choose another --out")


def saved_config(path: Path) -> Config:
    """The settings of the run in a folder, with full paths; ValueError if there is none."""
    if not (path / "config.toml").is_file():
        raise ValueError(f"{path}: no run there (no config.toml)")
    return configs.with_full_paths(configs.load(path / "config.toml"))


def check_same(config: Config, path: Path, *, but: Collection[str] = ()) -> None:
    """Raises ValueError if a setting is not that of the run in a folder, `but` for some, or if there is no run."""
    old, new = configs.in_force(saved_config(path)), configs.in_force(config)
    for name, value in new.items():
        if value != old[name] and name not in MAY_CHANGE and name not in but:
            raise ValueError(f"{name} = {value}: the run to resume has {old[name]}")


def _new_name(config: Config) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{config.task}-{config.method.ref}-{config.method.loss}"
    path = Path("runs") / f"{name}-{stamp}"
    num = 1
    while path.exists():
        num += 1
        path = Path("runs") / f"{name}-{stamp}-{num}"
    return str(path)
