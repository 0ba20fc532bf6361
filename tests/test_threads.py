"""Processes that end while work hangs in a thread, as a user sees it: they are gone at once, with their exit code."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import CAN_FORK, Forked
from judge_server import by_length, endpoint

from bpo_fast import config as configs
from bpo_fast.checkpoint import complete_checkpoints

HERE = Path(__file__).parent
NUM_ANSWERED = 16  # requests of the first of two phases: 8 pairs, in both orders
BUSY = """
import threading, torch
from bpo_fast.threads import Threads, leaves_threads

def multiply(begun):
    matrix = torch.eye(1000)
    while True:
        matrix @ matrix
        begun.set()

begun = threading.Event()
with leaves_threads(), Threads(1) as threads:
    threads.submit(multiply, begun)
    begun.wait()
    print("the last words")
    raise {error}
"""
ORPHAN = """
import os, time
from bpo_fast.threads import call_when_orphaned

call_when_orphaned(lambda: os._exit(5), int({parent}))
time.sleep(60)
"""


def start(command, cwd, popen=Forked):
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return popen(
        [sys.executable, *command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_orphan_notices_even_if_its_parent_was_gone_when_it_began():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = subprocess.run([sys.executable, "-c", ORPHAN.format(parent=gone.pid)], timeout=50)
    assert done.returncode == 5


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["default", "count", "policy"],
)
def test_openmp_spins_briefly_unless_told_otherwise(given, spins):
    """As OpenMP says itself when torch loads it: by default the command must come before that."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= given | {"OMP_DISPLAY_ENV": "verbose"}
    command = ["-m", "bpo_fast", "doctor"]
    if given:  # without the seconds of torch
        with open("/proc/self/maps") as maps:
            gomp = next(line.split()[-1] for line in maps if "libgomp" in line)  # torch has loaded it
        code = f"from bpo_fast.threads import share_cores; share_cores(); import ctypes; ctypes.CDLL({gomp!r})"
        command = ["-c", code]
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.usefixtures("without_drawings")
@pytest.mark.parametrize(
    ("knobs", "num_answered", "step"),
    [
        ({"annotator.overlap": True}, NUM_ANSWERED, 2),
        ({"annotator.overlap": False}, NUM_ANSWERED, 2),
        ({"eval.prompts": 4}, 0, 0),
    ],
    ids=["annotator", "annotator-after-sampling", "judge"],
)
def test_an_interrupt_does_not_wait_for_an_endpoint_that_hangs(
    tiny_model_dir, tiny_data, tmp_path, knobs, num_answered, step
):
    over = threading.Event()

    def silent_later(question, number):
        if number >= num_answered:
            over.wait(60)
        return by_length(question, number)

    with endpoint(silent_later) as server:
        values = {
            "model.path": str(tiny_model_dir),
            "model.lora_r": 4,
            "data.path": str(tiny_data.train),
            "data.eval_path": str(tiny_data.eval),
            "annotator.path": server.spec,
            "sampling.engine": "hf",
            "sampling.max_new_tokens": 8,
            "method.pairs": 16,
            "method.batch_pairs": 4,
            "method.phases": 2,
            "eval.prompts": 0,
            "eval.judges": (server.spec,),
            "run.device": "cpu",
            "run.output_dir": str(tmp_path / "run"),
        } | knobs
        (tmp_path / "run.toml").write_text(configs.to_toml(configs.load(None, values)))
        process = start(["-m", "bpo_fast", "train", "--config", "run.toml"], tmp_path)
        deadline = time.monotonic() + 120
        while len(server.seen) <= num_answered:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            errors = process.communicate(timeout=30)[1]  # half of what the endpoint hangs
        finally:
            process.kill()
            over.set()
    assert process.returncode == 130, errors
    assert f"interrupted at step {step}; go on with --resume" in errors
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == [f"checkpoint-{step}"]


@pytest.mark.parametrize(("error", "code", "words"), [("SystemExit(130)", 130, ""), ("KeyError('x')", 1, "KeyError: ")])
def test_a_thread_that_is_busy_in_torch_changes_no_exit_code(tmp_path, error, code, words):
    process = start(["-c", BUSY.format(error=error)], tmp_path, popen=subprocess.Popen)
    try:
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "the last words\n"), errors
    assert words in errors
    assert "terminate called" not in errors


def test_a_fork_waits_for_its_threads_as_an_interpreter_does(tmp_path):
    code = "import threading; threading.Timer(0.3, print, ['the last words']).start()"
    assert start(["-c", code], tmp_path).communicate(timeout=60)[0] == "the last words\n"


@pytest.mark.skipif(not CAN_FORK, reason="starts real processes")
def test_a_fork_computes_with_threads_that_its_parent_had():
    code = "import torch; torch.set_num_threads(2); print(float((torch.ones(500, 500) @ torch.ones(500, 500)).sum()))"
    torch.set_num_threads(2)
    torch.ones(500, 500) @ torch.ones(500, 500)
    fork = Forked([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert fork.communicate(timeout=60)[0] == "125000000.0\n"
    finally:
        fork.kill()
