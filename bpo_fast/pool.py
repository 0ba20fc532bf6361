"""Threads that nobody has to wait for."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
# what a call in flight gets to end by itself: a thread that the interpreter cuts off inside native code can crash it
PATIENCE_S = 3.0


class Pool:
    """Daemon threads that take calls in their order; a context manager.

    Left by an exception it forgets the calls that have not begun and does not wait for one that hangs. The threads of
    `concurrent.futures` are waited for again when the process ends, so that one silent server holds up a Ctrl-C.

    Args:
        num_threads: calls at work at the same time.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str):
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        self._cut_off = False
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(cut_off=kind is not None)

    def close(self, *, cut_off: bool) -> None:
        """Ends the threads: once all calls are done, or, cut off, as soon as it goes without waiting for long."""
        self._cut_off = cut_off
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()) if cut_off else None)

    def submit(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
        """The future result of a call."""
        future: Future[T] = Future()
        self._calls.put(lambda: _settle(future, call, args, options))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._cut_off:
                call()


def _settle(future: Future[Any], call: Callable[..., Any], args: Any, options: Any) -> None:
    try:
        future.set_result(call(*args, **options))
    except BaseException as error:
        future.set_exception(error)
