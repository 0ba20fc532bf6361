"""What CI relies on: with BPO_FAST_REQUIRE_STAND_IN the stand-in's tests are not skipped unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "test_stand_in.py"
A_CUDA_BUILD = "import torch\n\ntorch.version.cuda = '13.0'\n"


@pytest.mark.parametrize("required", ["", "1"])
def test_a_skip_is_a_failure_where_the_stand_in_is_required(required, tmp_path):
    (tmp_path / "a_cuda_build.py").write_text(A_CUDA_BUILD)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    environ = os.environ | {"PYTHONPATH": path, "BPO_FAST_REQUIRE_STAND_IN": required}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-p", "a_cuda_build", str(TESTS)]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if required:
        assert done.returncode not in (0, 5), said
        assert "the stand-in is required: PyTorch has GPU kernels of its own" in said
    else:
        assert done.returncode == 0, said
        assert " skipped" in said
        assert "passed" not in said
