"""AdamW as an optimizer that takes one pass over a tensor; what a step does is `bpo_fast_kernels.adamw`."""

from collections.abc import Iterable
from typing import Any

import torch
from bpo_fast_kernels import adamw, adamw_8bit
from torch import Tensor

KINDS = {
    "float32": (adamw.adamw_, adamw.new_state),
    "8bit": (adamw_8bit.adamw_8bit_, adamw_8bit.new_state),
}


class OnePassAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, `grad_scale` and `found_inf` of its fused form included, but a tensor at a time.

    Args:
        params: float32 tensors, or groups of them.
        states: "float32", which torch.optim.AdamW keeps too, or "8bit".
        lr, betas, eps, weight_decay: of AdamW.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        states: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._step_, self._new_state = KINDS[states]
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def step_on(self, parameter: Tensor, grad: Tensor, rounded: Tensor | None = None) -> None:
        """One step of a parameter in place; changes nothing where `found_inf` is 1.

        Args:
            parameter: one of `params`.
            grad: float32, bfloat16 or float16.
            rounded: bfloat16 or float16. what the parameter is a copy of; gets its new values.
        """
        group = self._group_of[parameter]
        form = adamw.AdamW(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
        state, scalars = self.state[parameter], {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
        if not state:
            state |= self._new_state(parameter)
        self._step_(parameter.data, grad, state, form, rounded=rounded, **scalars)
