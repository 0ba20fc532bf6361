"""Freed memory stays in the process, and goes back when that is asked for."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
def faults_of_a_step():
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(2**22).zero_() for _ in range(10)]  # 40,960 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
from bpo_fast import allocator, cli
def show(**_):
    for _ in range(3):
        faults_of_a_step()
    print(faults_of_a_step())
    allocator.give_back_freed_memory()
    print(faults_of_a_step())
"""


def _faults(run):
    done = subprocess.run([sys.executable, "-c", MEASURE + run], capture_output=True, text=True, check=True)
    again, after_giving_back = map(int, done.stdout.split())
    return again, after_giving_back


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_command_takes_large_blocks_from_what_it_freed():
    again, after_giving_back = _faults("cli.app = show; cli.main()")
    assert again < 100
    assert after_giving_back > 20_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_elsewhere_large_blocks_are_new_memory_each_time():
    again, _ = _faults("show()")
    assert again > 20_000
