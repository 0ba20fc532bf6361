"""vLLM's GPU worker, with its sleep pool around the KV cache alone.

The weights stay in torch's ordinary allocator, where the trainer shares them, and sleep releases exactly the KV cache.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.v1.worker.gpu_worker import Worker


class KvPoolWorker(Worker):
    """The worker of an engine inside a trainer: with a KV cache that can be let go, alone on the trainer's device."""

    def __init__(self, vllm_config, local_rank: int, rank: int, distributed_init_method: str, **options):
        if vllm_config.parallel_config.world_size == 1:
            local_rank = torch.cuda.current_device()
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, **options)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return super()._maybe_get_memory_pool_context(tag) if tag == "kv_cache" else nullcontext()
