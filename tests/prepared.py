"""A process that has imported what its children need: each piece of work finds a process of its own in milliseconds.

A child of fork() has its parent's modules and none of its siblings' work. The parent computes nothing and has no
threads, so there is nothing of them that a child could miss.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

LIMIT_S = 500


class Prepared:
    """A process that forks for every piece of work; ends with the `with` block.

    Args:
        imports: statements that it runs first.
        env: of it and of its children, beside this process's.
    """

    def __init__(self, imports: str, env: Mapping[str, str] | None = None):
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {})
        command = [sys.executable, "-W", "ignore", __file__, imports]
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.communicate()

    def run(self, code: str, *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """Runs code in a child: its exit code, or minus its signal, and what it said."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([code, dict(env or {})]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the prepared process has ended"
        return subprocess.CompletedProcess(code, *json.loads(answer))

    def command(self, *args: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """Runs `python -m bpo_fast ARGS` in a child."""
        argv = ["bpo-fast", *map(str, args)]
        return self.run(f"import sys; sys.argv = {argv!r}; runpy.run_module('bpo_fast', run_name='__main__')", env=env)


def _serve(imports: str) -> None:
    exec(imports, {})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        code, env = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _work(code, env)
            exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        answers.write(json.dumps([exit_code, *said]) + "\n")
        answers.flush()


def _work(code: str, env: Mapping[str, str]) -> None:
    """Ends the process."""
    signal.alarm(LIMIT_S)
    os.environ.update(env)
    exit_code = exit_code_of(lambda: exec(code, {"runpy": runpy}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def exit_code_of(run: Callable[[], object]) -> int:
    """What an interpreter that runs this would end with, having said what it says; an interrupt ends the process."""
    try:
        run()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
