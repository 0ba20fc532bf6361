"""How far the run is: bars on a terminal, one plain line now and then anywhere else."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

PLAIN_EVERY_S = 5.0
SHORT_S = 1.0


class Task:
    """One piece of work with a known number of parts; made by `Progress.task`."""

    def __init__(self, owner: "Progress", name: str, total: int):
        self._owner = owner
        self._name = name
        self._kind = re.sub(r"\d+", "#", name)
        self._total = total
        self._done = 0
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._bar = owner._bars.add_task(name, total=total, note="") if owner._bars is not None else None

    def advance(self, num: int = 1, *, note: str | None = None) -> None:
        """Count `num` more parts as done; `note` replaces the few words shown beside the count."""
        self._done += num
        self._note = self._note if note is None else note
        if self._owner._bars is not None and self._bar is not None:
            self._owner._bars.update(self._bar, completed=self._done, note=self._note)
        elif self._done < self._total and time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self._line(f"{self._done}/{self._total}")

    def _close(self, *, finished: bool) -> None:
        seconds = time.monotonic() - self._started
        if self._owner._bars is not None and self._bar is not None:
            self._owner._bars.remove_task(self._bar)
        silent_s = time.monotonic() - self._owner._last_line
        if self._expected_short() and seconds < SHORT_S and finished and silent_s < PLAIN_EVERY_S:
            return
        if seconds < SHORT_S:
            self._owner._short_kinds.add(self._kind)
        else:
            self._owner._short_kinds.discard(self._kind)
        self._line(f"{self._done}/{self._total} {'in' if finished else 'stopped after'} {seconds:.1f} s")

    def _expected_short(self) -> bool:
        """Did the last task of this kind end at once? An on-policy run has one of each kind every step."""
        return self._kind in self._owner._short_kinds

    def _line(self, text: str) -> None:
        self._owner.print(f"{self._name}: {text}" + (f"  {self._note}" if self._note else ""))


class Progress:
    """Shows the tasks of a run; use it as a context manager.

    On a terminal each open task is a bar and leaves one line when it ends. Elsewhere (a pipe, a log file, CI) a task
    prints a plain line when it starts and ends, and at most one every five seconds between. A task that took under a
    second is announced once: later ones of the same name, numbers aside, only speak up if they take longer, or if
    nothing was said for five seconds.

    Args:
        console: where to write; standard error when left out, so that standard output stays free for results.
        quiet: show nothing at all.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self._console = console or Console(stderr=True)
        self.quiet = quiet
        self._short_kinds: set[str] = set()
        self._last_line = time.monotonic()
        self._bars = None
        if self._console.is_terminal and not quiet:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def task(self, name: str, total: int, *, done: int = 0) -> Iterator[Task]:
        """Open a task.

        Args:
            name: what is being done, for example "sampling" or "phase 2 of 4: training".
            total: number of parts, >= 0.
            done: how many of them were done before.
        """
        task = Task(self, name, total)
        if done:
            task.advance(done, note=f"{done} already done")
        if self._bars is None and not task._expected_short():
            task._line(f"{done}/{total}")
        finished = False
        try:
            yield task
            finished = True
        finally:
            task._close(finished=finished)

    def print(self, message: str) -> None:
        """Print one line of plain text, above the bars if there are any."""
        if not self.quiet:
            self._last_line = time.monotonic()
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
