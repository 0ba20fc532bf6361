"""The ledger against what the process really holds, and each way to hold less."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_policy import make_pairs, make_policy

from bpo_fast.config import Config, MethodConfig, ModelConfig, OptimConfig
from bpo_fast.dryrun import _try_steps
from bpo_fast.gradients import step_gradients
from bpo_fast.memory import Ledger, make_ledger
from bpo_fast.optim import Optimizer

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


M_MMAP_THRESHOLD = -3


@pytest.fixture(autouse=True)
def _no_holes():
    """Every block of 64 KiB is mapped alone, so that resident memory is that of the tensors and of no holes between."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def make_parts(form, *, pairs=8, microbatch_tokens=8192, **optim):
    model = ModelConfig(path="tiny", **FORMS[form])
    policy = make_policy(model, **SIZES)
    base = Config()
    config = replace(
        base,
        model=model,
        data=replace(base.data, max_prompt_length=128),
        sampling=replace(base.sampling, max_new_tokens=64, batch_size=4),
        method=MethodConfig(batch_pairs=pairs),
        optim=OptimConfig(learning_rate=1e-4, microbatch_tokens=microbatch_tokens, **optim),
    )
    members = policy.num_members if policy.lora else None
    optimizer = Optimizer(policy.parameters(), config.optim, num_steps=2, num_members=members)
    engine = SimpleNamespace(kv_bytes=None, kv_stays=False)
    return SimpleNamespace(config=config, policy=policy, optimizer=optimizer, engine=engine)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("full", {}),
        ("full", {"microbatch_tokens": 1024, "states": "8bit"}),
        ("full-selective", {}),
        ("full-checkpointed", {}),
        ("lora", {}),
    ],
    ids=str,
)
def test_predicted_and_measured_peaks_agree(form, options):
    parts = make_parts(form, **options)
    ledger = make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine)
    assert all(p.grad is None for p in parts.policy.parameters())
    found = _try_steps(parts, ledger)
    assert found["measured_gib"] == pytest.approx(found["predicted_gib"], rel=0.1)


def test_checkpointing_takes_less_memory_and_gives_the_same_gradients():
    peaks, grads = [], []
    for form in ("full", "full-selective", "full-checkpointed"):
        parts = make_parts(form)
        peaks.append(make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine).activations)
        step_gradients(make_pairs(vocab=4096), parts.policy, MethodConfig(), max_tokens=8192)
        grads.append([p.grad for p in parts.policy.parameters()])
    assert peaks[2] < 0.7 * peaks[1] < 0.7 * 0.9 * peaks[0]
    for other in grads[1:]:
        for found, expected in zip(other, grads[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_words_name_every_part():
    ledger = Ledger(2**30, 2**29, 2**28, 3 * 2**30, 2**20, 2**27, kv_stays=True, num_microbatches=2)
    assert ledger.training == 2**28 + 2**29 + 3 * 2**30 + 2**20
    assert ledger.peak == 2**30 + 2**27 + ledger.training
    assert ledger.words() == (
        "memory: weights 1.00 GiB, gradients 0.50 GiB, optimizer 0.25 GiB, activations 3.00 GiB, head chunk 1.0 MiB,"
        " kv 0.12 GiB; peak about 4.88 GiB"
    )
