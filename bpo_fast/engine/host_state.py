"""Process-wide state that a guest library must leave as it found it.

vLLM seeds every generator, swaps `torch.set_num_threads`, sets environment variables, changes the matmul precision and
freezes the garbage collector's objects when it starts.
"""

import gc
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Self

import numpy as np
import torch

_HANDLED = (signal.SIGINT, signal.SIGTERM)
# what vLLM replaces in torch for good, on a CPU
_PATCHED = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
    (torch.accelerator, "get_memory_info"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "set_stream"),
    (torch.cuda, "current_stream"),
    (torch.cuda, "stream"),
)
_replacements: dict[tuple[Any, str], Any] = {}


@contextmanager
def guest_functions() -> Iterator[None]:
    """Inside, torch has the functions that vLLM has put there (it does so once, and calls them later); outside its own.

    A context like any of vLLM's work: start, sampling, shutdown.
    """
    own = {(owner, name): getattr(owner, name) for owner, name in _PATCHED}
    for (owner, name), function in _replacements.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in own.items():
            if getattr(owner, name) is not function:
                _replacements[owner, name] = getattr(owner, name)
                setattr(owner, name, function)


@contextmanager
def preserved(environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Whatever runs inside, the process is afterwards as it was.

    Covers functions of torch, random generators (python, numpy, torch, CUDA), threads, default dtype, matmul precision,
    environment, signal handlers, warning filters, the root logger, the except hook, hooks of torch.compile and Triton,
    frozen objects of gc and the CUDA device and stream. Warnings and log lines below errors are dropped inside.

    Args:
        environ: variables set inside.
    """
    before = _capture()
    frozen = gc.get_freeze_count()
    os.environ.update(environ or {})
    try:
        with guest_functions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        if gc.get_freeze_count() > frozen == 0:
            gc.unfreeze()
        _restore(before)


@contextmanager
def preserved_class(cls: type) -> Iterator[None]:
    """The class is afterwards as it was; vLLM decorates transformers' own where it has no code for an architecture."""
    bases, own = cls.__bases__, dict(vars(cls))
    try:
        yield
    finally:
        if cls.__bases__ != bases:
            cls.__bases__ = bases
        for name, value in dict(vars(cls)).items():
            if name not in own:
                delattr(cls, name)
            elif own[name] is not value:
                setattr(cls, name, own[name])


@contextmanager
def heap_frozen() -> Iterator[None]:
    """A collection of garbage inside leaves out what was there before; with vLLM that is half a second of work."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def preserved_random() -> Iterator[None]:
    """The generators are afterwards as they were; cheap enough for every call of a sampler."""
    python, array = random.getstate(), np.random.get_state()
    cpu, cuda = torch.get_rng_state(), _cuda_rng()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def redirected(file: IO[bytes], *descriptors: int) -> Iterator[None]:
    """What is written to these descriptors inside goes to the file, and what processes that start inside ever write."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in descriptors]
    for descriptor in descriptors:
        os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip(descriptors, kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """What native code writes to standard error is shown only if an exception leaves the block."""
    with tempfile.TemporaryFile() as file:
        failed = True
        try:
            with redirected(file, 2):
                yield
            failed = False
        finally:
            if failed:
                file.seek(0)
                os.write(2, file.read())


@contextmanager
def main_hidden() -> Iterator[None]:
    """Processes that start inside do not run the script of this one again, which may have no guard against it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Interrupts:
    """SIGINT and SIGTERM wait until `deliver`, so that none lands in the middle of a step of a guest library.

    A second signal before that means that the step hangs: it interrupts at once. A context manager.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _HANDLED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._number is not None:
            signal.raise_signal(self._number)

    def deliver(self) -> None:
        """Hands a signal that has come to the handler it was meant for, which may raise or only take note."""
        if self._number is None:
            return
        number, self._number = self._number, None
        signal.signal(number, self._before[number])
        signal.raise_signal(number)
        signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self._number is not None:
            raise KeyboardInterrupt
        self._number = number


def _capture() -> dict[str, Any]:
    cuda = torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_rng(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "environ": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in _HANDLED},
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "excepthook": sys.excepthook,
        "stream": (torch.cuda.current_device(), torch.cuda.current_stream()) if cuda else None,
        "compile": set(_compile_hooks()),
        "triton": {name: dict(values) for name, values in _triton_knobs().items()},
    }


def _restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_num_threads(state["threads"])
    torch.set_default_dtype(state["dtype"])
    torch.set_float32_matmul_precision(state["precision"])
    os.environ.clear()
    os.environ.update(state["environ"])
    for number, handler in state["signals"].items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    level, logging.root.handlers[:], disabled = state["logging"]
    logging.root.setLevel(level)
    logging.disable(disabled)
    sys.excepthook = state["excepthook"]
    for added in set(_compile_hooks()) - state["compile"]:
        del _compile_hooks()[added]
    for name, values in _triton_knobs().items():
        values.clear()
        values.update(state["triton"].get(name, {}))  # empty where Triton was not there
    if state["stream"] is not None:
        device, stream = state["stream"]
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)


def _compile_hooks() -> dict[int, Any]:
    """What torch.compile calls when it has compiled anything; each of a compiled vLLM keeps its model alive."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    return compiler._bytecode_hooks if compiler else {}


def _triton_knobs() -> dict[str, dict[str, Any]]:
    """What was set in Triton; vLLM has itself told of kernels that come after its start, as all of the trainer's do."""
    knobs = sys.modules.get("triton.knobs")
    return {name: vars(getattr(knobs, name)) for name in ("autotuning", "runtime")} if knobs else {}


def _cuda_rng() -> list[torch.Tensor] | None:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
