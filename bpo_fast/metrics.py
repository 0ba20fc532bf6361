"""The numbers of a run: one JSON line an event in RUN/metrics.jsonl, and the trackers the user asked for.

metrics.jsonl is always written and is the record that a resumed run continues; TensorBoard and Weights & Biases are
mirrors of it. This is the only module that imports a tracker.
"""

import json
import math
import os
import secrets
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bpo_fast.files import errors_name, write_atomic

METRICS_FILE = "metrics.jsonl"
KINDS = ("step", "phase", "eval")


class Tracker(Protocol):
    """Somewhere else to send the same numbers."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Appends one JSON line an event to RUN/metrics.jsonl and mirrors it to the trackers.

    A line is `{"kind": "step"|"phase"|"eval", "step": int, ...values}` and is flushed when `log` returns, so a killed
    process loses at most the line it was writing. Floats are written by repr and read back exactly. NaN and infinities
    are not JSON: they are written as null, which means "not finite" throughout the file.

    A run continues where its checkpoint was taken: the checkpoint stores `num_lines`, and a resumed run hands that
    number back as `keep_lines`. Counting lines rather than comparing steps keeps what was logged at the step of the
    checkpoint before it, and drops what was logged at the same step after it.

    Args:
        run_dir: the run folder; it must exist.
        report_to: trackers, any of "tensorboard" (writes RUN/tensorboard) and "wandb" (writes RUN/wandb; WANDB_MODE
            and the other variables of wandb are its own business).
        keep_lines: lines to keep of a metrics.jsonl that is already there; None keeps every complete line. A torn
            last line is dropped in both cases. The file is replaced atomically.

    Raises:
        ValueError: `report_to` names an unknown or missing tracker, or metrics.jsonl has fewer than `keep_lines` lines.
    """

    def __init__(self, run_dir: Path, report_to: tuple[str, ...] = (), *, keep_lines: int | None = None):
        check_trackers(report_to)
        path = run_dir / METRICS_FILE
        lines = _complete_lines(path)
        if keep_lines is not None and keep_lines > len(lines):
            raise ValueError(f"{path}: has {len(lines)} lines, the checkpoint was taken after {keep_lines}")
        kept = lines[:keep_lines]
        if path.exists():
            write_atomic(path, b"".join(kept).decode())
        self._num_lines = len(kept)
        self._file = path.open("a", encoding="utf-8")
        purge_step = json.loads(kept[-1])["step"] + 1 if kept else None
        self._trackers = [_open_tracker(name, run_dir, purge_step) for name in dict.fromkeys(report_to)]

    @property
    def num_lines(self) -> int:
        """Lines written so far, forced to disk first, for a checkpoint to store."""
        os.fsync(self._file.fileno())
        return self._num_lines

    def log(self, kind: str, step: int, values: Mapping[str, float | int | str]) -> None:
        """Write one line and mirror it.

        Args:
            kind: "step", "phase" or "eval".
            step: optimizer steps taken so far.
            values: the numbers by name (names of TRL, see the report); strings are kept in the file only.
        """
        assert kind in KINDS, kind
        line = {"kind": kind, "step": step} | {name: _json_value(value) for name, value in values.items()}
        with errors_name(Path(self._file.name)):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        self._num_lines += 1
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class Unlogged(Metrics):
    """Drops what is logged: rank 0 has the file."""

    def __init__(self) -> None: ...

    @property
    def num_lines(self) -> int:
        """None."""
        return 0

    def log(self, kind: str, step: int, values: Mapping[str, float | int | str]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl in order, without a torn last one; empty if there is no file."""
    return [json.loads(line) for line in _complete_lines(run_dir / METRICS_FILE)]


def _complete_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    # A killed process leaves at most one line without its newline.
    return [line for line in lines if line.endswith(b"\n")]


def _json_value(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_trackers(report_to: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that is unknown or not installed, before anything is written."""
    for name in report_to:
        if name not in ("tensorboard", "wandb"):
            raise ValueError(f"run.report_to = {name!r}: unknown tracker; known are tensorboard and wandb")
        if find_spec(name) is None:
            raise ValueError(f'run.report_to = {name}: not installed; pip install "bpo-fast[{name}]"')


def _open_tracker(name: str, run_dir: Path, purge_step: int | None) -> Tracker:
    config_path = run_dir / "config.toml"
    config = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    if name == "wandb":
        return _Wandb(run_dir, config)
    return _TensorBoard(run_dir, config, purge_step)


def _numbers(values: Mapping[str, Any]) -> dict[str, float | int]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


class _TensorBoard:
    def __init__(self, run_dir: Path, config: str, purge_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged past its checkpoint disappears from the curves.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        # Markdown shows an indented block as it is.
        self._writer.add_text("config", "\n".join("    " + line for line in config.splitlines()))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: str):
        import wandb

        # The id outlives the process, so a resumed run continues the same curves.
        id_path = run_dir / "wandb-id"
        if not id_path.exists():
            id_path.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "bpo-fast"),
                name=run_dir.resolve().name,
                dir=str(run_dir),
                id=id_path.read_text(encoding="utf-8"),
                resume="allow",
                config=tomllib.loads(config),
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"run.report_to = wandb: {reason} (WANDB_MODE=offline needs no account)") from None
        # wandb's own step only ever grows; ours goes back to the checkpoint when a run is resumed.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_numbers(values) | {"step": step})

    def close(self) -> None:
        self._run.finish()
