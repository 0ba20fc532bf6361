"""bench/gpu_all.sh, the programs it calls left out."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
COMMAND = """#!/bin/sh
[ "$1" = train ] || exit 0
while [ "$1" != --out ]; do shift; done
mkdir "$2" # as a run does, whose folder must be free
"""


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout", "tar"))), reason="needs bash, timeout and tar")
def test_a_little_of_every_part_may_be_asked_for_again(tmp_path):
    (tmp_path / "bench").mkdir()
    shutil.copy(BENCH / "gpu_all.sh", tmp_path / "bench")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("bpo-fast", COMMAND), ("python3", "#!/bin/sh\n"), ("nvidia-smi", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    command = ["bash", str(tmp_path / "bench" / "gpu_all.sh"), "first"]
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert done.stdout.count("exit 0") == 7
    with tarfile.open(tmp_path / "out" / "gpu-results.tgz") as archive:
        assert {"gpu-results/main-job.log", "gpu-results/run"} <= set(archive.getnames())
