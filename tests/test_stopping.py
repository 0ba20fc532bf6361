import random

import pytest

from bpo_fast.engine.stopping import StopStrings


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def by_definition(tokenizer, strings, ids):
    """(ids read, ids kept) at the first token after which the text holds a stop string."""
    for length in range(1, len(ids) + 1):
        text = text_of(tokenizer, ids[:length])
        starts = [text.index(s) for s in strings if s in text]
        if starts:
            return length, max(k for k in range(length) if len(text_of(tokenizer, ids[:k])) <= min(starts))
    return None


@pytest.mark.parametrize("strings", [("e",), ("th", "o r"), ("\n\nHuman:",), ("é",), (" ", "?")], ids=repr)
def test_cuts_where_the_definition_does(strings, tiny_tokenizer):
    rng = random.Random(0)
    texts = ["with care.\n\nHuman: How", "the é router\n\n", "Human:", "\n\n", "in room 3? é", "ü"]
    num_found = 0
    for _ in range(200):
        ids = [t for text in rng.sample(texts, 3) for t in tiny_tokenizer(text)["input_ids"]]
        ids += rng.choices(range(len(tiny_tokenizer)), k=5)
        stop, wanted = StopStrings(tiny_tokenizer, strings), by_definition(tiny_tokenizer, strings, ids)
        assert stop.cut(ids) == (wanted and wanted[1])
        read = next((n for n in range(1, len(ids) + 1) if stop.found(ids[:n])), None)
        assert read == (wanted and wanted[0])
        num_found += wanted is not None
    assert num_found > 20


def test_a_turn_is_cut_before_it_begins_however_it_was_tokenised(tiny_tokenizer):
    stop = StopStrings(tiny_tokenizer, ("\n\nHuman:",))
    encode = lambda text: tiny_tokenizer(text)["input_ids"]  # noqa: E731
    answer = encode(" Use the kettle")
    for parts in (["\n\nHuman:"], ["\n", "\n", "Hum", "an", ":"], [*"\n\nHuman:"]):
        ids = answer + [t for part in parts for t in encode(part)]
        assert stop.cut(ids) == len(answer)
        assert stop.cut(ids + encode(" why?")) == len(answer)
        assert stop.cut(ids[:-1]) is None
    assert stop.cut(encode("\n\nHuman:")) == 0
    assert stop.cut([]) is None
    assert not stop.found([])


def test_an_id_that_runs_into_the_string_is_dropped_whole(tiny_tokenizer):
    """The text of a kept id is never part of the stop string."""
    ids = tiny_tokenizer(" the printer")["input_ids"]
    whole = text_of(tiny_tokenizer, ids)
    inside = next(i for i, t in enumerate(ids) if len(text_of(tiny_tokenizer, [t])) > 1)
    start = len(text_of(tiny_tokenizer, ids[:inside])) + 1
    assert StopStrings(tiny_tokenizer, (whole[start:],)).cut(ids) == inside


def test_special_tokens_count_as_text_and_no_string_finds_nothing(tiny_tokenizer):
    ids = [*tiny_tokenizer("with")["input_ids"], tiny_tokenizer.eos_token_id]
    assert StopStrings(tiny_tokenizer, (tiny_tokenizer.eos_token,)).cut(ids) == len(ids) - 1
    nothing = StopStrings(tiny_tokenizer, ())
    assert not nothing
    assert nothing.cut(ids) is None
    assert not nothing.found(ids)
