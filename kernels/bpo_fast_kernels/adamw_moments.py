"""How the moments of AdamW are kept: in float32, as PyTorch does, or in 8 bits, a quarter of the memory.

In 8 bits each block of 256 elements keeps its largest magnitude in float32 and its elements as powers of a fraction of
it: cubes for the first moment, fourth powers for the second, whose smallest elements decide the step (a linear code
would round them to 0, and 1 / sqrt(0) is no step size). Blockwise 8-bit states are from Dettmers et al., 2022, arXiv
2110.02861; the power code stands in for their lookup table. Written out in PyTorch a step is some forty passes over
memory and holds six float32 copies of the tensor.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch

BLOCK = 256
POWERS = {"exp_avg": 3, "exp_avg_sq": 4}
State = MutableMapping[str, torch.Tensor]


@dataclass(frozen=True)
class Moments:
    """How the moments of a weight are kept.

    Attributes:
        name: of their kernels.
        layout: of a weight: (type, shape) of each tensor but the count of steps, by name, as kernels take them.
        read: (state, shape of the weight) -> both in float32, in memory of their own.
        write: both -> what the state keeps of them, by name.
    """

    name: str
    layout: Callable[[torch.Tensor], dict[str, tuple[torch.dtype, list[int]]]]
    read: Callable[[State, torch.Size], list[torch.Tensor]]
    write: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def new_state(weight: torch.Tensor, states: str = "float32") -> dict[str, torch.Tensor]:
    """The state of a tensor that has taken no step.

    Args:
        weight: float32.
        states: "float32" or "8bit".

    Returns:
        "step" [] float32, and "exp_avg" and "exp_avg_sq": of the tensor's shape, float32, as
        torch.optim.AdamW(fused=True) keeps them; or the codes [blocks, 256] int8 and, by their names with "_scale", the
        largest magnitude of each block [blocks, 1] float32. The last block may be part empty.
    """
    parts = {"step": (torch.float32, [])} | KINDS[states].layout(weight)
    return {name: torch.zeros(shape, dtype=dtype, device=weight.device) for name, (dtype, shape) in parts.items()}


def kind_of(state: Mapping[str, torch.Tensor]) -> Moments:
    """How a state keeps its moments."""
    return KINDS["8bit" if "exp_avg_scale" in state else "float32"]


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


KINDS = {
    "float32": Moments(
        "adamw",
        lambda weight: {name: (torch.float32, list(weight.shape)) for name in POWERS},
        lambda state, shape: [state[name].clone() for name in POWERS],
        lambda *both: dict(zip(POWERS, both, strict=True)),
    ),
    "8bit": Moments("adamw_8bit", _layout, _read, _write),
}
