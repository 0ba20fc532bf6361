"""What CI relies on: with BPO_FAST_REQUIRE_VLLM no vLLM test is skipped unseen."""

import os
import subprocess
import sys
from pathlib import Path

SKIPPED = """
import pytest

def test_by_a_call():
    pytest.skip("later")

@pytest.mark.skipif(True, reason="by a mark")
def test_by_a_mark():
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_that_passes():
    pass
"""


def run(folder: Path, required: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "BPO_FAST_REQUIRE_VLLM": required}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", str(folder)]
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=False)


def test_a_skip_is_a_failure_where_vllm_is_required(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_some.py").write_text(SKIPPED)
    (tmp_path / "test_module.py").write_text("import pytest\n\npytest.importorskip('no_such_module')\n")
    free, required = run(tmp_path, ""), run(tmp_path, "1")
    assert free.returncode == 0, free.stdout + free.stderr
    assert "1 passed, 3 skipped, 1 xfailed" in free.stdout
    assert required.returncode == 1, required.stdout + required.stderr
    assert "1 failed, 1 passed, 1 xfailed, 2 errors" in required.stdout
    assert required.stdout.count("skipped, although vLLM is required") >= 3
