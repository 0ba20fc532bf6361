"""`bpo-fast sweep`: the runs of a grid, in a few worker processes, one results file; stopped at any point it goes on.

SWEEP/results.jsonl  runs/NAME/ (run folders)  logs/worker-N.log
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bpo_fast import config as configs
from bpo_fast.config import Config
from bpo_fast.files import read_json, remove_temporaries, take_lock, write_atomic
from bpo_fast.grid import RunSpec
from bpo_fast.interrupts import interrupts_call
from bpo_fast.progress import Progress
from bpo_fast.run_folder import number_text
from bpo_fast.tasks import resolve

RESULTS_FILE = "results.jsonl"
LOCK_FILE = ".lock"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
# of summary.json; the rest is in the run folder
KEPT = ("before", "after", "pairs", "steps", "seconds", "num_tokens", "tokens_per_s", "peak_memory_gib", "judges")
# may differ between a grid and the run it names: where it is, which engine auto is, the name of its golden run
MAY_DIFFER = ("run.output_dir", "sampling.engine", "method.golden")
PAIRS, ASKED = "method.pairs", "asked_pairs"
WAIT_S = 30.0
Row = dict[str, Any]


class Sweep:
    """The state of a sweep: what is done, what runs, what waits.

    Args:
        specs: runs in order.
        folder: of the sweep; finished runs in it are taken as they are.

    Raises:
        ValueError: a run in the folder that has other settings than the grid says, by knob.
    """

    def __init__(self, specs: Sequence[RunSpec], folder: Path):
        self.specs, self.folder = list(specs), folder
        self.rows: dict[str, Row] = {}
        self._asked_pairs: dict[str, int] = {}  # by run
        self._lock = threading.Condition()
        self._running: set[str] = set()
        self._stopped = False
        self._error: Exception | None = None
        results = folder / RESULTS_FILE
        before = {row["run"]: row for row in read_results(results)} if results.exists() else {}
        for spec in self.specs:
            wanted = configs.in_force(resolve(configs.replace(Config(), spec.values)))
            _check_same(wanted, self.run_dir(spec.name), before.get(spec.name, {}).get(ASKED))
            self._asked_pairs[spec.name] = wanted[PAIRS]
            if (summary := _summary(self.run_dir(spec.name))) is not None:
                self.rows[spec.name] = self._row(spec, FINISHED, summary=summary)

    @property
    def waiting(self) -> list[RunSpec]:
        """Runs that have neither finished nor failed in this sweep."""
        return [s for s in self.specs if s.name not in self.rows]

    @property
    def num_failed(self) -> int:
        """Runs that failed in this sweep."""
        return sum(row["status"] == FAILED for row in self.rows.values())

    def run_dir(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / name

    def run(self, num_jobs: int, progress: Progress) -> None:
        """Makes every waiting run; a failure is recorded and the rest goes on.

        Args:
            num_jobs: worker processes, one thread each.
            progress: shows how far the sweep is.

        Raises:
            ValueError: another command makes them.
            OSError: results cannot be written, or no worker be started.
            KeyboardInterrupt: after the workers have written their checkpoints.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with take_lock(self.folder / LOCK_FILE, f"{self.folder}: another command is at work on this sweep"):
            self._run(num_jobs, progress)

    def _run(self, num_jobs: int, progress: Progress) -> None:
        remove_temporaries(self.folder)
        self._write()
        todo = self.waiting
        with progress.task("sweep", len(self.specs), done=len(self.specs) - len(todo)) as task:
            workers = [_Worker(self.folder / "logs" / f"worker-{n}.log") for n in range(min(num_jobs, len(todo)))]

            def tell(row: Row) -> None:
                progress.print(f"[{len(self.rows)}/{len(self.specs)}] {row_words(row)}")
                task.advance(1, note=f"{self.num_failed} failed" if self.num_failed else "")

            threads = [threading.Thread(target=self._serve, args=(w, tell), daemon=True) for w in workers]
            for thread in threads:
                thread.start()
            try:
                with interrupts_call(signal.default_int_handler):
                    for thread in threads:
                        while thread.is_alive():  # join() without a limit would keep signals waiting
                            thread.join(0.2)
                if self._error is not None:
                    raise self._error
            except KeyboardInterrupt:
                self._stop()
                progress.print("interrupted: the runs write checkpoints; the same command goes on")
                raise
            finally:
                for worker in workers:
                    worker.stop()

    def _serve(self, worker: "_Worker", tell: Callable[[Row], None]) -> None:
        """Feeds one worker until nothing is left for it; what cannot be recorded or started ends the sweep."""
        try:
            self._feed(worker, tell)
        except Exception as error:  # of a thread, which nobody would hear
            self._error = error
            self._stop()

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    def _feed(self, worker: "_Worker", tell: Callable[[Row], None]) -> None:
        while (spec := self._next()) is not None:
            golden = str(self.run_dir(spec.needs)) if spec.needs else None
            request = {"out": str(self.run_dir(spec.name)), "values": dict(spec.values), "golden": golden}
            answer = worker.ask(request)
            with self._lock:
                self._running.discard(spec.name)
                if answer["status"] in (FINISHED, FAILED) and not self._stopped:
                    self._done(self._row(spec, **answer), tell)
                self._lock.notify_all()

    def _next(self) -> RunSpec | None:
        """The first run that can start now; waits for one that it needs."""
        with self._lock:
            while not self._stopped:
                ready = [s for s in self.waiting if s.name not in self._running]
                for spec in ready:
                    if spec.needs is None or self.rows.get(spec.needs, {}).get("status") == FINISHED:
                        self._running.add(spec.name)
                        return spec
                if not ready:
                    return None
                self._lock.wait(1.0)
            return None

    def _done(self, row: Row, tell: Callable[[Row], None]) -> None:
        """Records a run that has ended; what needs one that failed is not made against half of it, but fails too."""
        self.rows[row["run"]] = row
        self._write()
        tell(row)
        for other in self.waiting if row["status"] == FAILED else ():
            if other.needs == row["run"]:
                self._done(self._row(other, FAILED, error=f"it needs {row['run']}, which failed"), tell)

    def _row(
        self, spec: RunSpec, status: str, *, error: str | None = None, summary: Mapping[str, Any] | None = None
    ) -> Row:
        row = spec.place() | {"status": status, "error": error, ASKED: self._asked_pairs[spec.name]}
        return row | {key: (summary or {}).get(key) for key in KEPT}

    def _write(self) -> None:
        done = [self.rows[s.name] for s in self.specs if s.name in self.rows]
        write_atomic(self.folder / RESULTS_FILE, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in done))


class _Worker:
    """A process that makes one run after the other; started when first asked, and again if it died."""

    def __init__(self, log: Path):
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request; a worker that dies over it has failed it."""
        process = self._started()
        log_size = self._log.stat().st_size
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        code = process.wait()
        self._process = None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = self._log.read_bytes()[log_size:].decode(errors="replace").split("\n")
        last = next((f": {text.strip()}" for text in reversed(said) if text.strip()), "")
        return {"status": FAILED, "error": f"the process ended with {how}{last}", "summary": None}

    def stop(self) -> None:
        """Ends the process; a run in it writes a checkpoint first."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        assert process.stdin is not None
        process.send_signal(signal.SIGTERM)
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "bpo_fast.sweep_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"},
                    start_new_session=True,  # Ctrl-C is for the sweep, which asks its workers to stop
                )
        return self._process


def default_jobs(specs: Sequence[RunSpec]) -> int:
    """A worker a core if every run is on the CPU, else one."""
    if any(s.values.get("run.device") != "cpu" for s in specs):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_results(path: Path) -> list[Row]:
    """Rows of a results file; ValueError if it is not one."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a results file: {error}") from None
    if not all(isinstance(row, dict) and "run" in row and "status" in row for row in rows):
        raise ValueError(f"{path}: not a results file: a row without run and status")
    return rows


def row_words(row: Row) -> str:
    """One line on a run that has ended."""
    if row["status"] != FINISHED:
        return f"{row['run']}: FAILED: {row['error']}"
    after = row.get("after") or {}
    words = [f"{judge} {number_text(rate, 'share')}" for judge, rate in (after.get("win_rate") or {}).items()]
    words += [f"KL {number_text(after.get('kl'), 'score')}"] if after.get("kl") is not None else []
    words += [f"{number_text((row.get('seconds') or {}).get('total'), 'tenth')} s"]
    return f"{row['run']}: {', '.join(words)}"


def _summary(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    return read_json(path) if path.is_file() else None


def _check_same(wanted: Mapping[str, Any], run_dir: Path, asked_pairs: int | None) -> None:
    """Raises ValueError if the run has other settings; it may have fewer pairs than it was asked for, as data allow."""
    if not (run_dir / "config.toml").is_file():
        return
    there = configs.in_force(configs.load(run_dir / "config.toml"))
    if there[PAIRS] < wanted[PAIRS] and asked_pairs in (None, wanted[PAIRS]):
        there[PAIRS] = wanted[PAIRS]
    for name, value in wanted.items():
        if name not in MAY_DIFFER and value != there[name]:
            raise ValueError(
                f"{name} = {value}: the run in {run_dir} has {there[name]}; choose another --out or remove it"
            )
