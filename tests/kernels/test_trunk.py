import pytest
import torch
from bpo_fast_kernels import gated, rms_norm
from bpo_fast_kernels.trunk import gated_reference, has_kernels, rms_norm_reference
from trunk_cases import ACTS, NORMS, SHAPES, gate_outcome, norm_outcome, worst


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", NORMS)
def test_a_norm_and_its_gradients_are_those_of_float64(shape, form):
    assert worst(norm_outcome(rms_norm, shape, form, backend="native"), norm_outcome(None, shape, form)) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTS)
def test_a_gate_and_its_gradients_are_those_of_float64(shape, activation):
    found = gate_outcome(gated, shape, activation, backend="native")
    assert worst(found, gate_outcome(None, shape, activation)) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_they_round_as_the_twins_do(shape):
    """But for one in a hundred results, where sums in another order lie on the two sides of a tie, and but for gelu: of
    its tail PyTorch has less."""
    kernels = [norm_outcome(rms_norm, shape, form, dtype=torch.bfloat16, backend="native") for form in NORMS]
    twins = [norm_outcome(rms_norm_reference, shape, form, dtype=torch.bfloat16) for form in NORMS]
    for activation in ACTS:
        kernels.append(gate_outcome(gated, shape, activation, dtype=torch.bfloat16, backend="native"))
        twins.append(gate_outcome(gated_reference, shape, activation, dtype=torch.bfloat16))
    assert ACTS[0] == "silu"
    # results, and of silu the gradient that meets the rounded activation
    alike = dict.fromkeys(range(len(NORMS)), (0,)) | {len(NORMS): (0, 2)}
    for i, (found, expected) in enumerate(zip(kernels, twins, strict=True)):
        assert all(x.dtype == torch.bfloat16 for x in found)
        assert worst(found, expected) <= 2**-7
        for part in alike.get(i, ()):
            assert int((found[part] != expected[part]).sum()) <= 0.01 * found[part].numel()


def test_halves_of_one_tensor_and_rows_that_lie_apart():
    both, weight = torch.randn(3, 7, 2 * 37), torch.randn(37)
    gate, up = both.chunk(2, -1)
    assert torch.equal(gated(gate, up, "silu"), gated(gate.contiguous(), up.contiguous(), "silu"))
    assert torch.equal(rms_norm(gate, weight, 1e-6), rms_norm(gate.contiguous(), weight, 1e-6))
    across = torch.randn(37, 7).T
    assert torch.equal(rms_norm(across, weight, 1e-6), rms_norm(across.contiguous(), weight, 1e-6))


def test_numbers_far_from_one():
    """Gates that close and open, rows that are all but zero, and rows of zeros."""
    gate = torch.tensor([-3e38, -1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 200.0, 1e30, 3e38]).requires_grad_()
    for activation in ACTS:
        out = gated(gate, torch.ones(10), activation)
        assert torch.allclose(out, gated_reference(gate, torch.ones(10), activation), atol=1e-6)
        (slope,) = torch.autograd.grad(out.sum(), gate)
        assert torch.allclose(slope, torch.tensor([0.0] * 5 + [0.5] + [1.0] * 4), atol=1e-6)
    rows, weight = torch.stack([torch.zeros(64), torch.randn(64) * 1e-20, torch.randn(64) * 1e15]), torch.ones(64)
    found, expected = rms_norm(rows, weight, 1e-6), rms_norm_reference(rows.double(), weight.double(), 1e-6)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=0)


def test_runs_repeat_bit_for_bit_for_any_number_of_threads():
    runs = []
    for num in (1, 2, 2):
        torch.set_num_threads(num)
        runs.append([*norm_outcome(rms_norm, (301, 77), NORMS[0]), *gate_outcome(gated, (301, 77), "silu")])
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


def test_results_have_the_type_of_what_came_in_whatever_the_default_is():
    x, weight = torch.randn(5, 9), torch.randn(9)
    expected = norm_outcome(rms_norm, (5, 9), NORMS[0]), gate_outcome(gated, (5, 9), "silu")
    torch.set_default_dtype(torch.float64)
    try:
        assert rms_norm(x, weight, 1e-6).dtype == torch.float32
        options = {"dtype": torch.float32}
        found = norm_outcome(rms_norm, (5, 9), NORMS[0], **options), gate_outcome(gated, (5, 9), "silu", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for some, others in zip(found, expected, strict=True):
        assert all(x.dtype == torch.float32 and x.shape == y.shape for x, y in zip(some, others, strict=True))


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(gated(x, x, "silu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_has_the_bits_of_training(dtype):
    x, weight = torch.randn(3, 5, 48).to(dtype), torch.randn(48).to(dtype)
    halves = torch.randn(7, 2 * 33).to(dtype).chunk(2, -1)
    trained = rms_norm(x.requires_grad_(), weight, 1e-6), gated(*halves, "silu")
    with torch.inference_mode():
        sampled = rms_norm(x, weight, 1e-6), gated(*halves, "silu")
    assert trained[0].requires_grad
    for own, wanted in zip(sampled, trained, strict=True):
        assert not own.requires_grad
        assert torch.equal(own, wanted)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(5, 9, requires_grad=True), torch.randn(9)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_float16_on_a_cpu_takes_the_twins():
    x, weight = torch.randn(4, 9).half(), torch.randn(9).half()
    assert not has_kernels(x)
    assert has_kernels(x.float())
    assert has_kernels(x.bfloat16())
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    assert torch.equal(gated(x, x, "silu"), gated_reference(x, x, "silu"))
    with pytest.raises(ValueError, match="backend = 'native': expected float32 or bfloat16"):
        gated(x, x, "silu", backend="native")


def test_gradients_of_the_twins():
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    weight.requires_grad_()
    for form in NORMS:
        assert torch.autograd.gradcheck(lambda x, w, form=form: rms_norm_reference(x, w, 1e-3, **form), (x, weight))
    for activation in ACTS:
        assert torch.autograd.gradcheck(lambda x, y, a=activation: gated_reference(x, y, a), (x, 2 * x.detach() + 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x.double(), x[0], 1e-6), "x.dtype = torch.float64"),
        (lambda x: rms_norm(x, x, 1e-6), r"weight.shape = \[2, 3\]: expected \[3\]"),
        (lambda x: rms_norm(x, x[0].bfloat16(), 1e-6), "weight.dtype = torch.bfloat16: expected torch.float32"),
        (lambda x: rms_norm(x, x[0], 0.0), "eps = 0.0"),
        (lambda x: rms_norm(x, x[0], 1e-6, offset=float("nan")), "offset = nan"),
        (lambda x: rms_norm(x, x[0], 1e-6, backend="cuda"), "backend = 'cuda'"),
        (lambda x: rms_norm(x[:, :0], x[0, :0], 1e-6), r"x.shape = \[2, 0\]: expected rows of one number"),
        (lambda x: gated(x, x[0], "silu"), r"up.shape = \[3\]: expected \[2, 3\] like gate"),
        (lambda x: gated(x, x, "relu"), "activation = 'relu': expected one of silu, gelu_tanh"),
        (lambda x: gated(x, x.half(), "silu"), "up.dtype = torch.float16"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3))
