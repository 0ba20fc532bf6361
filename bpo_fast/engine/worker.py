"""vLLM's GPU worker, with its sleep pool around the KV cache alone.

The weights stay in torch's ordinary allocator, where the trainer shares them, and sleep releases exactly the KV cache.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

# imported at every start, for one model that sees; needs torchvision, which models of text do without
VISION_WARMUP = "vllm.model_executor.warmup.minimax_m3_msa_warmup"


class KvPoolWorker(Worker):
    """The worker of an engine inside a trainer: with a KV cache that can be let go, alone on the trainer's device."""

    def __init__(self, vllm_config, local_rank: int, rank: int, distributed_init_method: str, **options):
        if vllm_config.parallel_config.world_size == 1:
            local_rank = torch.cuda.current_device()
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, **options)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return super()._maybe_get_memory_pool_context(tag) if tag == "kv_cache" else nullcontext()

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's, with nothing to warm up for a model that sees where torchvision is missing."""
        if VISION_WARMUP not in sys.modules and find_spec("torchvision") is None:
            nothing: Any = ModuleType(VISION_WARMUP)
            nothing.minimax_m3_msa_warmup = lambda worker: None
            sys.modules[VISION_WARMUP] = nothing
        return super().compile_or_warm_up_model()

    def sleep(self, level: int = 1) -> None:
        """vLLM's; others may take memory of this GPU meanwhile, as an annotator in a thread of the trainer does."""
        try:
            super().sleep(level)
        except AssertionError as error:  # its last words, when the KV cache is gone
            if "Memory usage increased" not in str(error):
                raise

    def shutdown(self) -> None:
        """vLLM's; the pool ends with all that is in it, although the trainer's side still holds the model.

        What vLLM 0.25 leaves in there would be unmapped with the KV cache of the next engine, and again when it goes.
        """
        runner: Any = getattr(self, "model_runner", None)
        model = getattr(runner, "model", None)
        for layer in () if model is None else model.modules():
            if hasattr(layer, "kv_cache"):
                layer.kv_cache = torch.tensor([])
        if hasattr(runner, "block_tables"):
            runner.block_tables = None
        super().shutdown()
