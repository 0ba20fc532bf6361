"""A step of AdamW in `bench kernels`: R rows of H weights in float32.

"eager" is PyTorch's fused AdamW with moments of float32, which moves 28 bytes a weight; the others keep moments of 8
bits and move 16. Every implementation steps weights of its own. What is compared with float64 is the first step, which
is the same for all: no moment has been rounded by then.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from bpo_fast_kernels import adamw_8bit_
from bpo_fast_kernels.adamw_8bit import AdamW, new_state
from torch import nn

from bpo_fast_bench.kernels_impls import Implementation, Outcome
from bpo_fast_bench.kernels_trunk import TrunkProblem

# a step as large as the weights: a wrong one is seen
FORM = AdamW(lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
OPTIONS = {"lr": FORM.lr, "betas": FORM.betas, "eps": FORM.eps, "weight_decay": FORM.weight_decay}
BYTES = 16  # a weight, at least: gradient in, weight and two codes in and out
PEERS = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}


@dataclass(frozen=True)
class AdamwProblem(TrunkProblem):
    """So many rows of so many weights."""

    def min_bytes(self, dtype: torch.dtype) -> float:
        """The least that a step with moments of 8 bits must move."""
        return float(BYTES * self.rows * self.width)


@dataclass(frozen=True)
class AdamwInputs:
    """One input set.

    Attributes:
        weight, grad: [R, H] float32.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    _own: dict[str, tuple[nn.Parameter, Callable[[], object]]] = field(default_factory=dict)

    def step(self, name: str, make: Callable[[nn.Parameter], Callable[[], object]]) -> Outcome:
        """A step by an implementation, of weights that its first call copies."""
        if name not in self._own:
            weight = nn.Parameter(self.weight.clone())
            weight.grad = self.grad
            self._own[name] = weight, make(weight)
        weight, step = self._own[name]
        step()
        return Outcome(weight.detach())


def adamw_inputs(problem: AdamwProblem, device: torch.device, sets: int) -> list[AdamwInputs]:
    """Input sets with fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, problem.rows, problem.width)
    return [AdamwInputs(*torch.randn(shape, generator=generator).to(device)) for _ in range(sets)]


def adamw_answer(inputs: AdamwInputs) -> Outcome:
    """The first step in float64."""
    weight, grad = inputs.weight.double(), inputs.grad.double()
    return Outcome(weight * (1 - FORM.lr * FORM.weight_decay) - FORM.lr * grad / (grad.abs() + FORM.eps))


def adamw_implementations(device: torch.device, peers: bool) -> dict[str, Implementation]:
    """PyTorch's, ours, and with `peers` those that are here: torchao's compiled one, bitsandbytes' on a GPU."""

    def ours(backend: str) -> Implementation:
        def make(weight: nn.Parameter) -> Callable[[], object]:
            state = new_state(weight)
            return lambda: adamw_8bit_(weight.data, weight.grad, state, FORM, backend=backend)

        return lambda inputs: inputs.step(backend, make)

    def eager(weight: nn.Parameter) -> Callable[[], object]:
        return torch.optim.AdamW([weight], fused=True, **OPTIONS).step

    def peer(name: str) -> Implementation:
        def make(weight: nn.Parameter) -> Callable[[], object]:
            return importlib.import_module(PEERS[name]).AdamW8bit([weight], **OPTIONS).step

        return lambda inputs: inputs.step(name, make)

    calls: dict[str, Implementation] = {"eager": lambda inputs: inputs.step("eager", eager)}
    for backend in ("triton",) if device.type == "cuda" else ("native", "torch"):
        calls[backend] = ours(backend)
    known = ("torchao", "bitsandbytes") if device.type == "cuda" else ("torchao",)
    for name in known if peers else ():
        if importlib.util.find_spec(name) is not None:
            calls[name] = peer(name)
    return calls
