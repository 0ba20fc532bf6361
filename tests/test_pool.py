import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from judge_server import endpoint, said

from bpo_fast import pool
from bpo_fast.pool import Pool


def test_results_are_those_of_the_calls_in_their_order():
    with Pool(3, "t") as threads:
        assert [f.result() for f in [threads.submit(pow, i, 2) for i in range(50)]] == [i * i for i in range(50)]


def test_an_error_reaches_whoever_waits():
    with pytest.raises(ZeroDivisionError), Pool(1, "t") as threads:
        threads.submit(divmod, 1, 0).result()


def test_left_in_order_it_waits_for_all_calls():
    done = []
    with Pool(2, "t") as threads:
        for i in range(8):
            threads.submit(lambda i=i: (time.sleep(0.01), done.append(i)))
    assert sorted(done) == list(range(8))


def test_left_by_an_exception_it_begins_nothing_more(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_S", 0.2)
    goes_on, begun = threading.Event(), []

    def call(i):
        begun.append(i)
        goes_on.wait(30)

    def interrupted():
        with Pool(1, "t") as threads:
            for i in range(3):
                threads.submit(call, i)
            while not begun:
                time.sleep(0.001)
            raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.perf_counter() - start < 5
    goes_on.set()
    time.sleep(0.1)
    assert begun == [0]


@pytest.mark.parametrize("role", ["judge", "annotator"])
def test_a_run_with_a_silent_judge_ends_at_ctrl_c(tiny_args, tmp_path, role):
    silence, asked = threading.Event(), threading.Event()

    def answer(question, number):
        asked.set()
        silence.wait(60)
        return said("[[A]]")

    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with endpoint(answer) as server:
        command = [sys.executable, "-m", "bpo_fast", *tiny_args, "--out", "run", f"--{role}", server.spec]
        started = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stderr=subprocess.PIPE
        )
        try:
            assert asked.wait(120)
            time.sleep(0.5)
            start = time.perf_counter()
            started.send_signal(signal.SIGINT)
            _, err = started.communicate(timeout=50)
            assert started.returncode == 130, err
            assert time.perf_counter() - start < 20
        finally:
            silence.set()
            started.kill()
