"""AdamW with moments of float32 and of 8 bits: native steps against their twins, and the twins against PyTorch's."""

import dataclasses
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from adamw_cases import FORM, SHAPES, STATES, Steps, assert_alike
from bpo_fast_kernels import adamw_
from bpo_fast_kernels.adamw import Stepped
from bpo_fast_kernels.adamw_moments import BLOCK, decode, encode, new_state

KINDS = pytest.mark.parametrize("states", STATES)
BACKENDS = pytest.mark.parametrize("backend", ["native", "torch"])
FLOATS = [torch.float32, torch.bfloat16]
OTHER = dataclasses.replace(FORM, betas=(0.0, 0.5), weight_decay=0.0)


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [FORM, OTHER])
def test_a_native_step_is_that_of_the_twin(states, dtype, shape, form):
    twin = Steps(states, dtype, form=form)
    native = dataclasses.replace(twin, options={"backend": "native"})
    assert_alike(native.trained(shape), twin.trained(shape))


def test_codes_at_a_tie_are_alike_and_others_are_not(monkeypatch):
    twin = Steps("8bit")
    wanted = twin.trained((1024, 1024))
    for noise, alike in ((2e-7, True), (2e-2, False)):  # of another order of operations, and of an error
        rough = partial(_rough, encode=encode, noise=noise, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr("bpo_fast_kernels.adamw_moments.encode", rough)
        with nullcontext() if alike else pytest.raises(AssertionError):
            assert_alike(twin.trained((1024, 1024)), wanted, few=0.001)


def _rough(values, power, *, encode, noise, generator):
    return encode(values * (1 + noise * torch.randn(values.shape, generator=generator)), power)


@KINDS
@pytest.mark.parametrize(("grads", "weights"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_a_gradient_and_a_weight_may_be_of_other_types(states, grads, weights):
    found = []
    for options in (None, {"backend": "native"}):
        steps = Steps(states, grads, options=options)
        weight, state = steps.start((3, 257))
        state.pop("rounded", None)
        state |= {} if weights is None else {"rounded": torch.empty(3, 257, dtype=weights)}
        steps.step(weight, torch.linspace(-1, 2, 771).view(3, 257), state)
        found.append((weight, state))
    assert_alike(found[1], found[0])


@KINDS
def test_float16_takes_the_twin_on_a_cpu(states):
    found = Steps(states, torch.float16, options={}).trained((3, 100))
    assert_alike(found, Steps(states, torch.float16).trained((3, 100)))
    with pytest.raises(ValueError, match="backend = 'native': expected float32 or bfloat16 on a CPU"):
        Steps(states, torch.float16, options={"backend": "native"}).trained((3, 100))


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_repeat_bit_for_bit_for_any_number_of_threads(states, dtype):
    runs = []
    for num in (1, 2, 2):
        torch.set_num_threads(num)
        runs.append(Steps(states, dtype, options={}).trained((300, 301)))
    for weight, state in runs[1:]:
        assert torch.equal(weight, runs[0][0])
        assert all(torch.equal(state[name], runs[0][1][name]) for name in state)


@KINDS
@BACKENDS
def test_the_first_step_is_that_of_pytorch(states, backend):
    """Moments of 8 bits are not rounded yet."""
    weight, grad = torch.randn(2, 700), torch.randn(2, 700)
    plain = torch.nn.Parameter(weight.clone())
    plain.grad = grad / 3.0
    names = ("lr", "betas", "eps", "weight_decay")
    torch.optim.AdamW([plain], **{name: getattr(FORM, name) for name in names}).step()
    steps = Steps(states, options={"backend": backend})
    state = new_state(weight, states)
    steps.step(weight, grad, state, grad_scale=torch.tensor(3.0))
    torch.testing.assert_close(weight, plain.detach(), rtol=1e-6, atol=1e-7)
    assert float(state["step"]) == 1


@BACKENDS
def test_float32_moments_are_those_of_pytorch(backend):
    """Their names, types and values, so that either goes on from the other's."""
    mine, plain = torch.randn(2, 700), torch.nn.Parameter(torch.empty(2, 700))
    plain.data.copy_(mine)
    names = ("lr", "betas", "eps", "weight_decay")
    adamw = torch.optim.AdamW([plain], fused=True, **{name: getattr(FORM, name) for name in names})
    state = new_state(mine)
    for _ in range(5):
        plain.grad = torch.randn(2, 700) * torch.logspace(-3, 3, 700)
        adamw_([Stepped(mine, plain.grad, state)], FORM, backend=backend)
        adamw.step()
    torch.testing.assert_close(mine, plain.detach(), rtol=1e-5, atol=1e-6)
    assert state.keys() == adamw.state[plain].keys()
    for name, value in adamw.state[plain].items():
        assert (state[name].shape, state[name].dtype) == (value.shape, value.dtype)
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


@KINDS
@BACKENDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_changes_where_a_gradient_is_not_finite(states, backend, dtype):
    assert Steps(states, dtype, options={"backend": backend}).unmoved_by_what_is_not_finite()


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_stays_with_its_element(states, dtype):
    native = Steps(states, dtype, options={"backend": "native"})
    assert_alike(native.trained_with_a_nan(), Steps(states, dtype).trained_with_a_nan())


@BACKENDS
def test_weights_are_rounded_to_nearest_and_ties_to_even(backend):
    """Of 1 + k / 256 in bfloat16, odd k are ties; the largest numbers round to infinity."""
    weight = torch.cat([1 + torch.arange(-600, 600) / 256, torch.tensor([3.4e38, -3.4e38, 0.0])])
    rounded, still = torch.zeros(len(weight), dtype=torch.bfloat16), dataclasses.replace(FORM, lr=0.0)
    adamw_([Stepped(weight, torch.ones_like(weight), new_state(weight), rounded)], still, backend=backend)
    assert torch.equal(rounded, weight.bfloat16())
    assert rounded.isinf().sum() == 2


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
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "grad.dtype = torch.float64: expected float32 or bfloat16"),
        ({"grad": torch.zeros(4, device="meta")}, "grad.device = meta"),
        ({"rounded": torch.zeros(4)}, "rounded.dtype = torch.float32: expected bfloat16 or float16"),
        ({"rounded": torch.zeros(3, dtype=torch.bfloat16)}, r"rounded.shape = torch.Size\(\[3\]\)"),
        ({"rounded": torch.zeros(8, dtype=torch.bfloat16)[::2]}, r"rounded.stride = \[2\]"),
        ({"backend": "cuda"}, "backend = 'cuda'"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale.device = meta"),
    ],
)
@KINDS
def test_bad_arguments_are_named(states, change, message):
    given = {"weight": torch.zeros(4), "grad": torch.zeros(4), "state": new_state(torch.zeros(4), states)} | change
    options = {name: given.pop(name) for name in ("backend", "grad_scale") if name in given}
    with pytest.raises(ValueError, match=message):
        adamw_([Stepped(**given)], FORM, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (new_state(torch.zeros(300), "8bit"), r"state\['exp_avg'\].shape = \[2, 256\]: expected \[1, 256\]"),
        (new_state(torch.zeros(300)), r"state\['exp_avg'\].shape = \[300\]: expected \[4\]"),
        (new_state(torch.zeros(4)) | {"exp_avg_sq": torch.zeros(4).double()}, r"state\['exp_avg_sq'\].dtype"),
        (new_state(torch.zeros(4)) | {"exp_avg_sq": torch.zeros(8)[::2]}, r"state\['exp_avg_sq'\].stride"),
        (new_state(torch.zeros(4), "8bit"), r"state = \[.*: expected one kind"),
    ],
)
def test_states_of_another_weight_are_named(state, message):
    good = Stepped(torch.zeros(4), torch.zeros(4), new_state(torch.zeros(4)))
    with pytest.raises(ValueError, match=message):
        adamw_([good, Stepped(torch.zeros(4), torch.zeros(4), state)], FORM)


@KINDS
@BACKENDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_that_are_stepped_together_end_as_alone(states, backend, dtype):
    steps = Steps(states, dtype, options={"backend": backend})
    for found, expected in zip(steps.trained_together(), Steps(states, dtype).trained_together(), strict=True):
        assert_alike(found, expected)
    assert adamw_([], FORM) is None
