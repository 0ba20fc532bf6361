"""PyTorch's memory on a CPU: what is freed stays in the process, as it does in PyTorch's allocator on a GPU.

A training step frees and takes the same megabytes again and again. The C library either has large blocks come from the
system each time, whose pages are faulted in and zeroed (a tenth of a step on bare metal, more in a virtual machine that
hands free pages back to its host), or keeps them in a heap with holes, and a step holds up to twice what is alive. Both
are spared by an arena, csrc/arena_cpu.cpp.
"""

import ctypes
import functools
import logging
import os
from typing import Any

log = logging.getLogger(__name__)

_wanted = False
_arena: Any = None  # its library, once it is open


def keep_freed_memory() -> None:
    """Makes this process one that opens the arena, once the CPU is what it computes on."""
    global _wanted
    _wanted = True


def keep_less_code() -> None:
    """Has the code for 128 sizes of products of 16 bits kept, not for 1,024; before torch is imported.

    One size takes half a MB, and completions of all lengths make for hundreds. oneDNN keeps what it built, and PyTorch
    what it had from there: only what both have let go of is freed. Whoever has set another number keeps it.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def open_arena() -> None:
    """Has tensors on the CPU come from the arena from now on, in a process that keeps freed memory.

    Without a C++ compiler, or where the system gives the arena no addresses or counts them (`ulimit -v`), the C
    library's allocator stays.
    """
    global _arena
    if _wanted and _arena is None:
        _arena = _opened()


def arena_is_open() -> bool:
    """Whether tensors come from the arena: memory that is freed and taken again is whole and has its pages."""
    return _arena is not None


def give_back_freed_memory() -> None:
    """Returns what is free to the system."""
    if _arena is not None:
        _arena.bpo_fast_trim_arena()
    trim = _malloc_trim()
    if trim:
        trim(0)


@functools.cache
def _opened() -> Any:
    from bpo_fast_kernels.build import NativeUnavailable, built_library, cxx_command

    try:
        arena = ctypes.CDLL(str(built_library("arena_cpu.cpp", tuple(cxx_command()), ("c10",))))
    except (NativeUnavailable, OSError) as error:
        log.debug("no arena: %s", error)
        return None
    arena.bpo_fast_use_arena.restype = ctypes.c_bool
    return arena if arena.bpo_fast_use_arena() else None


def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
