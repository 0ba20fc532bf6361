"""Freed memory stays in the process, and goes back when that is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from bpo_fast import allocator

MEASURE = """
import ctypes, resource
from bpo_fast import allocator, cli
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults(*mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(n * 2**20) for n in mib]
    for block, n in zip(blocks, mib):
        ctypes.memset(block, 1, n * 2**20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def show(**_):
    faults(*[5] * 6)
    print(faults(20))  # the largest so far: a mapping of its own by default
    allocator.give_back_freed_memory()
    print(faults(20))
"""
PAGES = 20 * 2**20 // 4096

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    allocator._function("mallopt") is None or (THP.exists() and "[always]" in THP.read_text(encoding="ascii")),
    reason="glibc and pages of 4 KiB",
)


def faults_of(run):
    done = subprocess.run([sys.executable, "-c", MEASURE + run], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_a_command_takes_large_blocks_from_what_it_freed():
    taken_again, after_giving_back = faults_of("cli.app = show; cli.main()")
    assert taken_again < PAGES / 10
    assert after_giving_back > PAGES / 2


def test_elsewhere_a_large_block_is_new_memory():
    assert faults_of("show()")[0] >= PAGES
