"""AdamW with moments of 8 bits: a quarter of the memory of float32 ones.

Each block of 256 elements keeps its largest magnitude in float32 and its elements as powers of a fraction of it:
cubes for the first moment, fourth powers for the second, whose smallest elements decide the step (a linear code would
round them to 0, and 1 / sqrt(0) is no step size). Blockwise 8-bit states are from Dettmers et al., 2022, arXiv
2110.02861; the power code stands in for their lookup table. It needs no library and runs on every device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCK = 256
_POWERS = {"exp_avg": 3, "exp_avg_sq": 4}


class AdamW8bit(torch.optim.Optimizer):
    """As torch.optim.AdamW, `grad_scale` and `found_inf` of its fused form included.

    Args:
        params: float32 tensors.
        lr, betas, eps, weight_decay: of AdamW.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step on the gradients in place; changes nothing where `found_inf` is 1."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name, power in _POWERS.items():
                state[name], state[f"{name}_scale"] = encode(torch.zeros_like(parameter), power)
        assert parameter.grad is not None
        grad = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
        keep = torch.zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf.bool()
        first, second = (decode(state[n], state[f"{n}_scale"], p, parameter.shape) for n, p in _POWERS.items())
        first.lerp_(grad, 1 - group["betas"][0])
        second.mul_(group["betas"][1]).addcmul_(grad, grad, value=1 - group["betas"][1])
        step = state["step"] + 1
        corrections = [1 - beta**step for beta in group["betas"]]
        for (name, power), moment in zip(_POWERS.items(), (first, second), strict=True):
            for key, new in zip((name, f"{name}_scale"), encode(moment, power), strict=True):
                state[key].copy_(torch.where(keep, state[key], new))
        size = second.div_(corrections[1]).sqrt_().add_(group["eps"]).mul_(corrections[0])
        new = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * first / size
        parameter.copy_(torch.where(keep, parameter, new))
        state["step"].copy_(torch.where(keep, state["step"], step))


def encode(values: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [blocks, BLOCK], largest magnitude of each block [blocks, 1] float32)."""
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True)
    part = (flat.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).pow_(1 / power)
    return (part * 127).round_().mul_(flat.sign()).to(torch.int8), scale


def decode(codes: Tensor, scale: Tensor, power: int, shape: torch.Size) -> Tensor:
    """The inverse of `encode`: float32 of `shape`."""
    values = (codes.float() / 127).abs_().pow_(power).mul_(codes.sign()).mul_(scale)
    return values.flatten()[: shape.numel()].view(shape)
