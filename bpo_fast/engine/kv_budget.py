"""How much memory the KV cache of vLLM gets."""

import torch
from transformers import PreTrainedModel

from bpo_fast.config import Config
from bpo_fast.engine.decode import cache_bytes, num_kv_heads
from bpo_fast.lora import find_linears
from bpo_fast.optim import state_bytes

MAX_NUM_SEQS = 256
# prompts of a few dozen tokens are worth sharing between their samples; 32 is the smallest block the CPU kernels like
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
KV_SHARE = 0.4  # of the memory that is free when vLLM opens, at most


def kv_budget(config: Config, model: PreTrainedModel, device: torch.device, max_length: int) -> int:
    """Bytes of the KV cache: as configured, else what a full batch of the longest sequences needs, if that fits.

    It shares the device with what training holds through a phase: weights, adapters and the optimizer's state.

    Raises:
        ValueError: less than one sequence needs, or more than is free; says how much would do.
    """
    block = BLOCK_SIZE[device.type]
    held_here = _share_of_a_worker(config, model) * workers_on(config, device)
    a_sequence = round(held_here * cache_bytes(model, -(-max_length // block) * block))
    own = round(held_here * cache_bytes(model, 2 * block))  # vLLM keeps a block of its own
    least = a_sequence + own
    on_gpu = device.type == "cuda"  # which no other rank has; the host is shared
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else _free_host_bytes() // config.run.devices
    free = max(0, free - _held_bytes(config, model, device))
    gib = config.sampling.kv_cache_gib
    if gib is None:
        budget = min(MAX_NUM_SEQS * a_sequence + own, int(KV_SHARE * free))
    else:
        budget = int(gib * 2**30)
    if budget < least:
        raise ValueError(
            f"sampling.kv_cache_gib = {budget / 2**30:.3g}: one sequence of {max_length} tokens needs"
            f" {least / 2**30:.3g}"
        )
    if budget > free:
        raise ValueError(f"sampling.kv_cache_gib = {gib}: only {free / 2**30:.3g} GiB are free; {least / 2**30:.3g} do")
    return budget


def workers_on(config: Config, device: torch.device) -> int:
    """How many of vLLM's workers have their KV cache on the trainer's device: each has a GPU, or all this machine."""
    return config.sampling.tensor_parallel if device.type == "cpu" else 1


def _share_of_a_worker(config: Config, model: PreTrainedModel) -> float:
    """Of the KV cache; heads are split, and held several times where there are fewer heads than workers."""
    heads = num_kv_heads(model.config.get_text_config())
    return max(1, heads // config.sampling.tensor_parallel) / heads


def _held_bytes(config: Config, model: PreTrainedModel, device: torch.device) -> int:
    """Bytes that weights, adapters and this device's part of the optimizer will hold on it; none are there yet."""
    num_weights = model.num_parameters()
    num_workers = config.sampling.tensor_parallel
    held = num_weights * model.dtype.itemsize
    if num_workers > 1:  # a copy beside the trainer's weights, or the part of it on this GPU
        held += held * workers_on(config, device) // num_workers
    if config.model.full:
        num_stepped, num_copied = num_weights, num_weights if model.dtype != torch.float32 else 0
    else:
        assert config.model.lora_r, "resolve() has set it"
        linears = find_linears(model, config.model.lora_targets).values()
        num_stepped = config.model.members * config.model.lora_r * sum(sum(m.weight.shape) for m in linears)
        num_copied = 0
        held += 4 * num_stepped
    num_devices = config.run.devices
    return held + (0 if config.optim.offload else state_bytes(config.optim, num_stepped, num_copied) // num_devices)


def _free_host_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = dict(line.split(":") for line in file)
    return int(rows["MemAvailable"].split()[0]) * 1024
