"""Steps of AdamW in 8 bits, by a kernel or by its twin."""

import torch
from bpo_fast_kernels.adamw_8bit import AdamW, new_state

SHAPES = [(1,), (255,), (256,), (3, 257), (5, 1, 211), (4, 1024), (0,)]
FORM = AdamW(lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)


def trained(step, shape, *, steps=4, device="cpu", form=FORM, **options):
    """(weight, state) after steps of gradients of unlike sizes, zeros among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(device)
    state = new_state(weight)
    for i in range(steps):
        grad = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 2, shape, generator=generator)
        grad = grad.where(torch.rand(shape, generator=generator) > 0.1, 0.0).to(device)
        scale = torch.tensor(1.0 + i, device=device)
        step(weight, grad, state, form, grad_scale=scale, found_inf=torch.zeros((), device=device), **options)
    return weight, state


def trained_with_a_nan(step, **options):
    """(weight, state) after steps, one with a NaN among its gradients, whose weight alone is then NaN: here 0."""
    weight, state = trained(step, (3, 257), **options)
    for odd in (float("nan"), 1.0):
        grad = torch.linspace(-1, 2, 771).view(3, 257)
        grad[0, 9] = odd
        step(weight, grad.to(weight.device), state, FORM, **options)
    assert weight.isnan().nonzero().tolist() == [[0, 9]]
    return weight.nan_to_num(0.0), state


def assert_alike(found, expected):
    """Weights to rounding; codes to the tie of a rounding, which moves one by one."""
    (weight, state), (wanted, wanted_state) = found, expected
    torch.testing.assert_close(weight.cpu(), wanted.cpu(), rtol=1e-5, atol=5e-5)
    assert state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        own, tensor = state[name].cpu(), tensor.cpu()
        assert own.dtype == tensor.dtype, name
        if tensor.dtype == torch.int8:
            off = (own.int() - tensor.int()).abs()
            assert off.numel() == 0 or off.max() <= 1, name
            assert int((off > 0).sum()) <= 2 + 0.01 * off.numel(), name
        else:
            torch.testing.assert_close(own, tensor, rtol=1e-5, atol=0)
