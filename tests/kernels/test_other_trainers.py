"""The operators in steps that others write: under autocast, and in functions that are compiled."""

import pytest
import torch
from bpo_fast_kernels import LowRank, gated, linear_pair_loss, linear_token_logps, pair_loss, rms_norm
from cases import offsets, random_case


def gradients(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_no_bit_of_log_probs(backend, mode, dtype):
    case = random_case(33, 48, 301, spread=3.0, dtype=dtype)

    def logps(hidden, weight):
        return linear_token_logps(hidden, weight, case.targets, mode=mode, backend=backend)

    expected = gradients(logps, case.hidden, case.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(logps, case.hidden, case.weight), expected)


def steps():
    """By operator: a function and the tensors that it is differentiated by."""
    case, ref = random_case(24, 16, 97), torch.randn(4)
    bounds = offsets([5, 7, 6, 6])

    def loss(hidden, weight):
        return linear_pair_loss(torch.tanh(hidden) * 2, weight * 1.5, case.targets, bounds, ref)[0]

    return {
        "linear_pair_loss": (loss, case.hidden, case.weight),
        "pair_loss": (lambda logps: pair_loss(logps * 3, ref).loss, torch.randn(4)),
        "rms_norm": (lambda x, weight: rms_norm(x * 3, weight, 1e-5), case.hidden, case.weight[0]),
        "gated": (lambda x: gated(x * 3, x, "silu"), case.hidden),
    }


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_autocast_changes_no_bit_of_a_step(backend):
    case, bounds = random_case(24, 16, 97, spread=3.0), offsets([5, 7, 6, 6])

    def loss(hidden, weight):
        return linear_pair_loss(hidden, weight, case.targets, bounds, torch.zeros(4), backend=backend)[0]

    expected = gradients(loss, case.hidden, case.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(loss, case.hidden, case.weight), expected)


def test_autocast_changes_no_bit_of_a_trained_delta():
    case, bounds = random_case(24, 16, 97, spread=3.0), offsets([5, 7, 6, 6])
    a, b = torch.randn(3, 16), torch.randn(97, 3)

    def loss(hidden, a, b):
        delta = LowRank(a, b, 0.5)
        return linear_pair_loss(hidden, case.weight, case.targets, bounds, torch.zeros(4), low_rank=delta)[0]

    expected = gradients(loss, case.hidden, a, b)
    leaves = [leaf.clone().requires_grad_() for leaf in (case.hidden, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(*leaves)
    assert_equal((out.detach(), *torch.autograd.grad(out, leaves)), expected)


@pytest.mark.parametrize("operator", steps())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_function_may_call_an_operator(operator):
    torch.manual_seed(0)
    function, *leaves = steps()[operator]
    expected = gradients(function, *leaves)
    assert_equal(gradients(torch.compile(function, backend="aot_eager"), *leaves), expected)
