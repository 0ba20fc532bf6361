"""A step of AdamW in one pass over float32 weights, with moments of float32 or of 8 bits.

The gradient is read in the type that it comes in, and a narrow copy of the weight, which the model computes with, is
written beside it. PyTorch's fused AdamW takes gradients of the weight's own type: around it every gradient is copied to
float32 and every weight back, and a step moves 40 bytes a bfloat16 weight; this one moves 28 (8 bits: 16), and makes no
copy. A GPU steps all in a launch or two: with one each, the host would set the pace of a model's hundreds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bpo_fast_kernels.adamw_moments import State, kind_of
from bpo_fast_kernels.backends import native_ops, pick_backend
from bpo_fast_kernels.checks import FLOATS, NATIVE_FLOATS, require

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamW:
    """The numbers of AdamW, as torch.optim.AdamW names them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def logs(self) -> list[float]:
        """Of the betas."""
        return [math.log(beta) if beta else -math.inf for beta in self.betas]

    def corrections(self, count: torch.Tensor) -> list[torch.Tensor]:
        """What divides each moment after so many steps: 1 - beta^count."""
        return [-torch.expm1(count * log) for log in self.logs]


@dataclass(frozen=True)
class Stepped:
    """A tensor that is stepped and what goes with it; see `adamw_`."""

    weight: torch.Tensor
    grad: torch.Tensor
    state: State
    rounded: torch.Tensor | None = None

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Of the gradient and of what is rounded."""
        return self.grad.dtype, None if self.rounded is None else self.rounded.dtype


@dataclass(frozen=True)
class Step:
    """What all tensors of a step share; see `adamw_`."""

    form: AdamW
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


def adamw_(
    tensors: Sequence[Stepped],
    form: AdamW,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Steps tensors and their moments in place, without a host sync on a GPU.

    Args:
        tensors: of one device, with moments of one kind, of each:
            weight: float32, contiguous.
            grad: of its shape, float32, bfloat16 or float16. a NaN makes its own weight NaN and no other.
            state: as `adamw_moments.new_state` makes it; of float32, torch.optim.AdamW's is the same.
            rounded: of the weight's shape, bfloat16 or float16, contiguous. gets the stepped weight, to nearest, ties
                to even; what is below 2^-126 may become 0.
        form: learning rate and so on.
        grad_scale: [] float32. what divides the gradients.
        found_inf: [] float32. nothing changes where it is 1.
        backend: "auto", "native" (a CPU, not float16), "torch" or "triton".

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
    """
    step = Step(form, grad_scale, found_inf)
    for tensor in tensors:
        check(tensor, step)
        require(kind_of(tensor.state) is kind_of(tensors[0].state), "state", list(tensor.state), "expected one kind")
        require(tensor.weight.device == tensors[0].weight.device, "weight.device", tensor.weight.device, "expected one")
    take_(tensors, step, backend)


@torch.no_grad()
def adamw_reference_(
    tensors: Sequence[Stepped],
    form: AdamW,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """The twin of `adamw_`."""
    for tensor in tensors:
        _take_reference(tensor, Step(form, grad_scale, found_inf))


@torch.no_grad()
def take_(tensors: Sequence[Stepped], step: Step, backend: str = "auto") -> None:
    """`adamw_` of what has passed `check`."""
    if not tensors:
        return
    device, found_inf = tensors[0].weight.device, step.found_inf
    name = pick_backend(backend, device).name
    if name == "triton":
        from bpo_fast_kernels.triton_adamw import launch

        with torch.cuda.device_of(tensors[0].weight):
            one = torch.ones((), device=device) if found_inf is None else 1.0 - found_inf
            torch._foreach_add_([tensor.state["step"] for tensor in tensors], [one] * len(tensors))
            launch(tensors, step)
        return
    keeps = found_inf is not None and device.type == "cpu" and bool(found_inf)
    for tensor in tensors:
        grad, rounded = tensor.types
        if name == "native" and device.type == "cpu" and {grad, rounded or grad} <= {*NATIVE_FLOATS}:
            if not keeps:
                _take_native(tensor, step)
        else:
            require(backend != "native", "backend", "'native'", "expected float32 or bfloat16 on a CPU here")
            _take_reference(tensor, step)


def check(tensor: Stepped, step: Step) -> None:
    """Raises ValueError for what `adamw_` does not take."""
    weight = tensor.weight
    require(weight.dtype == torch.float32, "weight.dtype", weight.dtype, "expected float32")
    require(weight.is_contiguous(), "weight.stride", list(weight.stride()), "expected a contiguous tensor")
    for name, own, types in (("grad", tensor.grad, FLOATS), ("rounded", tensor.rounded, NARROW)):
        if own is not None:
            require(own.shape == weight.shape, f"{name}.shape", own.shape, f"expected {weight.shape} like weight")
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
            require(own.dtype in types, f"{name}.dtype", own.dtype, f"expected {words}")
    if tensor.rounded is not None:
        strides = list(tensor.rounded.stride())
        require(tensor.rounded.is_contiguous(), "rounded.stride", strides, "expected a contiguous tensor")
    for name, (dtype, shape) in kind_of(tensor.state).layout(weight).items():
        own, part = tensor.state[name], f"state[{name!r}]"
        require(list(own.shape) == shape, f"{part}.shape", list(own.shape), f"expected {shape}")
        require(own.dtype == dtype, f"{part}.dtype", own.dtype, f"expected {dtype}")
        require(own.is_contiguous(), f"{part}.stride", list(own.stride()), "expected a contiguous tensor")
    given = {"grad": tensor.grad, "rounded": tensor.rounded, "grad_scale": step.grad_scale, "found_inf": step.found_inf}
    given |= tensor.state
    for name, own in given.items():
        if own is not None:
            require(own.device == weight.device, f"{name}.device", own.device, f"expected {weight.device}")


def _take_reference(tensor: Stepped, step: Step) -> None:
    weight, state, form, found_inf = tensor.weight, tensor.state, step.form, step.found_inf
    moments = kind_of(state)
    grad = tensor.grad.float() if step.grad_scale is None else tensor.grad.float() / step.grad_scale
    keep = torch.zeros((), dtype=torch.bool, device=weight.device) if found_inf is None else found_inf.bool()
    first, second = moments.read(state, weight.shape)
    first.lerp_(grad, 1 - form.betas[0])
    second.mul_(form.betas[1]).addcmul_(grad, grad, value=1 - form.betas[1])
    count = state["step"] + 1
    for name, new in ({"step": count} | moments.write(first, second)).items():
        state[name].copy_(torch.where(keep, state[name], new))
    corrections = form.corrections(count)
    size = second.div_(corrections[1]).sqrt_().add_(form.eps).mul_(corrections[0])
    new = weight * (1 - form.lr * form.weight_decay) - form.lr * first / size
    weight.copy_(torch.where(keep, weight, new))
    if tensor.rounded is not None:
        tensor.rounded.copy_(torch.where(keep, tensor.rounded, weight))


def _take_native(tensor: Stepped, step: Step) -> None:
    form, moments, state = step.form, kind_of(tensor.state), tensor.state
    state["step"] += 1
    kept = [state[name] for name in moments.layout(tensor.weight)]
    grad_scale = 1.0 if step.grad_scale is None else float(step.grad_scale)
    corrections = map(float, form.corrections(state["step"]))
    numbers = (grad_scale, form.lr, *form.betas, form.eps, form.weight_decay, *corrections)
    operator = getattr(native_ops(tensor.weight.device), moments.name)
    operator(tensor.weight, tensor.grad.contiguous(), tensor.rounded, *kept, *numbers)
