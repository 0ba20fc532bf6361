"""The real vLLM on tiny random models. Without vLLM the tests are left out, unless BPO_FAST_REQUIRE_VLLM is set."""

import os
from pathlib import Path

import pytest
import torch
from tiny_vllm import MAX_LENGTH, save_model, settings

from bpo_fast.engine import versions

if os.environ.get("BPO_FAST_REQUIRE_VLLM"):
    versions.require()
elif versions.trouble():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return save_model(tmp_path_factory.mktemp("llama"), config, tiny_tokenizer)


@pytest.fixture
def learner():
    """Opens (policy, engine) with `learner(folder, **knobs)` and closes the engine in the end."""
    opened = []

    def open_learner(folder: Path, **knobs):
        from bpo_fast.setup import load_learner

        opened.append(load_learner(settings(folder, **knobs), torch.device("cpu"), MAX_LENGTH, lambda line: None))
        return opened[-1]

    yield open_learner
    for _, engine in opened:
        engine.close()
