"""The C library's allocator on a CPU: what is freed stays in the process, as it does in PyTorch's allocator on a GPU.

A training step frees and takes the same megabytes again and again. By default every large block is new memory from the
system, whose pages are faulted in and zeroed each time: a tenth of a step on bare metal, more in a virtual machine that
hands free pages back to its host.
"""

import ctypes
from typing import Any

# parameters of mallopt in glibc's malloc.h with their new values
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-2, 2**26), (-3, 2**25)


def keep_freed_memory() -> None:
    """Has blocks of up to 32 MiB, the most that glibc allows, come from a heap that does not shrink by itself.

    Larger ones would leave holes in it: glibc 2.36 finds no place for an aligned block where one of its size has been.
    Nothing happens where the library is another.
    """
    mallopt = _function("mallopt")
    if mallopt:
        for parameter, value in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD):
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Returns what is free to the system, between parts of a run that need memory of different kinds."""
    trim = _function("malloc_trim")
    if trim:
        trim(0)


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
