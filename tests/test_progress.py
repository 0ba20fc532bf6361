import io
import re

import pytest
from rich.console import Console

from bpo_fast import progress as progress_module
from bpo_fast.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def _console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def _lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_plain_lines_are_rare_and_carry_the_latest_note(clock):
    console = _console()
    with Progress(console) as progress, progress.task("sampling", total=100) as task:
        for done in range(1, 101):
            clock.now += 0.125
            task.advance(note=f"n{done}")
    expected = [
        "sampling: 0/100",
        "sampling: 40/100  n40",
        "sampling: 80/100  n80",
        "sampling: 100/100 in 12.5 s  n100",
    ]
    assert _lines(console) == expected


def test_parts_done_before_are_counted_from_the_start(clock):
    console = _console()
    with Progress(console) as progress, progress.task("sweep", total=4, done=3) as task:
        clock.now += 1.5
        task.advance(note="")
    with Progress(console) as progress, progress.task("again", total=4, done=4):
        pass
    assert _lines(console) == [
        "sweep: 3/4  3 already done",
        "sweep: 4/4 in 1.5 s",
        "again: 4/4  4 already done",
        "again: 4/4 in 0.0 s  4 already done",
    ]


def test_plain_task_that_fails_says_where(clock):
    console = _console()

    def fail():
        with Progress(console) as progress, progress.task("training", total=4) as task:
            task.advance(3)
            clock.now += 1.5
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        fail()
    assert _lines(console) == ["training: 0/4", "training: 3/4 stopped after 1.5 s"]


@pytest.mark.parametrize("terminal", [False, True])
def test_short_tasks_of_one_kind_are_announced_once(clock, terminal):
    console = _console(terminal=terminal)
    with Progress(console) as progress:
        for step, seconds in enumerate([0.5, 0.5, 0.5, 2.0, 0.5]):
            with progress.task(f"phase {step}: sampling", total=1) as task:
                clock.now += seconds
                task.advance()
    ends = re.findall(r"phase (\d): sampling: 1/1 in (\S+) s", console.file.getvalue())
    assert ends == [("0", "0.5"), ("3", "2.0"), ("4", "0.5")]
    starts = re.findall(r"phase (\d): sampling: 0/1", console.file.getvalue())
    assert starts == ([] if terminal else ["0", "4"])


def test_many_short_tasks_still_show_a_sign_of_life(clock):
    console = _console()
    with Progress(console) as progress:
        for step in range(1, 41):
            with progress.task(f"phase {step}: training", total=1) as task:
                clock.now += 0.5
                task.advance()
    assert _lines(console)[2:] == [f"phase {step}: training: 1/1 in 0.5 s" for step in (11, 21, 31)]


def test_tasks_nest_and_text_is_not_markup(clock):
    console = _console()
    with Progress(console) as progress, progress.task("training", total=2), progress.task("eval [red]", total=0):
        progress.print("[bold]as it is[/bold] /path/[x]")
    assert _lines(console)[1:3] == ["eval [red]: 0/0", "[bold]as it is[/bold] /path/[x]"]


def test_quiet_shows_nothing():
    for terminal in (False, True):
        console = _console(terminal=terminal)
        with Progress(console, quiet=True) as progress, progress.task("sampling", total=2) as task:
            task.advance(2, note="x")
            progress.print("hello")
        assert console.file.getvalue() == ""


def test_terminal_shows_a_bar_and_leaves_a_line():
    console = _console(terminal=True)
    with Progress(console) as progress, progress.task("sampling", total=8) as task:
        task.advance(5, note="[b]note[/b]")
        progress._bars.refresh()
        task.advance(3)
    text = console.file.getvalue()
    assert "5/8" in text
    assert "[b]note[/b]" in text
    assert "sampling: 8/8 in " in text
