"""One step of AdamW with moments of 8 bits, in one pass: a quarter of the memory of float32 ones.

Each block of 256 elements keeps its largest magnitude in float32 and its elements as powers of a fraction of it:
cubes for the first moment, fourth powers for the second, whose smallest elements decide the step (a linear code would
round them to 0, and 1 / sqrt(0) is no step size). Blockwise 8-bit states are from Dettmers et al., 2022, arXiv
2110.02861; the power code stands in for their lookup table. Written out in PyTorch a step is some forty passes over
memory and holds six float32 copies of the tensor.
"""

import torch

from bpo_fast_kernels.adamw import AdamW, Moments, State, Step, take_, take_reference_

BLOCK = 256
POWERS = {"exp_avg": 3, "exp_avg_sq": 4}


def new_state(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a tensor that has taken no step.

    Returns:
        "step" [] float32, and of "exp_avg" and "exp_avg_sq" the codes [blocks, 256] int8 and, by their names with
        "_scale", the largest magnitude of each block [blocks, 1] float32. The last block may be part empty.
    """
    return EIGHT_BITS.new_state(weight)


def adamw_8bit_(
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
    """As `adamw_`, with the state that `new_state` of this module makes."""
    take_(Step(weight, grad, state, form, rounded, grad_scale, found_inf), EIGHT_BITS, backend)


def adamw_8bit_reference_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    *,
    rounded: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """The twin of `adamw_8bit_`."""
    take_reference_(Step(weight, grad, state, form, rounded, grad_scale, found_inf), EIGHT_BITS)


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


def _layout(weight: torch.Tensor) -> dict[str, tuple[torch.dtype, list[int]]]:
    num = -(-weight.numel() // BLOCK)
    parts = {"": (torch.int8, [num, BLOCK]), "_scale": (torch.float32, [num, 1])}
    return {name + end: part for name in POWERS for end, part in parts.items()}


def _read(state: State, shape: torch.Size) -> list[torch.Tensor]:
    return [decode(state[name], state[f"{name}_scale"], power, shape) for name, power in POWERS.items()]


def _write(*both: torch.Tensor) -> dict[str, torch.Tensor]:
    out = {}
    for (name, power), moment in zip(POWERS.items(), both, strict=True):
        out[name], out[f"{name}_scale"] = encode(moment, power)
    return out


EIGHT_BITS = Moments("adamw_8bit", _layout, _read, _write)
