"""A step of AdamW in `bench kernels`: R rows of H weights.

Of float32 weights "eager" is PyTorch's fused AdamW with moments of float32, which moves 28 bytes a weight; the others
keep moments of 8 bits and move 16. Of narrow weights "eager" is that step with what it takes there, 40 bytes in all: a
float32 copy of the gradient before and a narrow one of the float32 master after it; ours move 28 in a pass with moments
of float32, and 16 with those of 8 bits (":8bit"). Every implementation steps weights of its own. What is compared with
float64 is the first step, which is the same for all: no moment has been rounded by then.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from bpo_fast_kernels.adamw import AdamW, Stepped, adamw_
from bpo_fast_kernels.adamw_moments import new_state
from bpo_fast_kernels.checks import NATIVE_FLOATS
from torch import nn

from bpo_fast_bench.kernels_impls import Implementation, Outcome
from bpo_fast_bench.kernels_trunk import TrunkProblem

# a step as large as the weights: a wrong one is seen
FORM = AdamW(lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
OPTIONS = {"lr": FORM.lr, "betas": FORM.betas, "eps": FORM.eps, "weight_decay": FORM.weight_decay}
BYTES = 16  # a weight, at least: gradient in, weight and two codes in and out, and a narrow weight's gradient and copy
STATES = {"": "float32", ":8bit": "8bit"}
PEERS = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}
Step = Callable[[], object]
Maker = Callable[[torch.Tensor, torch.Tensor], Step]  # of (weights of its own, their gradient)


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
        weight, grad: [R, H] float32, bfloat16 or float16.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    _own: dict[str, tuple[torch.Tensor, Step]] = field(default_factory=dict, kw_only=True)

    def step(self, name: str, make: Maker) -> Outcome:
        """A step by an implementation, which its first call makes."""
        if name not in self._own:
            weight = self.weight.clone()
            self._own[name] = weight, make(weight, self.grad)
        weight, step = self._own[name]
        step()
        return Outcome(weight)


def adamw_inputs(problem: AdamwProblem, device: torch.device, dtype: torch.dtype, sets: int) -> list[AdamwInputs]:
    """Input sets with fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, problem.rows, problem.width)
    return [AdamwInputs(*torch.randn(shape, generator=generator).to(device, dtype)) for _ in range(sets)]


def adamw_answer(inputs: AdamwInputs) -> Outcome:
    """The first step in float64."""
    weight, grad = inputs.weight.double(), inputs.grad.double()
    return Outcome(weight * (1 - FORM.lr * FORM.weight_decay) - FORM.lr * grad / (grad.abs() + FORM.eps))


def adamw_implementations(like: AdamwInputs, peers: bool) -> dict[str, Implementation]:
    """PyTorch's, ours, and with `peers` those that are here: torchao's compiled one, bitsandbytes' on a GPU."""
    on_gpu, dtype = like.weight.is_cuda, like.weight.dtype
    wide = dtype == torch.float32
    makers: dict[str, Maker] = {"eager": _eager}
    for backend in ("triton",) if on_gpu else ("native", "torch"):
        if backend == "native" and dtype not in NATIVE_FLOATS:
            continue
        for end in (":8bit",) if wide else STATES:
            makers[backend if wide else backend + end] = _ours(backend, end)
    known = ("torchao", "bitsandbytes") if on_gpu else ("torchao",)
    for name in known if peers and wide else ():  # of narrow weights they keep no masters
        if importlib.util.find_spec(name) is not None:
            makers[name] = _peer(name)

    def call(name: str) -> Implementation:
        return lambda inputs: inputs.step(name, makers[name])

    return {name: call(name) for name in makers}


def _eager(weight: torch.Tensor, grad: torch.Tensor) -> Step:
    master = nn.Parameter(weight.float())  # themselves where they are float32
    step = torch.optim.AdamW([master], fused=True, **OPTIONS).step
    if weight.dtype == torch.float32:
        master.grad = grad
        return step

    def around() -> None:
        master.grad = grad.float()
        step()
        weight.copy_(master.detach())
        master.grad = None

    return around


def _ours(backend: str, end: str) -> Callable[[torch.Tensor, torch.Tensor], Step]:
    def make(weight: torch.Tensor, grad: torch.Tensor) -> Step:
        master = weight.float()
        stepped = Stepped(master, grad, new_state(master, STATES[end]), None if master is weight else weight)
        return lambda: adamw_([stepped], FORM, backend=backend)

    return make


def _peer(name: str) -> Callable[[torch.Tensor, torch.Tensor], Step]:
    def make(weight: torch.Tensor, grad: torch.Tensor) -> Step:
        parameter = nn.Parameter(weight)
        parameter.grad = grad
        return importlib.import_module(PEERS[name]).AdamW8bit([parameter], **OPTIONS).step

    return make
