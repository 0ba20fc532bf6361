"""AdamW in 8 bits: the native step against its twin, and the twin against AdamW."""

import dataclasses

import pytest
import torch
from adamw_cases import FORM, SHAPES, assert_alike, trained, trained_with_a_nan
from bpo_fast_kernels import adamw_8bit_
from bpo_fast_kernels.adamw_8bit import BLOCK, adamw_8bit_reference_, decode, encode, new_state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [FORM, dataclasses.replace(FORM, betas=(0.0, 0.5), weight_decay=0.0)])
def test_a_native_step_is_that_of_the_twin(shape, form):
    found = trained(adamw_8bit_, shape, form=form, backend="native")
    assert_alike(found, trained(adamw_8bit_reference_, shape, form=form))


def test_steps_repeat_bit_for_bit_for_any_number_of_threads():
    runs = []
    for num in (1, 2, 2):
        torch.set_num_threads(num)
        runs.append(trained(adamw_8bit_, (300, 301)))
    for weight, state in runs[1:]:
        assert torch.equal(weight, runs[0][0])
        assert all(torch.equal(state[name], runs[0][1][name]) for name in state)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_first_step_is_that_of_adamw(backend):
    """Its moments are not rounded yet."""
    weight, grad = torch.randn(2, 700), torch.randn(2, 700)
    plain = torch.nn.Parameter(weight.clone())
    plain.grad = grad / 3.0
    names = ("lr", "betas", "eps", "weight_decay")
    torch.optim.AdamW([plain], **{name: getattr(FORM, name) for name in names}).step()
    state = new_state(weight)
    adamw_8bit_(weight, grad, state, FORM, grad_scale=torch.tensor(3.0), backend=backend)
    torch.testing.assert_close(weight, plain.detach(), rtol=1e-6, atol=1e-7)
    assert float(state["step"]) == 1


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_nothing_changes_where_a_gradient_is_not_finite(backend):
    weight, state = trained(adamw_8bit_, (3, 100), backend=backend)
    before = [weight.clone(), *(tensor.clone() for tensor in state.values())]
    bad = torch.full((3, 100), float("nan"))
    adamw_8bit_(weight, bad, state, FORM, found_inf=torch.ones(()), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, [weight, *state.values()], strict=True))


def test_a_nan_stays_with_its_element():
    found = trained_with_a_nan(adamw_8bit_, backend="native")
    assert_alike(found, trained_with_a_nan(adamw_8bit_reference_))


@pytest.mark.parametrize("power", [3, 4])
def test_a_code_is_near_what_it_stands_for(power):
    values = torch.randn(5 * BLOCK - 3).abs() if power == 4 else torch.randn(5 * BLOCK - 3)
    codes, scale = encode(values, power)
    found = decode(codes, scale, power, values.shape)
    largest = scale.repeat_interleave(BLOCK)[: len(values)]
    share = values.abs() / largest
    # the slope of the power code at a share of the largest, half a code wide
    assert bool(((found - values).abs() <= 1.2 * largest * power * (share ** (1 - 1 / power) + 0.01) / 254).all())
    assert torch.equal(
        found.sign()[codes.flatten()[: len(values)] != 0], values.sign()[codes.flatten()[: len(values)] != 0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4).t()[:2]}, "weight.stride"),
        ({"weight": torch.zeros(4, dtype=torch.float64)}, "weight.dtype = torch.float64: expected float32"),
        ({"grad": torch.zeros(5)}, r"grad.shape = torch.Size\(\[5\]\)"),
        ({"grad": torch.zeros(4, dtype=torch.bfloat16)}, "grad.dtype = torch.bfloat16"),
        ({"state": new_state(torch.zeros(300))}, r"state\['exp_avg'\].shape = \[2, 256\]: expected \[1, 256\]"),
        ({"backend": "cuda"}, "backend = 'cuda'"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale.device = meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {"weight": torch.zeros(4), "grad": torch.zeros(4), "state": new_state(torch.zeros(4)), "form": FORM}
    with pytest.raises(ValueError, match=message):
        adamw_8bit_(**given | change)
