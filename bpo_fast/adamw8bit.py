"""AdamW with moments of 8 bits as an optimizer; what a step does is `bpo_fast_kernels.adamw_8bit`."""

from collections.abc import Iterable

import torch
from bpo_fast_kernels.adamw_8bit import AdamW, adamw_8bit_, new_state
from torch import Tensor, nn


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
            form = AdamW(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= new_state(parameter)
                adamw_8bit_(
                    parameter.data, parameter.grad, state, form, grad_scale=self.grad_scale, found_inf=self.found_inf
                )
