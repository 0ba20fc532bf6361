import pytest
import torch
from relative import relative_error, worst_error
from test_reward import bert_scorer, llama_scorer

from bpo_fast.annotate import pair_scores
from bpo_fast.annotate.pair_scores import PairScores, num_common
from bpo_fast.annotate.reward_model import Answered

# one pair whose answers begin alike, one answer that is the other's beginning, one pair that shares the prompt alone
TEXTS = [
    ("is red nice ?", " red is good", " red is bad indeed"),
    ("is blue nice or is it not nice ?", " blue is good", " blue is good indeed"),
    ("what ?", " pink", " green is bad"),
]


def encoded(scorer):
    chosen = scorer.encode([Answered(p, one) for p, one, _ in TEXTS])
    rejected = scorer.encode([Answered(p, other) for p, _, other in TEXTS])
    return list(zip(chosen, rejected, strict=True))


def gradients(model, scores):
    model.zero_grad()
    (scores * torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_packed_pairs_have_the_scores_and_gradients_of_padded_ones(changes):
    scorer = llama_scorer(**changes)
    pairs = encoded(scorer)
    apart = scorer.forward([a for a, _ in pairs] + [b for _, b in pairs]).view(2, -1)
    expected = gradients(scorer.model, apart)
    scores = PairScores(scorer, pairs[:1])
    assert scores.packed
    packed = scores(pairs)
    assert relative_error(packed, apart) < 1e-5
    assert worst_error(gradients(scorer.model, packed), expected) < 1e-5
    # the exchanged attention still scores padded texts
    texts = [a for a, _ in pairs]
    assert relative_error(scorer.forward(texts), apart[0]) < 1e-5


def test_what_a_pair_shares_is_found_once(monkeypatch):
    scorer = llama_scorer()
    pairs, found = encoded(scorer), []
    scores = PairScores(scorer, pairs)
    monkeypatch.setattr(pair_scores, "num_common", lambda *ids: found.append(ids) or num_common(*ids))
    scores(pairs)
    assert found == [(one.ids, other.ids) for one, other in pairs]


def test_texts_that_begin_apart_are_padded():
    scorer = llama_scorer()
    pairs = encoded(scorer)
    apart = tuple(scorer.encode([Answered("hello", " there"), Answered("friend", " there")]))
    scores = PairScores(scorer, [apart, *pairs])
    assert scores.packed
    mixed = [pairs[0], apart]
    expected = scorer.forward([a for a, _ in mixed] + [b for _, b in mixed]).view(2, -1)
    assert relative_error(scores(mixed), expected) < 1e-5
    assert not PairScores(llama_scorer(), [apart]).packed


def test_attention_dropout_keeps_its_padding(caplog):
    scorer = llama_scorer(attention_dropout=0.1)
    assert not PairScores(scorer, encoded(scorer)).packed
    assert "its attention has dropout" in caplog.text


def test_an_encoder_keeps_its_padding(caplog):
    scorer = bert_scorer()
    pairs = encoded(scorer)
    scores = PairScores(scorer, pairs[:1])
    assert not scores.packed
    assert "padded, not packed" in caplog.text
    assert scores(pairs).shape == (2, 3)
    assert scores.num_tokens(pairs[0]) == 2 * max(len(e.ids) for e in pairs[0])


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2], [1, 2, 3], 1),
        ([5], [5, 6], 0),
        ([1, 2], [3, 2], 0),
    ],
)
def test_each_text_keeps_its_last_token_to_itself(one, other, common):
    assert num_common(one, other) == common == num_common(other, one)
