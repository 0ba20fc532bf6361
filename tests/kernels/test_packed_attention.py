import re

import pytest
import torch
from bpo_fast_kernels import decoded_attention, packed_attention
from bpo_fast_kernels.packed_attention import decoded_attention_reference, packed_attention_reference
from cases import offsets, pairwise

# lengths of each group's prompt and completions; 32 queries are a panel and 14 keys a block with AVX-512
GROUPS = [
    [(1, 1)],
    [(5,)],
    [(0, 5, 3), (2, 0, 3)],
    [(9, 5, 11), (3, 7), (4, 2, 1, 6)],
    [(31, 1, 33), (64, 64, 32), (14, 28, 14)],
    [(150, 41, 40)],
]
# rows, heads, key-value heads, width
HEADS = [(1, 4, 2, 8), (2, 3, 3, 64), (1, 4, 1, 20), (3, 2, 2, 33), (1, 1, 1, 1)]
OPTIONS = [{}, {"window": 1}, {"window": 4}, {"window": 37, "softcap": 2.0}, {"softcap": 0.5}]


def bounds(groups):
    return offsets([n for group in groups for n in group]), offsets([len(group) for group in groups])


def parts(groups, heads, *, spread=1.0):
    """q, k, v and what the outputs are weighted by, laid out as projections lay them out."""
    num_rows, num_heads, num_kv_heads, width = heads
    num_tokens = sum(map(sum, groups))
    return [
        spread * torch.randn(num_rows, num_tokens, h, width).transpose(1, 2)
        for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]


def doubled(parts):
    """Numbers in float64, ids as they are."""
    return {name: x.double() if x.is_floating_point() else x for name, x in parts.items()}


def outcome(attend, groups, qkv, weights, **options):
    """The output and the three gradients."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv, *bounds(groups), **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, weights)]


@pytest.mark.parametrize(("groups", "heads", "options"), pairwise(GROUPS, HEADS, OPTIONS))
def test_outputs_and_gradients_are_those_of_all_scores_at_once(groups, heads, options):
    *qkv, weights = parts(groups, heads)
    found = outcome(packed_attention, groups, qkv, weights, scale=0.3, **options)
    expected = outcome(
        packed_attention_reference, groups, [x.double() for x in qkv], weights.double(), scale=0.3, **options
    )
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= 5e-6 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize(("groups", "heads", "options"), pairwise(GROUPS, HEADS, OPTIONS))
def test_in_bfloat16_outputs_are_rounded_once_and_gradients_are_within_its_rounding(groups, heads, options):
    """Of float64 on the same inputs. Outputs of the twin, which rounds scores on the way, are off by 1.2e-2."""
    *qkv, weights = (x.bfloat16() for x in parts(groups, heads))
    options = options | {"scale": 0.3}
    wide = [x.double() for x in (*qkv, weights)]
    exact = outcome(packed_attention_reference, groups, wide[:3], wide[3], **options)
    found = outcome(packed_attention, groups, qkv, weights, **options)
    for allowed, x, y in zip((5e-3, 2.5e-2, 2.5e-2, 1e-2), found, exact, strict=True):
        assert x.dtype == torch.bfloat16
        assert float((x - y).abs().max()) <= allowed * max(1.0, float(y.abs().max()))


def test_in_bfloat16_rows_of_odd_width_and_at_odd_addresses():
    """Two neighbors are read as one word, where they are one."""
    groups = [(9, 5, 11), (20, 3)]
    *qkv, weights = (x.bfloat16() for x in parts(groups, (2, 4, 2, 8)))
    expected = outcome(packed_attention, groups, qkv, weights, scale=0.3)

    def moved(x, rest):
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + rest, dtype=x.dtype)
        wide[..., 1 : x.shape[-1] + 1] = x
        return wide[..., 1 : x.shape[-1] + 1]

    for rest in (1, 2):
        found = outcome(packed_attention, groups, [moved(x, rest) for x in qkv], moved(weights, rest), scale=0.3)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_scores_far_apart_and_far_from_zero():
    """Scores of hundreds: the largest is taken off before exp, and what is 0 then gives no NaN."""
    groups = [(20, 17, 9)]
    *qkv, weights = parts(groups, (1, 2, 2, 16), spread=12.0)
    found = outcome(packed_attention, groups, qkv, weights, scale=1.0)
    expected = outcome(packed_attention_reference, groups, [x.double() for x in qkv], weights.double(), scale=1.0)
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= 3e-4 * float(y.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_does_not_depend_on_what_lies_beside_it_and_runs_repeat_bit_for_bit(dtype):
    groups = [(33, 20, 40), (8, 50), (70, 3, 3)]
    *qkv, weights = (x.to(dtype) for x in parts(groups, (2, 4, 2, 24)))
    together = outcome(packed_attention, groups, qkv, weights, scale=0.2)
    for x, y in zip(together, outcome(packed_attention, groups, qkv, weights, scale=0.2), strict=True):
        assert torch.equal(x, y)
    start = sum(groups[0])
    cut = slice(start, start + sum(groups[1]))
    alone = outcome(packed_attention, groups[1:2], [x[:, :, cut] for x in qkv], weights[:, :, cut], scale=0.2)
    for x, y in zip(together, alone, strict=True):
        assert torch.equal(x[:, :, cut], y)


def test_any_strides():
    groups = [(9, 5, 11)]
    *qkv, weights = parts(groups, (2, 4, 2, 8))
    expected = outcome(packed_attention, groups, qkv, weights, scale=0.3)
    for change in (torch.Tensor.contiguous, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        found = outcome(packed_attention, groups, [change(x) for x in qkv], change(weights), scale=0.3)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def decoded_parts(lengths, prompts, num_written, heads):
    """The tensors of `decoded_attention`, as projections and caches lay them out."""
    _, num_heads, num_kv_heads, width = heads
    prompt_k, prompt_v = (torch.randn(1, sum(lengths), num_kv_heads, width).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(len(prompts), num_kv_heads, num_written + 3, width)[:, :, :num_written] for _ in range(2))
    q = torch.randn(len(prompts), 1, num_heads, width).transpose(1, 2)
    return {
        "q": q,
        "prompt_k": prompt_k,
        "prompt_v": prompt_v,
        "cu_seqlens": offsets(lengths),
        "prompts": torch.tensor(prompts, dtype=torch.int64),
        "k": k,
        "v": v,
    }


PROMPTS = [[0], [2, 0, 0, 1, 2, 2], [1, 1, 1, 1, 1], []]
DECODED = [
    (1, {}, torch.float32),
    (1, {"softcap": 0.7}, torch.bfloat16),
    (18, {}, torch.bfloat16),
    (18, {"softcap": 0.7}, torch.float32),
]


@pytest.mark.parametrize(("prompts", "heads", "form"), pairwise(PROMPTS, HEADS, DECODED))
def test_a_decoded_token_sees_its_prompt_and_what_its_row_wrote(prompts, heads, form):
    num_written, options, dtype = form
    parts = decoded_parts([5, 1, 70], prompts, num_written, heads)
    parts = {name: x.to(dtype) if x.is_floating_point() else x for name, x in parts.items()}
    found = decoded_attention(**parts, scale=0.3, **options)
    assert found.shape == parts["q"].shape
    if prompts:
        expected = decoded_attention_reference(**doubled(parts), scale=0.3, **options)
        assert float((found - expected).abs().max()) < (2e-6 if dtype == torch.float32 else 8e-3)
    for row, prompt in enumerate(prompts):  # a row is what it is alone
        alone = parts | {name: parts[name][row : row + 1] for name in ("q", "k", "v")}
        alone["prompts"] = torch.tensor([prompt])
        assert torch.equal(decoded_attention(**alone, scale=0.3, **options)[0], found[row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 2, 8)}, "q.shape = [2, 4, 2, 8]"),
        ({"q": torch.zeros(4, 8)}, "q.shape = [4, 8]"),
        ({"k": torch.zeros(2)}, "k.shape = [2]"),
        ({"prompt_k": torch.zeros(6, 8)}, "prompt_k.shape = [6, 8]"),
        ({"prompts": torch.tensor([0, 1], device="meta")}, "prompts.device = meta"),
        ({"k": torch.zeros(2, 2, 0, 8), "v": torch.zeros(2, 2, 0, 8)}, "k.shape = [2, 2, 0, 8]"),
        ({"cu_seqlens": offsets([5, 1]).to("meta")}, "cu_seqlens.device = meta"),
        ({"prompt_v": torch.zeros(1, 2, 5, 8)}, "prompt_v.shape = [1, 2, 5, 8]"),
        ({"k": torch.zeros(2, 2, 3, 9)}, "k.shape = [2, 2, 3, 9]"),
        ({"v": torch.zeros(2, 2, 4, 8)}, "v.shape = [2, 2, 4, 8]"),
        ({"v": torch.zeros(2, 2, 3, 8).double()}, "v.dtype = torch.float64"),
        ({"cu_seqlens": offsets([5, 2])}, "cu_seqlens[-1] = 7"),
        ({"prompts": torch.tensor([0, 2])}, "prompts = 2: expected 0 <= prompt < 2"),
        ({"prompts": torch.tensor([-1, 0])}, "prompts = -1"),
        ({"prompts": torch.tensor([0])}, "prompts.shape = [1]"),
        ({"softcap": 0.0}, "softcap = 0.0"),
    ],
)
def test_bad_input_of_decoded_rows_is_named(change, message):
    good = decoded_parts([5, 1], [0, 1], 3, (1, 4, 2, 8)) | {"scale": 0.3}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        decoded_attention(**good | change)


def test_a_window_of_any_length():
    """Longer than a row, or than 32 bits hold."""
    groups = [(9, 5, 11)]
    *qkv, weights = parts(groups, (1, 4, 2, 8))
    expected = outcome(packed_attention, groups, qkv, weights, scale=0.3)
    for window in (25, 2**31 - 5, 2**31, 2**40):
        for x, y in zip(
            outcome(packed_attention, groups, qkv, weights, scale=0.3, window=window), expected, strict=True
        ):
            assert torch.equal(x, y)


def test_bounds_that_are_not_dense():
    groups = [(9, 5, 11)]
    *qkv, _ = parts(groups, (1, 4, 2, 8))
    cu_seqlens, cu_groups = bounds(groups)
    expected = packed_attention(*qkv, cu_seqlens, cu_groups, scale=0.3)
    apart = [torch.stack([x, x + 7], 1)[:, 0] for x in (cu_seqlens, cu_groups)]
    assert torch.equal(packed_attention(*qkv, *apart, scale=0.3), expected)
    rows = decoded_parts([5, 1], [0, 1], 3, (1, 4, 2, 8))
    apart = {name: torch.stack([rows[name], rows[name] + 7], 1)[:, 0] for name in ("cu_seqlens", "prompts")}
    assert torch.equal(decoded_attention(**rows, scale=0.3), decoded_attention(**rows | apart, scale=0.3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(bad, dtype):
    """Wherever it is seen, and only there: the second group is as it was."""
    groups = [(9, 5), (4, 6)]
    *qkv, _ = (x.to(dtype) for x in parts(groups, (1, 2, 2, 8)))
    qkv[1][0, 0, 3, 0] = bad
    out = packed_attention(*qkv, *bounds(groups), scale=0.3)
    expected = packed_attention_reference(*qkv, *bounds(groups), scale=0.3)
    assert bool(out[0, 0, 3:14].isnan().any())
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool(out[0, :, 14:].isfinite().all())
    rows = decoded_parts([5, 1], [0, 1], 3, (1, 2, 2, 8))
    rows["k"][0, 0, 1, 0] = bad * rows["q"][0, 0, 0, 0].sign()
    out = decoded_attention(**rows, scale=0.3)
    assert bool(out[0, 0].isnan().any())
    assert bool(out[1].isfinite().all())


def test_a_gradient_of_a_gradient_is_refused():
    q, k, v, _ = parts([(9, 5, 11)], (1, 4, 2, 8))
    out = packed_attention(q.requires_grad_(), k, v, *bounds([(9, 5, 11)]), scale=0.3)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("which", [0, 1])
def test_bounds_that_change_before_the_backward_pass_are_noticed(which):
    q, k, v, _ = parts([(9, 5, 11)], (1, 4, 2, 8))
    cu = bounds([(9, 5, 11)])
    out = packed_attention(q.requires_grad_(), k, v, *cu, scale=0.3)
    cu[which].fill_(10**6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 25)}, "q.shape = [2, 4, 25]"),
        ({"k": torch.zeros(1, 2, 25, 9)}, "k.shape = [1, 2, 25, 9]"),
        ({"v": torch.zeros(1, 4, 25, 8)}, "k.shape = [1, 2, 25, 8]"),
        ({"k": torch.zeros(1, 3, 25, 8), "v": torch.zeros(1, 3, 25, 8)}, "k.shape = [1, 3, 25, 8]"),
        ({"v": torch.zeros(1, 2, 25, 8).bfloat16()}, "v.dtype = torch.bfloat16: expected torch.float32 like q"),
        ({"q": torch.zeros(1, 4, 25, 8).half()}, "q.dtype = torch.float16: expected float32 or bfloat16"),
        ({"q": torch.zeros(1, 4, 25, 8, device="meta")}, "q.device = meta"),
        ({"cu_seqlens": torch.tensor([0, 9, 14, 25])}, "cu_seqlens.dtype = torch.int64"),
        ({"cu_seqlens": offsets([9, 5, 12])}, "cu_seqlens[-1] = 26"),
        ({"cu_groups": offsets([2])}, "cu_groups[-1] = 2"),
        ({"cu_groups": offsets([3, 0])}, "cu_groups = [0, 3, 3]"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"window": 0}, "window = 0"),
        ({"softcap": -1.0}, "softcap = -1.0"),
    ],
)
def test_bad_input_is_named(change, message):
    cu_seqlens, cu_groups = bounds([(9, 5, 11)])
    q, k, v, _ = parts([(9, 5, 11)], (1, 4, 2, 8))
    good = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "cu_groups": cu_groups, "scale": 0.3}
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        packed_attention(**good | change)
    assert "\n" not in str(caught.value)
