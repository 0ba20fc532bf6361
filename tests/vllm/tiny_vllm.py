"""Tiny models, prompts and steps for the tests of the vLLM engine."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bpo_fast import config as configs
from bpo_fast.types import Prompt

MAX_LENGTH = 160  # four blocks of the prefix cache and some


def save_model(folder: Path, config, tokenizer) -> Path:
    """A random model of this architecture; biases and norms are random too, so that none can be left out unnoticed."""
    torch.manual_seed(0)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.3 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, **knobs):
    values = {
        "model.path": str(folder),
        "model.lora_r": 4,
        "model.lora_alpha": 8.0,
        "sampling.engine": "vllm",
        "sampling.max_new_tokens": 32,
        "run.device": "cpu",
    }
    return configs.load(None, values | {k.replace("__", "."): v for k, v in knobs.items()})


def prompts(num: int, length: int = 12, num_tokens: int = 300) -> list[Prompt]:
    """Prompts of unequal lengths."""
    return [Prompt(i, "", tuple((37 * i + 11 * j) % num_tokens + 2 for j in range(length + i % 5))) for i in range(num)]


def greedy_by_transformers(policy, questions, num_new: int) -> list[tuple[int, ...]]:
    """What model.generate gives, one prompt at a time, cut after EOS."""
    out = []
    for prompt in questions:
        ids = torch.tensor([prompt.ids])
        with policy.behavior(), torch.no_grad():
            row = policy.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(policy.eos_ids),
            )
        out.append(tuple(row[0, len(prompt.ids) :].tolist()))
    return out


def train_a_little(policy, lr: float = 1e-2, num_steps: int = 4) -> None:
    """Real AdamW steps, in place, of every member."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    for step in range(num_steps):
        ids = torch.randint(2, 300, (4, 20), generator=torch.Generator().manual_seed(step))
        for m in range(policy.num_members):
            with policy.member(m):
                logits = policy.model(input_ids=ids, use_cache=False).logits
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
