"""Fixtures: a tiny model and data made on the spot, and the command line as a subprocess."""

import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test leaves this machine
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch is: workers share cores, and spins take most of them

import pytest
import torch
from forks import fork_processes_of
from tiny_world import answer, question, write_rows

# whole files go to pytest's workers: those that take longest first, or one of the workers would be left with them
LONGEST = ("test_stand_in.py", "test_interpreter.py", "test_static.py", "test_devices.py", "test_build.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@dataclass(frozen=True)
class TinyData:
    """Paths of 64 rows to train on and 16 to hold out, {"prompt", "label"} each."""

    train: Path
    eval: Path


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def forked_ranks(monkeypatch):
    """Ranks are forks of this process: see forks.py."""
    fork_processes_of("bpo_fast.ranks", monkeypatch)


@pytest.fixture
def without_drawings(monkeypatch):
    """Reports without what is in their figures, which takes most of a tiny run; test_cli.py and test_report.py draw."""
    monkeypatch.setattr("bpo_fast.drawing.Plot.svg", lambda plot, prefix: "<svg></svg>")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> TinyData:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": question(i), "label": answer(i)} for i in range(80)]
    return TinyData(write_rows(folder / "train.jsonl", rows[:64]), write_rows(folder / "held_out.jsonl", rows[64:]))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from bpo_fast.tokenizer import train_bpe

    texts = [t for i in range(128) for t in (question(i) + " Assistant:", " " + answer(i))]
    return train_bpe(texts, vocab_size=320)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama of 64 hidden units and 2 layers; its weights are large enough for peaked distributions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_args(tiny_model_dir, tiny_data) -> list[str]:
    """Arguments of a `train` that takes a few seconds: 24 pairs in 6 steps and 2 phases; add --out."""
    return [
        *("train", "--model", str(tiny_model_dir), "--data", str(tiny_data.train), "--eval-data", str(tiny_data.eval)),
        *("--annotator", "toy_annotator:letters", "--pairs", "24", "--batch-pairs", "4", "--max-new-tokens", "8"),
        *("--lora-r", "4", "--lr", "1e-3", "--device", "cpu", "--engine", "hf"),
        *("--set", "eval.prompts=6", "--set", "eval.kl_prompts=4"),
    ]
