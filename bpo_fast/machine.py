"""What the machine is doing: memory."""

import resource
from contextlib import suppress
from pathlib import Path

import torch

from bpo_fast.allocator import give_back_freed_memory


def peak_memory_gib() -> float:
    """Peak of the GPU's allocator where there is one, else of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak() -> int:
    """Begins a new high-water mark of `peak_bytes`; returns the bytes held now.

    On a CPU that is resident memory without mapped files, whose pages come and go with the code that runs, after the
    allocator has handed back what it keeps of freed blocks. Where the system has no mark that can be reset, the peak of
    the whole process counts.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    give_back_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS") - _status_bytes("RssFile")


def peak_bytes() -> int:
    """High-water mark since `reset_peak`, of the same memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") - _status_bytes("RssFile")


def free_bytes() -> int:
    """Memory that can still be taken."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status; without one the peak of the process stands for VmRSS and VmHWM, 0 for others."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return next(found, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if field.startswith("Vm") else 0)
