"""Norms and gates with all their gradients, by a kernel or, in float64, by its twin."""

import torch
from bpo_fast_kernels.trunk import gated_reference, rms_norm_reference

SHAPES = [(1, 1), (3, 16), (2, 5, 33), (7, 63), (70, 130), (1, 700), (0, 8), (129, 3)]
NORMS = [{"offset": 0.0, "rounds_twice": True}, {"offset": 1.0, "rounds_twice": False}]
ACTS = ["silu", "gelu_tanh"]


def norm_outcome(norm, shape, form, *, dtype=torch.float32, device="cpu", **options) -> list[torch.Tensor]:
    """[the result, dx, dweight]; those of the twin in float64 where `norm` is None."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x, weight, dout = (torch.randn(s, generator=generator).to(device, dtype) for s in (shape, shape[-1:], shape))
    if norm is None:
        norm, (x, weight, dout) = rms_norm_reference, (t.double() for t in (x, weight, dout))
        form = form | {"rounds_twice": False}
    out = norm(x.requires_grad_(), weight.requires_grad_(), 1e-5, **form, **options)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), dout)]


def gate_outcome(gate, shape, activation, *, dtype=torch.float32, device="cpu", **options) -> list[torch.Tensor]:
    """[the result, dgate, dup], likewise."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x, up, dout = (3 * torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    if gate is None:
        gate, (x, up, dout) = gated_reference, (t.double() for t in (x, up, dout))
    out = gate(x.requires_grad_(), up.requires_grad_(), activation, **options)
    return [out.detach(), *torch.autograd.grad(out, (x, up), dout)]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of any number, over the largest of its row or 1."""
    errors = [0.0]
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        if y.numel():
            scale = y.double().abs().amax(-1, keepdim=True).clamp(min=1.0)
            errors.append(float(((x.double() - y.double()).abs() / scale).max()))
    return max(errors)
