"""One step of AdamW with moments of 8 bits, in one pass: a quarter of the memory of float32 ones.

Each block of 256 elements keeps its largest magnitude in float32 and its elements as powers of a fraction of it:
cubes for the first moment, fourth powers for the second, whose smallest elements decide the step (a linear code would
round them to 0, and 1 / sqrt(0) is no step size). Blockwise 8-bit states are from Dettmers et al., 2022, arXiv
2110.02861; the power code stands in for their lookup table. Written out in PyTorch a step is some forty passes over
memory and holds six float32 copies of the tensor.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import require

BLOCK = 256
POWERS = {"exp_avg": 3, "exp_avg_sq": 4}
State = MutableMapping[str, torch.Tensor]


@dataclass(frozen=True)
class AdamW:
    """The numbers of AdamW, as torch.optim.AdamW names them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def new_state(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a tensor that has taken no step.

    Returns:
        "step" [] float32, and of "exp_avg" and "exp_avg_sq" the codes [blocks, 256] int8 and, by their names with
        "_scale", the largest magnitude of each block [blocks, 1] float32.
    """
    num = num_blocks(weight)
    state = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
    for name in POWERS:
        state[name] = torch.zeros(num, BLOCK, dtype=torch.int8, device=weight.device)
        state[f"{name}_scale"] = torch.zeros(num, 1, dtype=torch.float32, device=weight.device)
    return state


def num_blocks(weight: torch.Tensor) -> int:
    """Blocks that a tensor's codes take; the last one may be part empty."""
    return -(-weight.numel() // BLOCK)


def moments_of(state: State) -> list[torch.Tensor]:
    """Codes and scales of the first moment, and of the second."""
    return [state[name] for kind in POWERS for name in (kind, f"{kind}_scale")]


def adamw_8bit_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Steps a tensor and its moments in place, without a host sync on a GPU.

    Args:
        weight: float32, contiguous.
        grad: of its shape, float32. a NaN makes its own weight NaN and no other.
        state: as `new_state` makes it.
        form: learning rate and so on.
        grad_scale: [] float32. what divides the gradient.
        found_inf: [] float32. nothing changes where it is 1.
        backend: "auto", "native" (a CPU), "torch" or "triton".

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
    """
    require(weight.dtype == torch.float32, "weight.dtype", weight.dtype, "expected float32")
    require(weight.is_contiguous(), "weight.stride", list(weight.stride()), "expected a contiguous tensor")
    for name in ("dtype", "shape", "device"):
        own, wanted = getattr(grad, name), getattr(weight, name)
        require(own == wanted, f"grad.{name}", own, f"expected {wanted} like weight")
    given = {"grad_scale": grad_scale, "found_inf": found_inf} | dict(state)
    for name, tensor in given.items():
        if tensor is not None:
            require(tensor.device == weight.device, f"{name}.device", tensor.device, f"expected {weight.device}")
    num = num_blocks(weight)
    for name in POWERS:
        shape = list(state[name].shape)
        require(shape == [num, BLOCK], f"state[{name!r}].shape", shape, f"expected {[num, BLOCK]}")
    name = pick_backend(backend, weight.device).name
    if name == "triton":
        from bpo_fast_kernels.triton_adamw import step

        grad = grad.contiguous()
        after = state["step"] + 1
        with torch.cuda.device_of(weight):
            step(weight, grad, state, form, _corrections(after, form), grad_scale=grad_scale, found_inf=found_inf)
        state["step"].copy_(after if found_inf is None else torch.where(found_inf.bool(), state["step"], after))
    elif name == "native" and weight.device.type == "cpu":
        if found_inf is None or not found_inf:
            state["step"] += 1
            _step_native(weight, grad.contiguous(), state, form, 1.0 if grad_scale is None else float(grad_scale))
    else:
        require(backend != "native", "backend", "'native'", "expected a CPU here")
        adamw_8bit_reference_(weight, grad, state, form, grad_scale=grad_scale, found_inf=found_inf)


@torch.no_grad()
def adamw_8bit_reference_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """The twin of `adamw_8bit_`."""
    grad = grad if grad_scale is None else grad / grad_scale
    keep = torch.zeros((), dtype=torch.bool) if found_inf is None else found_inf.bool()
    first, second = (decode(state[n], state[f"{n}_scale"], p, weight.shape) for n, p in POWERS.items())
    first.lerp_(grad, 1 - form.betas[0])
    second.mul_(form.betas[1]).addcmul_(grad, grad, value=1 - form.betas[1])
    step = state["step"] + 1
    corrections = _corrections(step, form)
    for (name, power), moment in zip(POWERS.items(), (first, second), strict=True):
        for key, new in zip((name, f"{name}_scale"), encode(moment, power), strict=True):
            state[key].copy_(torch.where(keep, state[key], new))
    size = second.div_(corrections[1]).sqrt_().add_(form.eps).mul_(corrections[0])
    new = weight * (1 - form.lr * form.weight_decay) - form.lr * first / size
    weight.copy_(torch.where(keep, weight, new))
    state["step"].copy_(torch.where(keep, state["step"], step))


def encode(values: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [blocks, BLOCK], largest magnitude of each block [blocks, 1] float32)."""
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    flat = flat.where(~flat.isnan(), 0.0)  # or it would be the scale of the block
    scale = flat.abs().amax(1, keepdim=True)
    part = (flat.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).pow_(1 / power)
    return (part * 127).round_().mul_(flat.sign()).to(torch.int8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor, power: int, shape: torch.Size) -> torch.Tensor:
    """The inverse of `encode`: float32 of `shape`."""
    values = (codes.float() / 127).abs_().pow_(power).mul_(codes.sign()).mul_(scale)
    return values.flatten()[: shape.numel()].view(shape)


def _corrections(step: torch.Tensor, form: AdamW) -> list[torch.Tensor]:
    """What divides each moment after so many steps: 1 - beta^step."""
    return [-torch.expm1(step * (math.log(beta) if beta else -math.inf)) for beta in form.betas]


def _step_native(weight: torch.Tensor, grad: torch.Tensor, state: State, form: AdamW, grad_scale: float) -> None:
    corrections = map(float, _corrections(state["step"], form))
    numbers = (grad_scale, form.lr, *form.betas, form.eps, form.weight_decay, *corrections)
    pick_backend("native", weight.device).ops.adamw_8bit(weight, grad, *moments_of(state), *numbers)
