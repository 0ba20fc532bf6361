"""AdamW under one global schedule; the members of an ensemble are M independent optimizers in stacked tensors.

AdamW is elementwise, so one step on tensors with a member dimension is M separate steps; only clipping, which couples
the elements of a member, is done member by member. For the same reason several devices need not each keep all moments:
each steps its own piece of every tensor and gets the others' (the first stage of ZeRO, Rajbhandari et al., 2020, arXiv
1910.02054).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from bpo_fast_kernels.adamw_moments import BLOCK
from bpo_fast_kernels.trunk import has_kernels
from torch import Tensor, nn

from bpo_fast.adamw import OnePassAdamW
from bpo_fast.config import OptimConfig
from bpo_fast.ranks import Ranks

NORM_CUT = 2**18  # elements


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


def cut(num: int, num_ranks: int) -> list[int]:
    """Where the pieces of `num` elements begin, and their end: of like sizes, in whole blocks of the 8-bit moments."""
    size = -(-num // (BLOCK * num_ranks)) * BLOCK
    return [min(rank * size, num) for rank in range(num_ranks + 1)]


class _Piece:
    """What a rank steps of a parameter: all of it, or a run of its elements.

    Args:
        parameter: it is cut in the order of its elements, wherever they lie.
        bounds: of all pieces, see `cut`.
        rank: whose piece this is.
        offload: moments live in host memory.

    Attributes:
        master: the float32 tensor that is stepped, contiguous. A copy where the weight is not, is narrower (a bf16
            weight swallows updates below 1/256 of its size) or moments live in host memory, else the elements
            themselves.
        is_copy: whether it is a copy.
        rounds: whether a step, by a kernel, reads the narrow gradient and, where that is contiguous, writes the narrow
            weight.
    """

    def __init__(self, parameter: nn.Parameter, bounds: list[int], rank: int, *, offload: bool):
        self.parameter, self._is_whole = parameter, len(bounds) == 2
        self.start, self.stop = bounds[rank], bounds[rank + 1]
        self.is_copy = offload or parameter.dtype != torch.float32 or not parameter.is_contiguous()
        self.rounds = self.is_copy and not offload and has_kernels(parameter)
        if offload:
            host = self.of(parameter.detach()).to("cpu", torch.float32, copy=True).contiguous()
            self.master = nn.Parameter(host.pin_memory() if parameter.is_cuda else host)
        elif self.is_copy:
            self.master = nn.Parameter(self.of(parameter.detach()).float().contiguous())
        else:
            self.master = parameter if self._is_whole else nn.Parameter(self.of(parameter.detach()))

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the parameter's shape, a view where that is contiguous."""
        return tensor if self._is_whole else tensor.reshape(-1)[self.start : self.stop]

    def found_in(self, parts: Sequence[Tensor], name: str) -> Tensor:
        """This piece of what ranks have kept of their pieces of the parameter, under a name in their state."""
        if name == "step":
            return parts[0]
        in_blocks = parts[0].dtype == torch.int8 or name.endswith("_scale")
        width = BLOCK if name.endswith("_scale") else 1  # elements of the parameter for one of these
        stop = -(-self.stop // BLOCK) * BLOCK if in_blocks and self.start < self.stop else self.stop
        found, begin = [], 0
        for part in parts:  # maps of files, of which only these elements are read
            found.append(part.reshape(-1)[max(self.start // width - begin, 0) : max(stop // width - begin, 0)])
            begin += part.numel()
        return torch.cat(found).view((-1, parts[0].shape[1]) if in_blocks else self.master.shape)

    def take_gradient(self, scale: Tensor | None) -> Tensor | None:
        """What the master is to be stepped on, member m times scale[m]; its parameter, if another, forgets it."""
        grad = self.parameter.grad
        if grad is None:
            return None
        if scale is not None:
            grad = grad.float().mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
        if self.master is not self.parameter:
            self.parameter.grad = None
        if self.rounds:
            return self.of(grad)
        return self.of(grad).to(self.master.device, torch.float32).contiguous()  # PyTorch's step takes no strides

    @property
    def rounded(self) -> Tensor | None:
        """What the master is rounded to by its step, if that does it."""
        return self.of(self.parameter.data) if self.rounds and self.parameter.is_contiguous() else None

    def put(self) -> None:
        """The master's values are in the parameter after this, and its gradient is forgotten."""
        weight = self.parameter.data
        if not self.is_copy:
            assert self.of(weight).data_ptr() == self.master.data_ptr(), "the parameter has moved since"
        elif self._is_whole or weight.is_contiguous():
            if self.rounded is None:
                self.of(weight).copy_(self.master)
        else:  # there is no view of the piece, such as where vLLM holds the transpose
            row = weight.contiguous()
            self.of(row).copy_(self.master)
            weight.copy_(row)
        if self.master is not self.parameter:
            self.master.grad = None


class Optimizer:
    """Trains the parameters of a policy; weights decay in matrices only, not in norms and biases.

    Args:
        parameters: tensors in training; with `num_members`, members are their dimension 0.
        config: AdamW and schedule.
        num_steps: T, for the schedule.
        num_members: M of a LoRA ensemble, or None for full fine-tuning.
        ranks: with several, each keeps the moments of a piece of every tensor.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        config: OptimConfig,
        *,
        num_steps: int,
        num_members: int | None,
        ranks: Ranks | None = None,
    ):
        self._parameters, self._config, self._ranks = parameters, config, ranks or Ranks()
        self._num_steps, self._num_members = num_steps, num_members
        self._bounds = [cut(p.numel(), self._ranks.size) for p in parameters]
        self._pieces = [
            _Piece(p, bounds, self._ranks.rank, offload=config.offload)
            for p, bounds in zip(parameters, self._bounds, strict=True)
        ]
        options = {
            "lr": 0.0,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        # PyTorch's form steps many tensors in a launch, but only on gradients of their own type
        alone = [config.states == "8bit" or piece.rounds for piece in self._pieces]
        groups: dict[bool, list[dict[str, Any]]] = {
            is_alone: [{"params": []}, {"params": [], "weight_decay": 0.0}] for is_alone in (True, False)
        }
        for piece, is_alone in zip(self._pieces, alone, strict=True):
            num_dims = piece.parameter.dim() - bool(num_members)
            groups[is_alone][num_dims < 2]["params"].append(piece.master)
        self._one_pass = OnePassAdamW(groups[True], states=config.states, **options)
        self._fused: Any = torch.optim.AdamW(groups[False], fused=True, **options)
        self._adamws = [self._one_pass if is_alone else self._fused for is_alone in alone]

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of moments and masters on `device`, whether they are there already or come with the first step."""
        own = [p for p in self._pieces if p.master.device == device]
        num_copied = sum(p.master.numel() for p in own if p.is_copy)
        return state_bytes(self._config, sum(p.master.numel() for p in own), num_copied)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients on the device of the weights: as they come, or as they are applied if that is more."""
        width = 0 if self._config.offload else 4
        return sum(
            p.parameter.nbytes if p.rounds else max(width * p.master.numel(), p.parameter.nbytes) for p in self._pieces
        )

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
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if not grads:
            return torch.zeros(()), torch.ones((), dtype=torch.bool)
        norms, stepped_on = self._norms(grads), self._pieces[0].master.device
        del grads  # each goes as soon as it is taken
        mean = norms.mean()
        finite = mean.isfinite() if loss is None else mean.isfinite() & loss.isfinite()
        scale = grad_scale = None
        if self._num_members:
            scale = (self._config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        else:
            grad_scale = ((norms + 1e-6) / self._config.max_grad_norm).clamp(min=1.0)[0].to(stepped_on)
        found_inf = (~finite).float().to(stepped_on)
        for adamw in (self._one_pass, self._fused):
            # both divide by grad_scale and leave everything as it is where found_inf is 1
            adamw.grad_scale, adamw.found_inf = grad_scale, found_inf
            for group in adamw.param_groups:
                group["lr"] = learning_rate(self._config, step, self._num_steps)
        self._apply(scale)
        self._ranks.exchange_([p.data for p in self._parameters], self._bounds)
        return mean, finite

    def release_gradients(self) -> None:
        """Frees the gradients: what comes between two steps needs their memory."""
        for parameter in self._parameters:
            parameter.grad = None

    def _apply(self, scale: Tensor | None) -> None:
        """A step of all pieces, which takes the gradients with it."""
        moved = []
        for piece, adamw in zip(self._pieces, self._adamws, strict=True):
            grad = piece.take_gradient(scale)
            if adamw is self._fused:
                piece.master.grad = grad
            elif grad is not None:
                moved.append((piece.master, grad, piece.rounded))
        self._one_pass.step_on(moved)
        self._fused.step()
        for piece in self._pieces:
            piece.put()

    def _norms(self, grads: list[Tensor]) -> Tensor:
        """[M] float32, or [1] for full fine-tuning."""
        if self._num_members:
            parts = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float32) for g in grads]
            return torch.stack(parts).square().sum(0).sqrt()
        return torch.linalg.vector_norm(torch.stack([_norm(g) for g in grads])).view(1)

    @torch.no_grad()
    def exact_weights(self) -> Iterator[Tensor]:
        """Of every parameter in turn a copy on the host, float32, that was not rounded to its type; by all ranks."""
        for piece, bounds in zip(self._pieces, self._bounds, strict=True):
            whole = piece.parameter.detach()
            if piece.is_copy:
                whole = torch.empty_like(whole, dtype=torch.float32, memory_format=torch.contiguous_format)
                piece.of(whole).copy_(piece.master)
                self._ranks.exchange_([whole], [bounds])
            yield whole.to("cpu", copy=not piece.is_copy).contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and masters of this rank's pieces, by the number of their parameter."""
        out: dict[str, Tensor] = {}
        for i, (piece, adamw) in enumerate(zip(self._pieces, self._adamws, strict=True)):
            out |= {f"{i}.{k}": v.detach().contiguous() for k, v in adamw.state[piece.master].items()}
            if piece.is_copy:
                out[f"{i}.master"] = piece.master.detach().contiguous()
        return out

    @torch.no_grad()
    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes back the `state_dict` of every rank, of however many there were."""
        for i, (piece, adamw) in enumerate(zip(self._pieces, self._adamws, strict=True)):
            master, own = piece.master, {}
            for name in [k.partition(".")[2] for k in states[0] if k.partition(".")[0] == str(i)]:
                values = piece.found_in([state[f"{i}.{name}"] for state in states], name)
                own[name] = values.to(master.device, copy=True)
            if piece.is_copy:
                master.copy_(own.pop("master"))
            if own:
                adamw.state[master] = own


def _norm(grad: Tensor) -> Tensor:
    """[] float32; PyTorch makes a float32 copy of a narrow tensor on a CPU, so it gets a cut of it at a time there."""
    if grad.device.type != "cpu" or grad.dtype == torch.float32 or grad.numel() <= NORM_CUT:
        return torch.linalg.vector_norm(grad, dtype=torch.float32)
    cuts = grad.reshape(-1).split(NORM_CUT)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(cut, dtype=torch.float32) for cut in cuts]))
