"""What a dry run suggests: something that is not set yet, has an effect and can be set."""

from dataclasses import replace

import pytest

from bpo_fast.config import Config, ModelConfig, OptimConfig
from bpo_fast.dryrun import _suggest
from bpo_fast.memory import GIB, Ledger

LONGEST = 640
# weights, gradients, optimizer, activations, head chunk, kv in GiB
ACTIVE, STATEFUL, SMALL = (1, 1, 1, 30, 1, 0), (1, 1, 30, 1, 1, 0), (1, 1, 1, 1, 1, 0)


def suggest(parts, free_gib, *, num_microbatches=1, on_gpu=True, **settings):
    optim = {k: settings.pop(k) for k in ("states", "offload", "microbatch_tokens") if k in settings}
    config = replace(
        Config(), model=ModelConfig(path="t", **settings), optim=OptimConfig(**{"microbatch_tokens": 8192, **optim})
    )
    ledger = Ledger(*(n * GIB for n in parts), kv_stays=False, num_microbatches=num_microbatches)
    words, _, room = _suggest(config, ledger, free_gib * GIB, longest=LONGEST, on_gpu=on_gpu).partition(" (")
    if "LoRA" in room:
        room = room.partition(" (")[2]
    assert room == f"{free_gib:.1f} GiB free, {ledger.peak / GIB:.2f} GiB needed at the peak)"
    return words.removeprefix("suggestion: ")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "model.activation_checkpointing = selective"),
        ({"activation_checkpointing": "selective"}, "optim.microbatch_tokens = 4096"),
        ({"activation_checkpointing": "full"}, "optim.microbatch_tokens = 4096"),
        ({"gradient_checkpointing": True}, "optim.microbatch_tokens = 4096"),
        ({"gradient_checkpointing": True, "microbatch_tokens": 700}, "optim.microbatch_tokens = 640"),
        ({"activation_checkpointing": "selective", "microbatch_tokens": 640}, "model.activation_checkpointing = full"),
        ({"activation_checkpointing": "full", "microbatch_tokens": 640}, "optim.states = 8bit"),
        ({"gradient_checkpointing": True, "microbatch_tokens": 640, "states": "8bit"}, "optim.offload = true"),
    ],
    ids=str,
)
def test_short_of_memory_for_activations(settings, expected):
    assert suggest(ACTIVE, 10, **settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "optim.states = 8bit"),
        ({"states": "8bit"}, "optim.offload = true"),
        ({"states": "8bit", "on_gpu": False}, "model.activation_checkpointing = selective"),
        ({"states": "8bit", "offload": True}, "model.activation_checkpointing = selective"),
    ],
    ids=str,
)
def test_short_of_memory_for_moments(settings, expected):
    assert suggest(STATEFUL, 10, **settings) == expected


def test_where_every_setting_is_spent():
    spent = {"gradient_checkpointing": True, "microbatch_tokens": LONGEST, "states": "8bit", "on_gpu": False}
    assert suggest(ACTIVE, 10, **spent) == "lower data.max_prompt_length or sampling.max_new_tokens"
    assert suggest(ACTIVE, 10, full=True, **spent) == "model.full = false"


def test_memory_to_spare():
    assert suggest(SMALL, 80, num_microbatches=2) == "optim.microbatch_tokens = 16384 would fit too"
    assert suggest(SMALL, 80) == "nothing to change"
