"""The processes of tensor parallelism: vLLM's executor in the trainer, which starts its workers and ends them."""

import os
import tempfile
from contextlib import nullcontext
from typing import IO, Any
from weakref import WeakSet

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from bpo_fast.engine.host_state import main_hidden, redirected

# a socket's path has at most 107 bytes; those of vLLM end with /bpo-fast-XXXXXXXX/ and 36 letters
LONGEST_FOLDER, SHORT_FOLDER = 107 - 55, "/tmp"
REASON = "bpo_fast: the worker does not start: "  # in front of what a worker writes before it ends

_open: "WeakSet[WorkerProcesses]" = WeakSet()


class WorkerProcesses(MultiprocExecutor):
    """vLLM's executor; it keeps what workers write out of sight and says in one line why one does not start."""

    def _init_executor(self) -> None:
        # vLLM leaves the sockets that it talks to its workers by where it has made them
        self._sockets = tempfile.TemporaryDirectory(prefix="bpo-fast-", dir=_folder_of_sockets())
        _open.add(self)
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        seen = os.environ["VLLM_LOGGING_LEVEL"] != "ERROR"
        with tempfile.TemporaryFile() as output:
            try:
                with nullcontext() if seen else redirected(output, 1, 2), main_hidden():
                    super()._init_executor()
            except Exception as error:  # vLLM raises that very class, whatever a worker has raised
                if type(error) is not Exception:
                    raise
                raise _reason(output) or RuntimeError(str(error)) from None

    def collective_rpc(self, *args, **options) -> Any:
        """vLLM's; RuntimeError once a worker has ended by itself, which ends the others too."""
        if self.is_failed:
            raise RuntimeError("sampling.tensor_parallel: a worker process of vLLM has died")
        return super().collective_rpc(*args, **options)

    def shutdown(self) -> None:
        """vLLM's."""
        super().shutdown()
        self._sockets.cleanup()


def options(num_workers: int) -> dict[str, Any]:
    """What `vllm.LLM` is told beside what it is told of a worker in the trainer's process."""
    return {
        "tensor_parallel_size": num_workers,
        "distributed_executor_backend": f"{__name__}.{WorkerProcesses.__name__}",
        "worker_cls": "bpo_fast.engine.worker_process.WorkerProcess",
    }


def environ(num_workers: int, device: torch.device) -> dict[str, str]:
    """Variables of the processes: the trainer's threads are shared out among them, and none is bound to a core."""
    variables = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if device.type == "cpu":
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_workers))
        variables["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return variables


def close_all() -> None:
    """Ends the workers of an engine that did not come to be, which nothing else holds."""
    for executor in list(_open):
        executor.shutdown()


def _folder_of_sockets() -> str:
    """What the user has named, else where temporary files go, if the paths of sockets there are not too long."""
    usual = tempfile.gettempdir()
    too_long = len(os.fsencode(usual)) > LONGEST_FOLDER and os.access(SHORT_FOLDER, os.W_OK | os.X_OK)
    return os.environ.get("VLLM_RPC_BASE_PATH") or (SHORT_FOLDER if too_long else usual)


def _reason(output: IO[bytes]) -> Exception | None:
    """What a worker has raised: as an error of what the user wants, or of what happened."""
    output.seek(0)
    for line in output.read().decode(errors="replace").splitlines():
        if line.startswith(REASON):
            kind, _, said = line.removeprefix(REASON).partition(": ")
            said = f"in a worker process, {said}"
            return ValueError(said) if kind in ("ValueError", "AssertionError") else RuntimeError(f"{kind}: {said}")
    return None
