"""AdamW under one global schedule; the members of an ensemble are M independent optimizers in stacked tensors.

AdamW is elementwise, so one step on tensors with a member dimension is M separate steps; only clipping, which couples
the elements of a member, is done member by member.
"""

import math

import torch
from torch import Tensor, nn

from bpo_fast.adamw8bit import BLOCK, AdamW8bit
from bpo_fast.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `num_steps`; linear and cosine end at 0."""
    assert config.learning_rate is not None, "resolve() has set it"
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0}
    return config.learning_rate * factor[config.schedule]


def state_bytes(config: OptimConfig, num_stepped: int, num_copied: int) -> int:
    """Bytes of the moments of `num_stepped` elements and of float32 copies of `num_copied` of them."""
    moments = 2 * (1 + 4 / BLOCK) if config.states == "8bit" else 8
    return int(moments * num_stepped) + 4 * num_copied


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
        self._masters = [self._master(p) for p in parameters]
        options = {
            "lr": 0.0,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        if config.states == "8bit":
            self._adamw: torch.optim.Optimizer = AdamW8bit(self._masters, **options)
        else:
            self._adamw = torch.optim.AdamW(self._masters, fused=True, **options)

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 tensor that is stepped: a copy where the weight is narrower (a bf16 weight swallows updates below
        1/256 of its size) or moments live in host memory, else the weight itself."""
        if self._config.offload:
            host = parameter.detach().to("cpu", torch.float32, copy=True)
            return nn.Parameter(host.pin_memory() if parameter.is_cuda else host)
        return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of moments and masters on `device`, whether they are there already or come with the first step."""
        own = [(m, p) for m, p in zip(self._masters, self._parameters, strict=True) if m.device == device]
        return state_bytes(self._config, sum(m.numel() for m, _ in own), sum(m.numel() for m, p in own if m is not p))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients on the device of the weights, in the type in which they are applied."""
        width = 0 if self._config.offload else 4
        return sum(p.numel() * max(width, p.element_size()) for p in self._parameters)

    @torch.no_grad()
    def step(self, step: int, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clips and applies the gradients, without a host sync.

        Args:
            step: optimizer step, 0-based.
            loss: [] of the step, checked with the gradients.

        Returns:
            (norm before clipping, the mean over members: [] float32; [] bool. False if the norm or the loss was not
            finite and nothing was changed)
        """
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.to(master.device, torch.float32), None
        grads = [m.grad for m in self._masters if m.grad is not None]
        if not grads:
            return torch.zeros(()), torch.ones((), dtype=torch.bool)
        norms = self._norms(grads)
        mean = norms.mean()
        finite = mean.isfinite() if loss is None else mean.isfinite() & loss.isfinite()
        # the fused kernel divides by grad_scale and leaves everything as it is where found_inf is 1
        self._adamw.found_inf = (~finite).float()
        if self._num_members:
            scale = (self._config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
        else:
            self._adamw.grad_scale = ((norms + 1e-6) / self._config.max_grad_norm).clamp(min=1.0)[0]
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self._config, step, self._num_steps)
        self._adamw.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
                master.grad = None
        return mean, finite

    def release_gradients(self) -> None:
        """Frees the gradients: what comes between two steps needs their memory."""
        for parameter in self._parameters:
            parameter.grad = None

    def _norms(self, grads: list[Tensor]) -> Tensor:
        """[M] float32, or [1] for full fine-tuning."""
        if self._num_members:
            parts = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]
            return torch.stack(parts).square().sum(0).sqrt()
        return nn.utils.get_total_norm(grads).view(1)

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
