import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from bpo_fast.packing import pack_apart, pack_shared, split
from bpo_fast.types import Completion, Pair, Prompt

PAD = 0
CPU = torch.device("cpu")


def a_pair(i, prompt, chosen, rejected):
    """A pair of given lengths; no two tokens of a batch are likely to be the same."""
    draw = random.Random(i)
    ids = lambda n: tuple(draw.randrange(2, 300) for _ in range(n))  # noqa: E731
    sides = [Completion(i, s, ids(n), "", False, 0, 0) for s, n in enumerate((chosen, rejected))]
    return Pair(Prompt(i, "", ids(prompt)), *sides, 1.0, 0.0)


SHAPES = [
    [(1, 1, 1)],
    [(5, 3, 3)],
    [(4, 1, 9)],
    [(4, 2, 7), (1, 6, 1), (9, 3, 4)],
    [(3, 3, 3)] * 4,
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_rows_and_targets_are_those_of_every_sequence_alone(shapes):
    pairs = [a_pair(i, *shape) for i, shape in enumerate(shapes)]
    batch = pack_apart(pairs, pad_id=PAD, device=CPU)
    sequences = [(p.prompt.ids, p.chosen.ids) for p in pairs] + [(p.prompt.ids, p.rejected.ids) for p in pairs]
    width = max(len(a) + len(b) for a, b in sequences)
    assert batch.input_ids.shape == batch.attention_mask.shape == (2 * len(pairs), width)
    rows, targets, lengths = [], [], []
    for i, (prompt, completion) in enumerate(sequences):
        whole = prompt + completion
        assert batch.input_ids[i].tolist() == [*whole, *[PAD] * (width - len(whole))]
        assert batch.attention_mask[i].tolist() == [1] * len(whole) + [0] * (width - len(whole))
        for position in range(len(prompt), len(whole)):
            rows.append(i * width + position - 1)  # the row before a token predicts it
            targets.append(whole[position])
        lengths.append(len(completion))
    assert batch.rows.tolist() == rows
    assert batch.targets.tolist() == targets
    assert batch.lengths.tolist() == lengths
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert (batch.rows.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert batch.num_tokens == sum(len(a) + len(b) for a, b in sequences)
    assert batch.pairs == tuple(pairs)


@torch.inference_mode()
def test_packed_log_probs_are_those_of_the_sequences_one_by_one(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()
    pairs = [a_pair(i, *shape) for i, shape in enumerate(SHAPES[3])]
    batch = pack_apart(pairs, pad_id=PAD, device=CPU)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    token_logps = logits[batch.rows].log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    packed = [part.sum() for part in token_logps.split(batch.lengths.tolist())]
    for logp, (pair, side) in zip(packed, [(p, s) for s in ("chosen", "rejected") for p in pairs], strict=True):
        ids = pair.prompt.ids + getattr(pair, side).ids
        alone = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(alone[t - 1, ids[t]] for t in range(len(pair.prompt.ids), len(ids)))
        assert float(logp) == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_shared_prompt_stands_once_and_both_completions_follow_it(shapes):
    pairs = [a_pair(i, *shape) for i, shape in enumerate(shapes)]
    batch = pack_shared(pairs, device=CPU)
    tokens = [i for p in pairs for i in (*p.prompt.ids, *p.chosen.ids, *p.rejected.ids)]
    assert batch.input_ids.tolist() == [tokens]
    positions = [[*range(n), *range(n, n + c), *range(n, n + r)] for n, c, r in shapes]
    assert batch.position_ids.tolist() == [[i for group in positions for i in group]]
    apart = pack_apart(pairs, pad_id=PAD, device=CPU)
    assert torch.equal(batch.targets, apart.targets)
    assert torch.equal(batch.cu_seqlens, apart.cu_seqlens)
    rows, start = {}, 0
    for i, (n, c, r) in enumerate(shapes):
        rows["chosen", i] = [start + n - 1, *range(start + n, start + n + c - 1)]
        rows["rejected", i] = [start + n - 1, *range(start + n + c, start + n + c + r - 1)]
        start += n + c + r
    ordered = [rows[side, i] for side in ("chosen", "rejected") for i in range(len(pairs))]
    assert batch.rows.tolist() == [row for part in ordered for row in part]
    assert batch.num_tokens == apart.num_tokens


@pytest.mark.parametrize("shared", [True, False])
def test_repeat_puts_the_members_side_by_side(shared):
    pairs = [a_pair(i, *shape) for i, shape in enumerate(SHAPES[3])]
    batch = pack_shared(pairs, device=CPU) if shared else pack_apart(pairs, pad_id=PAD, device=CPU)
    assert batch.repeat(1) is batch
    twice = batch.repeat(2)
    chosen, rejected = batch.lengths.chunk(2)
    assert twice.lengths.tolist() == torch.cat([chosen, chosen, rejected, rejected]).tolist()
    size = batch.input_ids.numel()
    for k, (member, half) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        first, last = twice.cu_seqlens[3 * k], twice.cu_seqlens[3 * k + 3]
        wanted_first, wanted_last = batch.cu_seqlens[3 * half], batch.cu_seqlens[3 * half + 3]
        assert torch.equal(twice.rows[first:last], batch.rows[wanted_first:wanted_last] + member * size)
        assert torch.equal(twice.targets[first:last], batch.targets[wanted_first:wanted_last])


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("multiple", [2, 7, 64])
def test_a_row_that_is_filled_up_has_a_prompt_more_and_is_the_same_before_it(shapes, multiple):
    pairs = [a_pair(i, *shape) for i, shape in enumerate(shapes)]
    plain, filled = (pack_shared(pairs, device=CPU, multiple=m) for m in (1, multiple))
    size = plain.input_ids.numel()
    filling = -size % multiple
    assert filled.input_ids.numel() == size + filling
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(filled, name)[:, :size], getattr(plain, name))
    for name in ("rows", "targets", "cu_seqlens"):
        assert torch.equal(getattr(filled, name), getattr(plain, name))
    assert filled.position_ids[0, size:].tolist() == [*range(filling)]
    assert filled.layout.lengths == (*plain.layout.lengths, *([(filling,)] if filling else []))
    assert filled.num_tokens == plain.num_tokens


def used(part, shared):
    batch = pack_shared(part, device=CPU) if shared else pack_apart(part, pad_id=PAD, device=CPU)
    return batch.input_ids.numel()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("budget", [60, 61, 100, 1000, 10**6])
def test_split_keeps_every_pair_and_the_budget(budget, shared):
    draw = random.Random(budget)
    pairs = [a_pair(i, draw.randrange(1, 11), draw.randrange(1, 20), draw.randrange(1, 20)) for i in range(40)]
    parts = split(pairs, budget, shared=shared)
    assert sorted(p.prompt.id for part in parts for p in part) == list(range(40))
    assert all(used(part, shared) <= budget for part in parts)
    if budget == 10**6:
        assert len(parts) == 1
    if shared and 1 < len(parts) < 10:
        # as few as the total allows, give or take one, and evenly filled
        total = sum(used([p], shared) for p in pairs)
        assert len(parts) <= -(-total // budget) + 1
        sizes = [used(part, shared) for part in parts]
        assert max(sizes) - min(sizes) <= 60


def test_a_pair_at_the_budget_fits_and_one_over_it_is_named():
    pair = a_pair(7, 4, 6, 2)
    assert split([pair], 20, shared=False) == split([pair], 12, shared=True) == [[pair]]
    with pytest.raises(ValueError, match=r"^optim\.microbatch_tokens = 19: one pair \(prompt 7\) needs 20$"):
        split([pair], 19, shared=False)
    with pytest.raises(ValueError, match=r"^optim\.microbatch_tokens = 11: one pair \(prompt 7\) needs 12$"):
        split([pair], 11, shared=True)


def test_no_pairs_make_no_parts():
    assert split([], 10, shared=True) == []
