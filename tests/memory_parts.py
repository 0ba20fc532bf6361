"""A small policy with its optimizer, for tests of memory, and the peaks of its steps.

Resident memory is that of the tensors only where no earlier work has left holes for them to fall into: peaks are for a
process of their own.
"""

import ctypes
import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from tiny_policy import make_policy

from bpo_fast.allocator import keep_freed_memory, open_arena
from bpo_fast.config import Config, MethodConfig, ModelConfig, OptimConfig
from bpo_fast.dryrun import _try_steps
from bpo_fast.engine.hf import HfEngine
from bpo_fast.memory import make_ledger
from bpo_fast.optim import Optimizer

M_MMAP_THRESHOLD = -3  # malloc.h
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
}
FORMS = {
    "full": {"full": True},
    "full-selective": {"full": True, "activation_checkpointing": "selective"},
    "full-checkpointed": {"full": True, "gradient_checkpointing": True},
    "lora": {"lora_r": 8, "lora_alpha": 16.0},
}


def make_parts(
    form, *, pairs=8, lengths=(128, 64), microbatch_tokens=8192, place=("cpu", torch.float32), sizes=None, **optim
):
    """Parts of a run whose prompts and completions are as long as `lengths`."""
    model = ModelConfig(path="tiny", **FORMS[form])
    policy = make_policy(model, place=place, **SIZES | (sizes or {}))
    base = Config()
    config = replace(
        base,
        model=model,
        data=replace(base.data, max_prompt_length=lengths[0]),
        sampling=replace(base.sampling, max_new_tokens=lengths[1], batch_size=4),
        method=MethodConfig(batch_pairs=pairs),
        optim=OptimConfig(learning_rate=1e-4, microbatch_tokens=microbatch_tokens, **optim),
    )
    members = policy.num_members if policy.lora else None
    optimizer = Optimizer(policy.parameters(), config.optim, num_steps=2, num_members=members)
    engine = HfEngine.of(policy, config.sampling.batch_size)
    return SimpleNamespace(config=config, policy=policy, optimizer=optimizer, engine=engine)


def print_peaks(form, options, *, arena=False):
    """Prints {"predicted_gib", "measured_gib"} of steps in this process.

    Without the arena every block of 64 KiB is mapped alone, and handed back when freed.
    """
    if arena:  # as in every process of bpo-fast
        keep_freed_memory()
        open_arena()
    else:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    parts = make_parts(form, **options)
    ledger = make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine)
    found = _try_steps(parts, ledger)
    print(json.dumps({k: found[k] for k in ("predicted_gib", "measured_gib")}))
