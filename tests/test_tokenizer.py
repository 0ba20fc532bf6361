import unicodedata

import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from bpo_fast.tokenizer import EOS, PAD, train_bpe, with_leading_space

CORPUS = ["How do I reset my password? Assistant:", " Open the settings and choose Reset."] * 4
HARD = [
    "",
    " ",
    "  two  spaces ",
    "don't, 'tis; it's 1234567!",
    "\n\nHuman: a\r\n\tb\x00c",
    "naïve — “quotes” 🎉 日本語 \u200b",
    "e\u0301 is not \u00e9",
    f"a {EOS} inside {PAD} b",
]


@pytest.mark.parametrize("text", HARD)
def test_decode_inverts_encode(text):
    tokenizer = train_bpe(CORPUS, vocab_size=300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_vocabulary_is_bytes_specials_and_merges():
    tokenizer = train_bpe(CORPUS, vocab_size=300)
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer(" Open")["input_ids"] == tokenizer(" Open", add_special_tokens=False)["input_ids"]
    assert len(tokenizer(CORPUS[1])["input_ids"]) < len(CORPUS[1].encode())


def test_training_twice_gives_the_same_tokenizer():
    a, b = (train_bpe(iter(CORPUS), vocab_size=300) for _ in range(2))
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str()


@pytest.mark.parametrize(("arch", "config"), [("llama", LlamaConfig), ("qwen2", Qwen2Config)])
def test_a_model_folder_reloads_the_same_tokens(tmp_path, arch, config):
    tokenizer = train_bpe(CORPUS, vocab_size=300, arch=arch)
    config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for _ in range(2):  # the second round reloads what transformers itself wrote
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
        for text in HARD:
            ids = reloaded(text)["input_ids"]
            assert ids == tokenizer(text)["input_ids"]
            expected = unicodedata.normalize("NFC", text) if arch == "qwen2" else text
            assert reloaded.decode(ids) == expected
        assert len(reloaded) == len(tokenizer)
        reloaded.save_pretrained(tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size = 257: must be >= 258"):
        train_bpe(CORPUS, vocab_size=257)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q? Assistant:", "Yes.", " Yes."),
        ("Q? Assistant:", " Yes.", " Yes."),
        ("Q? Assistant: ", "Yes.", "Yes."),
        ("Answer:\n", "Yes.", "Yes."),
        ("Q? Assistant:", "\nYes.", "\nYes."),
        ("Q? Assistant:", "", ""),
        ("", "Yes.", " Yes."),
    ],
)
def test_one_space_between_prompt_and_completion(prompt, completion, expected):
    assert with_leading_space(prompt, completion) == expected
