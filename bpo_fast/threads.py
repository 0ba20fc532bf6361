"""Threads: for work that may hang, such as a request to a judge, so that what goes wrong elsewhere does not wait for
them; and OpenMP's, which share their cores with other programs.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

PREFIX = "bpo-fast"
SPINS = "10000"


def share_cores() -> None:
    """Has OpenMP's threads wait for each other asleep, after a short spin; to be called before torch is imported.

    GNU's OpenMP spins for milliseconds. Beside other programs a thread then takes the core that the one it waits for
    should have: next to two busy processes on two cores a short run took 48 s, and takes 16 s with a short spin. On
    idle cores both are alike. Whoever has set a policy or a count keeps it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def call_when_orphaned(action: Callable[[], None], parent: int | None = None) -> None:
    """Calls `action`, in a thread, once the process that started this one is gone.

    Args:
        action: what to do then.
        parent: id of that process; None: of this one's parent, if it is still there.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        action()

    threading.Thread(target=watch, daemon=True).start()


class Threads(ThreadPoolExecutor):
    """A pool that is left behind, its waiting work dropped, if the `with` block ends with an exception.

    Args:
        num: threads.
    """

    def __init__(self, num: int):
        super().__init__(num, thread_name_prefix=PREFIX)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)


@contextmanager
def leaves_threads() -> Iterator[None]:
    """Ends the process with the block if threads are left behind, by the exit code of its exception, if any."""
    try:
        yield
    finally:
        if any(thread.name.startswith(PREFIX) for thread in threading.enumerate()):
            error, code = sys.exc_info()[1], 0
            if isinstance(error, SystemExit):
                assert isinstance(error.code, int), "typer exits with numbers"
                code = error.code
            elif error:
                sys.excepthook(type(error), error, error.__traceback__)
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            # an orderly end would wait for them, and daemons that are in torch just then abort the process (SIGABRT)
            os._exit(code)
