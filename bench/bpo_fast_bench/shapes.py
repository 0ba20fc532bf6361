"""Models with random weights, of toy and of real shapes, and words that are one token each."""

import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model; where 0, heads have 64 elements and the MLP 8/3 of `hidden`."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 32000
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    tied: bool = False


SHAPES = {  # the larger ones are those of Qwen2.5
    "toy": Shape(),
    "0.5b": Shape(896, 24, 151936, 4864, heads=14, kv_heads=2, tied=True),
    "1.5b": Shape(1536, 28, 151936, 8960, heads=12, kv_heads=2, tied=True),
}


def parse_shape(text: str) -> Shape:
    """A name in `SHAPES`, or hidden x layers x vocabulary as in 256x4x32000."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"bench.shape = {text}: not {', '.join(SHAPES)} or HIDDENxLAYERSxVOCABULARY")
    hidden, layers, vocab = map(int, sizes)
    return Shape(hidden, layers, vocab)


def make_model(shape: Shape, folder: Path, dtype: str) -> None:
    """Saves a model with random weights; its tokenizer knows `w0`, `w1`, ... as one token each."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(shape.vocab - 3)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or shape.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads or max(1, shape.hidden // 64),
        num_key_value_heads=shape.kv_heads or max(1, shape.hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(draw: random.Random, num: int, vocab: int = 20000) -> str:
    """Random words, one token each."""
    return " ".join(f"w{draw.randrange(vocab)}" for _ in range(num))
