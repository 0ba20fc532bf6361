"""SIGINT and SIGTERM end long work in the same way; imports no torch."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_call(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler` inside, in a process that a shell has started in the background too.

    Outside of the main thread, where no signal can be caught, everything stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
