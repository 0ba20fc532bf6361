"""vLLM's worker in a process of its own, for tensor parallelism: its weights are copied from the trainer's.

Imported in that process alone.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from bpo_fast.engine import loader
from bpo_fast.engine.handover import Handover
from bpo_fast.engine.workers import REASON

if TYPE_CHECKING or not current_platform.is_cpu():
    from bpo_fast.engine.worker import KvPoolWorker as DeviceWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as DeviceWorker


class WorkerProcess(DeviceWorker):
    """The worker of a rank."""

    def __init__(self, vllm_config, *args, **options):
        os.setsid()  # a terminal's Ctrl-C is for the trainer, which ends its workers itself
        os.dup2(2, 1)  # the trainer's standard output is its own
        loader.register()
        if current_platform.is_cpu() and vllm_config.model_config.enforce_eager:
            torch.compiler.set_stance("force_eager")  # see Session.awake
        with _told():
            super().__init__(vllm_config, *args, **options)

    def init_device(self) -> None:
        """vLLM's; a failure is told in one line."""
        with _told():
            super().init_device()

    def load_model(self, **options) -> None:
        """vLLM's; a failure is told in one line."""
        with _told():
            super().load_model(**options)

    def take_weights(self, handover: Handover) -> None:
        """Copies the part of this rank from the trainer's weights."""
        model: Any = self.model_runner.get_model()
        model.load_weights(handover.weights())


@contextmanager
def _told() -> Iterator[None]:
    """vLLM's executor knows of a worker only that it failed: writes what was raised for WorkerProcesses to find."""
    try:
        yield
    except Exception as error:
        said = " ".join((str(error) or str(traceback.extract_tb(error.__traceback__)[-1].line)).split())
        os.write(2, f"\n{REASON}{type(error).__name__}: {said}\n".encode())
        raise
