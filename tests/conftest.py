"""Fixtures: a tiny model and data made on the spot, and the command line as a subprocess."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test leaves this machine

import pytest
import torch

NOUNS = ("printer", "router", "invoice", "window", "parcel", "garden", "kettle", "bicycle")
VERBS = ("reset", "open", "clean", "return", "move", "sell", "fix", "paint")


@dataclass(frozen=True)
class TinyData:
    """Paths of 64 rows to train on and 16 to hold out, {"prompt", "label"} each."""

    train: Path
    eval: Path


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def question(i: int) -> str:
    """A short question, different for every i below 512."""
    return f"How do I {VERBS[i % 8]} the {NOUNS[i // 8 % 8]} in room {i // 64}?"


def answer(i: int) -> str:
    """The reference text of `question(i)`."""
    return f"You {VERBS[i % 8]} the {NOUNS[i // 8 % 8]} with care."


def write_rows(path: Path, rows) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


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


def run_cli(args, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs `python -m bpo_fast ARGS` in `cwd`; `toy_annotator` can be imported there."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "bpo_fast", *map(str, args)],
        cwd=cwd,
        env=os.environ | own | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
