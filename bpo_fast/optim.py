"""AdamW under one global schedule; the members of an ensemble are M independent optimizers in stacked tensors.

AdamW is elementwise, so one step on tensors with a member dimension is M separate steps; only clipping, which couples
the elements of a member, is done member by member.
"""

import math

import torch
from torch import Tensor, nn

from bpo_fast.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `num_steps`; linear and cosine end at 0."""
    assert config.learning_rate is not None, "resolve() has set it"
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0}
    return config.learning_rate * factor[config.schedule]


class Optimizer:
    """Trains the parameters of a policy.

    Args:
        parameters: tensors in training; with `num_members`, members are their dimension 0.
        config: AdamW and schedule.
        num_steps: T, for the schedule.
        num_members: M of a LoRA ensemble, or None for full fine-tuning.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig, *, num_steps: int, num_members: int | None):
        self._parameters, self._config = parameters, config
        self._num_steps, self._num_members = num_steps, num_members
        # float32 masters where the weights are not: a bf16 weight swallows updates below 1/256 of its size
        self._masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
        self._adamw = torch.optim.AdamW(
            self._masters,
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, step: int) -> tuple[float, bool]:
        """Clips and applies the gradients at optimizer step `step`.

        Returns:
            (norm before clipping, the mean over members; False if it was not finite and nothing was changed)
        """
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if not grads:
            return 0.0, True
        norms = self._norms(grads)
        mean = float(norms.mean())
        if not math.isfinite(mean):
            return mean, False
        scale = (self._config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)) if self._num_members else scale)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self._config, step, self._num_steps)
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self._adamw.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        return mean, True

    def _norms(self, grads: list[Tensor]) -> Tensor:
        """[M] float32, or [1] for full fine-tuning."""
        if self._num_members:
            squares = [g.float().flatten(1).square().sum(1) for g in grads]
        else:
            squares = [g.float().square().sum().view(1) for g in grads]
        return torch.stack(squares).sum(0).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and masters as flat named tensors."""
        out: dict[str, Tensor] = {}
        for i, (master, parameter) in enumerate(zip(self._masters, self._parameters, strict=True)):
            out |= {f"{i}.{k}": v.detach().contiguous() for k, v in self._adamw.state[master].items()}
            if master is not parameter:
                out[f"{i}.master"] = master.detach().contiguous()
        return out

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back a `state_dict`."""
        for i, (master, parameter) in enumerate(zip(self._masters, self._parameters, strict=True)):
            own = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == str(i)}
            if master is not parameter:
                master.copy_(own.pop("master"))
            if own:
                self._adamw.state[master] = {k: v.to(master.device).clone() for k, v in own.items()}
