"""AdamW as an optimizer that takes one pass over its tensors; what a step does is `bpo_fast_kernels.adamw`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from bpo_fast_kernels.adamw import AdamW, Step, Stepped, check, take_
from bpo_fast_kernels.adamw_moments import new_state
from torch import Tensor


class OnePassAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, `grad_scale` and `found_inf` of its fused form included.

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
        self._states, self._checked = states, set[Tensor]()
        self._group_of = {parameter: i for i, group in enumerate(self.param_groups) for parameter in group["params"]}

    @torch.no_grad()
    def step_on(self, moved: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """One step of parameters in place; changes nothing where `found_inf` is 1.

        Args:
            moved: of each
                parameter: one of `params`.
                grad: float32, bfloat16 or float16.
                rounded: bfloat16 or float16. what the parameter is a copy of; gets its new values.
        """
        names = ("lr", "betas", "eps", "weight_decay")
        forms = [AdamW(*(group[name] for name in names)) for group in self.param_groups]
        steps = [Step(form, self.grad_scale, self.found_inf) for form in forms]
        alike: list[list[Stepped]] = [[] for _ in steps]
        for parameter, grad, rounded in moved:
            state = self.state[parameter]
            if not state:
                state |= new_state(parameter, self._states)
            stepped, group = Stepped(parameter.data, grad, state, rounded), self._group_of[parameter]
            if parameter not in self._checked:  # once: a model has hundreds
                check(stepped, steps[group])
                self._checked.add(parameter)
            alike[group].append(stepped)
        for tensors, step in zip(alike, steps, strict=True):
            take_(tensors, step)
