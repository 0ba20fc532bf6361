"""A tiny random policy and pairs for it, for tests of the step."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from bpo_fast.config import ModelConfig
from bpo_fast.policy import Policy
from bpo_fast.types import Completion, Pair, Prompt

LENGTHS = ((4, 3, 5), (3, 1, 6), (6, 4, 2), (1, 1, 1))


class Tokens:
    """What Policy and the engine need of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def make_policy(
    form: ModelConfig | None = None, window: int | None = None, *, place=("cpu", torch.float32), **changes
) -> Policy:
    """A Llama of 32 hidden units and 2 layers, or a Mistral with a window, all of it trained unless `form` says
    otherwise; `place` is its device and dtype."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": 1,
    }
    if window:
        model = MistralForCausalLM(MistralConfig(**sizes | {"sliding_window": window} | changes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    return Policy(model.eval().to(*place), Tokens(), form or ModelConfig(path="tiny", full=True), seed=0)


def make_pairs(lengths=LENGTHS, vocab: int = 97) -> list[Pair]:
    """Pairs of random tokens with (prompt, chosen, rejected) lengths, without reference log-probs."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for i, (n, c, r) in enumerate(lengths):
        ids = torch.randint(2, vocab, (n + c + r,), generator=generator).tolist()
        sides = [Completion(i, k, tuple(x), "", False, 0, 0) for k, x in enumerate((ids[n : n + c], ids[n + c :]))]
        pairs.append(Pair(Prompt(i, "", tuple(ids[:n])), *sides, 1.0, 0.0))
    return pairs
