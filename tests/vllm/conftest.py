"""The real vLLM on tiny random models. Without vLLM the tests are left out.

With BPO_FAST_REQUIRE_VLLM a missing vLLM is an error, and a test that is skipped has failed.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from tiny_vllm import MAX_LENGTH, save_model, settings

from bpo_fast.engine import versions

REQUIRED = bool(os.environ.get("BPO_FAST_REQUIRE_VLLM"))

if REQUIRED:
    versions.require()
elif versions.trouble():
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return without_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return without_skip(report)


def without_skip(report):
    """The report of a test or of a module, failed where it was skipped and vLLM is required."""
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, although vLLM is required: {report.longrepr}"
    return report


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
