"""What a trunk does between its matrix products, in one pass each: RMS norms and gated activations.

Written out in PyTorch they are five to eight passes over memory, forward and backward, and keep copies in float32 for
the backward pass; these read each operand once and keep what comes in.
"""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bpo_fast_kernels.backends import native_ops, pick_backend
from bpo_fast_kernels.checks import FLOATS, NATIVE_FLOATS, require

ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_twice: bool = True
) -> torch.Tensor:
    """The twin of `rms_norm`, in float32 or, of float64, in that."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds_twice:
        return wide.to(x.dtype) * (weight + offset if offset else weight)
    return (wide * (weight.to(wide.dtype) + offset)).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_twice: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension.

    Args:
        x: [..., H] float32, bfloat16 or float16.
        weight: [H] of the same type.
        eps: above 0.
        offset: 0, or 1 where weights are kept as their difference to one (Gemma).
        rounds_twice: x is rounded to its type before it meets the weight (Llama), else only the result is.
        backend: "auto", "native" (a CPU, not float16), "torch" or "triton".

    Returns:
        [..., H] of the type of x; differentiable in x and in the weight.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or a backend that cannot run here.
    """
    _check("x", x, x)
    require(weight.shape == x.shape[-1:], "weight.shape", list(weight.shape), f"expected {list(x.shape[-1:])}")
    _check("weight", weight, x)
    require(math.isfinite(eps) and eps > 0, "eps", eps, "expected a finite number above 0")
    require(math.isfinite(offset), "offset", offset, "expected a finite number")
    passes = _passes(backend, x)
    if passes is None or x.shape[-1] > passes.WIDEST:
        return rms_norm_reference(x, weight, eps, offset=offset, rounds_twice=rounds_twice)
    form = (eps, offset, rounds_twice)
    with torch.cuda.device_of(x):
        if torch.is_grad_enabled():
            return _RmsNorm.apply(x, weight, form, passes)
        return passes.norm(_rows(x), weight.contiguous(), form)[0].view(x.shape)


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The twin of `gated`."""
    functional = torch.nn.functional
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, *, backend: str = "auto") -> torch.Tensor:
    """activation(gate) * up.

    Args:
        gate, up: [..., I] float32, bfloat16 or float16; rows may lie apart, as halves of one tensor do.
        activation: "silu" or "gelu_tanh".
        backend: "auto", "native" (a CPU, not float16), "torch" or "triton".

    Returns:
        [..., I] of their type; the activation is rounded to it first. Differentiable in both.

    Raises:
        ValueError: a wrong shape, dtype, device or name, or a backend that cannot run here.
    """
    require(activation in ACTIVATIONS, "activation", repr(activation), f"expected one of {', '.join(ACTIVATIONS)}")
    _check("gate", gate, gate)
    require(up.shape == gate.shape, "up.shape", list(up.shape), f"expected {list(gate.shape)} like gate")
    _check("up", up, gate)
    passes = _passes(backend, gate)
    if passes is None:
        return gated_reference(gate, up, activation)
    with torch.cuda.device_of(gate):
        if torch.is_grad_enabled():
            return _Gated.apply(gate, up, activation, passes)
        return passes.gating(_rows(gate), _rows(up), activation).view(gate.shape)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether tensors like this one meet kernels and not the twins."""
    return x.dtype in FLOATS and _passes("auto", x) is not None


def _check(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    require(x.dim() > 0 and x.shape[-1] > 0, f"{name}.shape", list(x.shape), "expected rows of one number at least")
    require(x.dtype in FLOATS, f"{name}.dtype", x.dtype, "expected float32, bfloat16 or float16")
    require(x.dtype == like.dtype, f"{name}.dtype", x.dtype, f"expected {like.dtype}")
    require(x.device == like.device, f"{name}.device", x.device, f"expected {like.device}")


def _passes(backend: str, x: torch.Tensor) -> Any:
    """The passes of a backend; None: the twin runs."""
    name = pick_backend(backend, x.device).name
    if name == "triton":
        from bpo_fast_kernels import triton_trunk

        return triton_trunk
    if name == "native" and x.device.type == "cpu" and x.dtype in NATIVE_FLOATS:
        return _Native
    require(backend != "native", "backend", "'native'", "expected float32 or bfloat16 on a CPU here")
    return None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[R, width] with the numbers of a row side by side; a copy only where rows are not evenly apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or x.shape[-1] == 1 else rows.contiguous()


class _Native:
    """The passes of the native backend, as triton_trunk has them."""

    WIDEST = 2**31

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor, form: tuple[float, float, bool]) -> tuple[torch.Tensor, ...]:
        out, scales = x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
        native_ops(x.device).rms_norm(x, weight, *form, out, scales)
        return out, scales

    @staticmethod
    def norm_backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        form: tuple[float, float, bool],
        *,
        dweight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dx, dw = x.new_empty(x.shape), torch.zeros_like(weight, dtype=torch.float32) if dweight else None
        native_ops(x.device).rms_norm_backward(dout, x, weight, scales, form[1], dx, dw)
        return dx, None if dw is None else dw.to(weight.dtype)

    @staticmethod
    def gating(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        out = gate.new_empty(gate.shape)
        native_ops(gate.device).gated(gate, up, activation == "silu", out)
        return out

    @staticmethod
    def gating_backward(
        dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        native_ops(gate.device).gated_backward(dout, gate, up, activation == "silu", dgate, dup)
        return dgate, dup


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, form: tuple[float, float, bool], passes: Any):
        weight = weight.contiguous()
        out, scales = passes.norm(_rows(x), weight, form)
        ctx.save_for_backward(x, weight, scales)
        ctx.form, ctx.passes = form, passes
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dweight = ctx.needs_input_grad[1]
        dx, dw = ctx.passes.norm_backward(_rows(dout), _rows(x), weight, scales, ctx.form, dweight=dweight)
        return dx.view(x.shape), dw, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str, passes: Any):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.passes = activation, passes
        return passes.gating(_rows(gate), _rows(up), activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = ctx.passes.gating_backward(_rows(dout), _rows(gate), _rows(up), ctx.activation)
        return *(g.view(gate.shape) for g in grads), None, None
