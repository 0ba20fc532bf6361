import re

import pytest
import torch
from bpo_fast_kernels import rowwise_linear
from bpo_fast_kernels.rowwise_linear import rowwise_linear_reference

# 16 or 32 rows are a panel, 16 panels a group; 96 or 84 outputs a block of tiles of 6 or 14; 256 or 128 numbers a chunk
SHAPES = [(0, 5, 7), (1, 1, 1), (1, 7, 5), (3, 513, 97), (15, 4, 84), (16, 16, 96), (17, 18, 98), (33, 1024, 100)]
SHAPES += [(70, 1537, 13), (257, 33, 29), (513, 12, 200), (600, 515, 3), (4, 3, 0), (9, 4864, 20)]


both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def parts(rows, width, num_out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (num_out, width), (num_out,))
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@both_types
def test_it_is_the_linear_layer(shape, biased, dtype):
    x, weight, bias = parts(*shape, dtype)
    bias = bias if biased else None
    out = rowwise_linear(x, weight, bias)
    wide = rowwise_linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert (out.dtype, out.shape) == (torch.float32, wide.shape)
    most = 1e-6 * float(wide.abs().max()) if wide.numel() else 0.0
    assert torch.allclose(out.double(), wide, rtol=0, atol=most)


@pytest.mark.parametrize("width", [100, 256, 4096])
@both_types
def test_sums_of_equal_numbers_round_one_way(width, dtype):
    for number in torch.rand(20, generator=torch.Generator().manual_seed(0)).to(dtype):
        out = rowwise_linear(number.expand(1, width), torch.ones(3, width, dtype=dtype))
        assert torch.allclose(out.double(), number.double() * width, rtol=5e-6)


@pytest.mark.parametrize(("width", "num_out"), [(515, 97), (1024, 250), (7, 13)])
@both_types
def test_a_row_has_the_same_bits_in_any_company(width, num_out, dtype):
    x, weight, bias = parts(520, width, num_out, dtype)
    together = rowwise_linear(x, weight, bias)
    for rows in ([0], [519], range(3, 20), range(100, 357), [7, 300, 7]):
        assert torch.equal(rowwise_linear(x[list(rows)], weight, bias), together[list(rows)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(rowwise_linear(x, weight, bias), together)
    finally:
        torch.set_num_threads(threads)


@both_types
def test_operands_need_not_be_dense(dtype):
    x, weight, bias = parts(12, 40, 30, dtype)
    expected = rowwise_linear(x[:, ::2].contiguous(), weight[:, :20].contiguous(), bias.contiguous())
    apart = torch.stack([bias, bias + 1], 1)[:, 0]
    assert torch.equal(rowwise_linear(x[:, ::2], weight[:, :20], apart), expected)
    assert torch.equal(rowwise_linear(x[:, ::2].view(3, 4, 20), weight[:, :20], apart), expected.view(3, 4, 30))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@both_types
def test_what_is_not_finite_shows_in_its_row_alone(bad, dtype):
    x, weight, _ = parts(20, 9, 11, dtype)
    x[3, 2] = bad
    out = rowwise_linear(x, weight)
    assert not bool(out[3].isfinite().any())
    assert bool(out[:3].isfinite().all())
    assert bool(out[4:].isfinite().all())


def test_it_has_no_gradient():
    x, weight, _ = parts(2, 3, 4)
    assert not rowwise_linear(x.requires_grad_(), weight.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "x.shape = []: expected rows"),
        ({"weight": torch.zeros(3)}, "weight.shape = [3]: expected [N, K]"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, "weight.shape = [5, 0]: expected one column at least"),
        ({"x": torch.zeros(2, 4)}, "x.shape = [2, 4]: expected [2, 3]"),
        ({"x": torch.zeros(2, 3).half()}, "x.dtype = torch.float16: expected torch.float32 or torch.bfloat16"),
        ({"x": torch.zeros(2, 3).bfloat16()}, "weight.dtype = torch.float32: expected torch.bfloat16"),
        ({"weight": torch.zeros(5, 3).double()}, "weight.dtype = torch.float64"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight.device = meta: expected cpu"),
        ({"x": torch.zeros(2, 3, device="meta")}, "x.device = meta: expected cpu"),
        ({"bias": torch.zeros(4)}, "bias.shape = [4]: expected [5]"),
        ({"bias": torch.zeros(5, 1)}, "bias.shape = [5, 1]: expected [5]"),
        ({"bias": torch.zeros(5).half()}, "bias.dtype = torch.float16"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "bias": None}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        rowwise_linear(**good | change)
