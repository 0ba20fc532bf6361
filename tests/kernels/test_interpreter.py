import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")


def takes_arrays_for_numbers():
    """Whether int() takes an array of one number, as NumPy did before 2.5."""
    try:
        return int(np.ones(1)) == 1
    except TypeError:
        return False


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and not takes_arrays_for_numbers(),
    reason="the interpreter of this Triton needs a NumPy before 2.5",
)
def test_triton_kernels_in_the_interpreter():
    """interpreted.py in a process of its own: TRITON_INTERPRET must be set before triton is imported."""
    cases = Path(__file__).with_name("interpreted.py")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", str(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
