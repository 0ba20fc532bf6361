"""One step of AdamW in one pass over a float32 weight, and what it shares with that of 8-bit moments.

The gradient is read in the type that it comes in, and a narrow copy of the weight, which the model computes with, is
written beside it. PyTorch's fused AdamW takes gradients of the weight's own type: around it every gradient is copied to
float32 and every weight back, and a step moves 40 bytes a bfloat16 weight; this one moves 28, and makes no copy.
"""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import FLOATS, NATIVE_FLOATS, require

State = MutableMapping[str, torch.Tensor]
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
class Moments:
    """How the moments of a weight are kept.

    Attributes:
        name: of the operator.
        layout: of a weight: (type, shape) of each tensor but the count of steps, by name, as kernels take them.
        read: (state, shape of the weight) -> both in float32, in memory of their own.
        write: both -> what the state keeps of them, by name.
    """

    name: str
    layout: Callable[[torch.Tensor], dict[str, tuple[torch.dtype, list[int]]]]
    read: Callable[[State, torch.Size], list[torch.Tensor]]
    write: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]

    def new_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a weight that has taken no step."""
        parts = {"step": (torch.float32, [])} | self.layout(weight)
        return {name: torch.zeros(shape, dtype=dtype, device=weight.device) for name, (dtype, shape) in parts.items()}


@dataclass(frozen=True)
class Step:
    """What a step reads and writes; see `adamw_`."""

    weight: torch.Tensor
    grad: torch.Tensor
    state: State
    form: AdamW
    rounded: torch.Tensor | None
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None


_NAMES = ("exp_avg", "exp_avg_sq")
FLOAT32 = Moments(
    "adamw",
    lambda weight: {name: (torch.float32, list(weight.shape)) for name in _NAMES},
    lambda state, shape: [state[name].clone() for name in _NAMES],
    lambda *both: dict(zip(_NAMES, both, strict=True)),
)


def new_state(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a tensor that has taken no step, as torch.optim.AdamW(fused=True) keeps it.

    Returns:
        "step" [] float32, "exp_avg" and "exp_avg_sq" of the tensor's shape, float32.
    """
    return FLOAT32.new_state(weight)


def adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    *,
    rounded: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Steps a tensor and its moments in place, without a host sync on a GPU.

    Args:
        weight: float32, contiguous.
        grad: of its shape, float32, bfloat16 or float16. a NaN makes its own weight NaN and no other.
        state: as `new_state` makes it, or torch.optim.AdamW.
        form: learning rate and so on.
        rounded: of the weight's shape, bfloat16 or float16, contiguous. gets the stepped weight, to nearest, ties to
            even; what is below 2^-126 may become 0.
        grad_scale: [] float32. what divides the gradient.
        found_inf: [] float32. nothing changes where it is 1.
        backend: "auto", "native" (a CPU, not float16), "torch" or "triton".

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
    """
    take_(Step(weight, grad, state, form, rounded, grad_scale, found_inf), FLOAT32, backend)


def adamw_reference_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    *,
    rounded: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """The twin of `adamw_`."""
    take_reference_(Step(weight, grad, state, form, rounded, grad_scale, found_inf), FLOAT32)


@torch.no_grad()
def take_(step: Step, moments: Moments, backend: str) -> None:
    """Checks and takes a step."""
    _check(step, moments)
    weight, count, found_inf = step.weight, step.state["step"], step.found_inf
    types = {step.grad.dtype, torch.float32 if step.rounded is None else step.rounded.dtype}
    name = pick_backend(backend, weight.device).name
    if name == "triton":
        from bpo_fast_kernels.triton_adamw import launch

        with torch.cuda.device_of(weight):
            count += 1.0 if found_inf is None else 1.0 - found_inf
            launch(step, moments)
    elif name == "native" and weight.device.type == "cpu" and types <= {*NATIVE_FLOATS}:
        if found_inf is None or not found_inf:
            count += 1
            _take_native(step, moments)
    else:
        require(backend != "native", "backend", "'native'", "expected float32 or bfloat16 on a CPU here")
        take_reference_(step, moments)


@torch.no_grad()
def take_reference_(step: Step, moments: Moments) -> None:
    """The twin of `take_`."""
    weight, state, form, found_inf = step.weight, step.state, step.form, step.found_inf
    grad = step.grad.float() if step.grad_scale is None else step.grad.float() / step.grad_scale
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
    if step.rounded is not None:
        step.rounded.copy_(torch.where(keep, step.rounded, weight))


def _check(step: Step, moments: Moments) -> None:
    weight = step.weight
    require(weight.dtype == torch.float32, "weight.dtype", weight.dtype, "expected float32")
    require(weight.is_contiguous(), "weight.stride", list(weight.stride()), "expected a contiguous tensor")
    for name, tensor, types in (("grad", step.grad, FLOATS), ("rounded", step.rounded, NARROW)):
        if tensor is not None:
            shape = tensor.shape
            require(shape == weight.shape, f"{name}.shape", shape, f"expected {weight.shape} like weight")
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
            require(tensor.dtype in types, f"{name}.dtype", tensor.dtype, f"expected {words}")
    if step.rounded is not None:
        strides = list(step.rounded.stride())
        require(step.rounded.is_contiguous(), "rounded.stride", strides, "expected a contiguous tensor")
    for name, (dtype, shape) in moments.layout(weight).items():
        own, part = step.state[name], f"state[{name!r}]"
        require(list(own.shape) == shape, f"{part}.shape", list(own.shape), f"expected {shape}")
        require(own.dtype == dtype, f"{part}.dtype", own.dtype, f"expected {dtype}")
        require(own.is_contiguous(), f"{part}.stride", list(own.stride()), "expected a contiguous tensor")
    given = {name: getattr(step, name) for name in ("grad", "rounded", "grad_scale", "found_inf")} | dict(step.state)
    for name, tensor in given.items():
        if tensor is not None:
            require(tensor.device == weight.device, f"{name}.device", tensor.device, f"expected {weight.device}")


def _take_native(step: Step, moments: Moments) -> None:
    """Its count has been raised already."""
    form = step.form
    kept = [step.state[name] for name in moments.layout(step.weight)]
    grad_scale = 1.0 if step.grad_scale is None else float(step.grad_scale)
    corrections = map(float, form.corrections(step.state["step"]))
    numbers = (grad_scale, form.lr, *form.betas, form.eps, form.weight_decay, *corrections)
    operator = getattr(pick_backend("native", step.weight.device).ops, moments.name)
    operator(step.weight, step.grad.contiguous(), step.rounded, *kept, *numbers)
