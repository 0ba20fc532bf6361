"""Python processes that begin as forks of this one, which has imported what they need: that is most of a short run.

Their pipes, their session, their signals, their exit code and all the code that they run are those of any other: only
the interpreter is not started anew, so that hashes, and with them the order of sets, are this one's. It is for a
command in test_cli.py, and for a command with two ranks in test_devices.py (of the files of the working folder).
What waits for threads of a library, as torch.compile does, cannot be forked.
"""

import atexit
import ctypes
import gc
import logging
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from types import SimpleNamespace

import torch
from prepared import exit_code_of

# elsewhere processes are started as ever: libraries do not survive a fork on other systems, and CUDA does on none
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()


class Forked(subprocess.Popen):
    """A process of `[sys.executable, OPTION..., "-m", MODULE, ...]`, or of `-c CODE`, or of a script.

    Options, -P and -W, are those of this process.
    """

    def __init__(self, command, *, env=None, preexec_fn=None, **options):
        def become():
            if preexec_fn:
                preexec_fn()
            _become(command[1:], os.environ.copy() if env is None else env)

        if CAN_FORK:
            _end_openmp_threads()
            super().__init__(command, env=env, preexec_fn=become, **options)
        else:
            super().__init__(command, env=env, preexec_fn=preexec_fn, **options)


def fork_processes_of(module: str, monkeypatch) -> None:
    """Processes that a module of this process starts, or of a fork of it, are forks, too."""
    monkeypatch.setattr(f"{module}.subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))


def _end_openmp_threads() -> None:
    """Of this process, until it needs them again: a fork would have none of them, and wait for them forever."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        libraries = {line.split()[-1] for line in maps if "libgomp" in line}
    for library in libraries:
        ctypes.CDLL(library).omp_pause_resource_all(2)  # omp_pause_hard


def _become(arguments, env) -> None:
    """In the new process, which is in its folder, with its standard files; does not return."""
    code = 1
    try:
        gc.freeze()  # files of the other process are not closed by number after
        gc.enable()
        atexit._clear()
        logging.root.handlers.clear()
        # the last is what Popen waits for: an exec would close it
        os.closerange(3, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))
        os.environ.clear()
        os.environ.update(env)
        tempfile.tempdir = None
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as an interpreter begins
            signal.signal(number, signal.SIG_IGN)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
        torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
        code = exit_code_of(lambda: _run(arguments))
        threading._shutdown()  # waits for threads that are no daemons, as an interpreter's end does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(arguments) -> None:
    """What a Python interpreter would run."""
    while arguments[0] in ("-P", "-W"):
        arguments = arguments[2 if arguments[0] == "-W" else 1 :]
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
