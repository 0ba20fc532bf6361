"""bench/gpu_all.sh, the programs it calls left out."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bpo_fast.cli import app

BENCH = Path(__file__).parents[1] / "bench"
COMMAND = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/commands"
[ "$1" = train ] || exit 0
while [ "$1" != --out ]; do shift; done
mkdir "$2" # as a run does, whose folder must be free
"""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout", "tar"))), reason="needs bash, timeout and tar"
)


@pytest.fixture
def gpu_all(tmp_path):
    """Runs the script with these arguments; its programs do nothing but note bpo-fast's arguments in `commands`."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BENCH / "gpu_all.sh", tmp_path / "bench")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("bpo-fast", COMMAND), ("python3", "#!/bin/sh\n"), ("nvidia-smi", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}

    def run(*args):
        command = ["bash", str(tmp_path / "bench" / "gpu_all.sh"), *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return done.stdout, (programs / "commands").read_text().splitlines()

    return run


def test_a_little_of_every_part_may_be_asked_for_again(gpu_all, tmp_path):
    for _ in range(2):
        said, _ = gpu_all("first", "second")
    assert said.count("exit 0") == 9
    with tarfile.open(tmp_path / "out" / "gpu-results.tgz") as archive:
        assert {"gpu-results/main-job.log", "gpu-results/run-main-job-hf"} <= set(archive.getnames())


def test_its_commands_are_those_of_bpo_fast(gpu_all):
    commands = gpu_all("first", "second")[1] + gpu_all()[1]
    assert len(commands) > 20
    for command in commands:
        done = CliRunner().invoke(app, [*command.split(), "--help"])  # what is unknown comes before the help
        assert done.exit_code == 0, (command, done.output)


BREAKS_THE_DEVICE = """
import pytest
import torch


@pytest.fixture(scope="module")
def device():
    broken = []

    def synchronize():
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        yield broken


@pytest.mark.parametrize("case", range(3))
def test_kernel(device, case):
    device += [case] * (case == 1)


@pytest.mark.parametrize("case", range(2))
def test_other(device, case):
    assert not device
"""


def test_a_broken_device_ends_no_more_than_its_test(tmp_path):
    shutil.copy(BENCH.parent / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "test_device.py").write_text(BREAKS_THE_DEVICE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", "-v", "test_device.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = [line.split("::")[1].strip() for line in done.stdout.splitlines() if "PASSED" in line]
    assert told[:3] == ["test_kernel[0]", "test_other[0]", "test_kernel[1]"]  # the second cases come after the first
    assert "1 failed, 5 passed" in done.stdout
