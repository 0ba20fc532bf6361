"""A byte-level BPE tokenizer trained on the spot, and the one rule by which a prompt and a completion are joined.

Prompt and completion are always encoded apart and their ids concatenated; a completion of a plain prompt carries its
leading space. A sampler therefore starts from exactly the ids that training saw.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
MIN_VOCAB = 256 + 2


def train_bpe(texts: Iterable[str], *, vocab_size: int, arch: str = "llama") -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer; deterministic in the order of `texts`.

    `decode(encode(x)) == x` for every text (of its NFC form with arch qwen2). Ids 0 and 1 are `<pad>` and `</s>`; there
    is no BOS and no unknown token, and encoding adds no special tokens.

    Args:
        texts: training corpus; completions with the leading space they are trained with.
        vocab_size: upper limit of the vocabulary, >= 258 (256 bytes and the two specials).
        arch: architecture of the model folder it is saved into. transformers rebuilds the tokenizer of a qwen2 folder
            with Qwen2's own word pattern and NFC, whatever the files say, so those are used from the start.

    Raises:
        ValueError: vocab_size too small.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size = {vocab_size}: must be >= {MIN_VOCAB} (256 bytes and {PAD} {EOS})")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    if arch == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Qwen2's class would add an <|endoftext|> of its own as the unknown token if none were named.
    unk = {"unk_token": EOS} if arch == "qwen2" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False, **unk
    )


def with_leading_space(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: one space in front unless it is empty or either side has white space.

    A prompt made by a chat template ends in white space or in a special token; callers leave its completions alone.
    """
    if not completion or prompt[-1:].isspace() or completion[0].isspace():
        return completion
    return " " + completion


def end_of_turn(tokenizer: Any) -> int | None:
    """The id that ends an answer in the tokenizer's chat template, such as <end_of_turn>; EOS if that adds no token."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError):  # no such turns, or no template
        return tokenizer.eos_token_id
    _, found, tail = text.rpartition("answer")
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id
