"""Norms and gates in `bench kernels`: R rows of H numbers, forward and backward.

"eager" is what layers of transformers write out (LlamaRMSNorm, the activation of LlamaMLP), "native" and "triton" are
`rms_norm` and `gated`. Liger's functions write gradients where their inputs were, so they get copies of them, and
their extra memory can be below zero.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from bpo_fast_kernels import gated, rms_norm
from bpo_fast_kernels.checks import NATIVE_FLOATS
from bpo_fast_kernels.trunk import gated_reference, rms_norm_reference

from bpo_fast_bench.kernels_impls import Implementation, Outcome, both_ways
from bpo_fast_bench.kernels_peers import importable

EPS = 1e-6
GRADS = {"norm": ("dx", "dw"), "gate": ("dgate", "dup")}
PASSES = {"norm": 5, "gate": 8}  # tensors read or written, at least: what comes in, out and back


@dataclass(frozen=True)
class TrunkProblem:
    """One question for every implementation: "norm" or "gate" of so many rows of so many numbers."""

    op: str
    rows: int
    width: int

    def min_bytes(self, dtype: torch.dtype) -> float:
        """The least any implementation must move."""
        return float(PASSES[self.op] * self.rows * self.width * dtype.itemsize)

    def label(self) -> str:
        """A short name for tables and plots."""
        return f"{self.op} R={self.rows} H={self.width}"


@dataclass(frozen=True)
class TrunkInputs:
    """One input set.

    Attributes:
        leaves: [R, H] x and [H] weight of a norm, [R, H] gate and up of a gate.
        weights: [R, H] the gradient of the output.
    """

    leaves: tuple[torch.Tensor, ...]
    weights: torch.Tensor

    @cached_property
    def copies(self) -> "TrunkInputs":
        """For who writes into them; made by the first call, which no time counts."""
        leaves = tuple(x.detach().clone().requires_grad_() for x in self.leaves)
        return TrunkInputs(leaves, self.weights.clone())


def trunk_inputs(problem: TrunkProblem, device: torch.device, dtype: torch.dtype, sets: int) -> list[TrunkInputs]:
    """Input sets with fixed seeds; weights of a norm lie around one."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(sets):
        one, other, weights = torch.randn(3, problem.rows, problem.width, generator=generator)
        other = 1 + other[0] / 4 if problem.op == "norm" else other
        leaves = (x.to(device, dtype).requires_grad_() for x in (one, other))
        out.append(TrunkInputs(tuple(leaves), weights.to(device, dtype)))
    return out


def trunk_answer(problem: TrunkProblem, inputs: TrunkInputs) -> Outcome:
    """float64 on the very same inputs."""
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    return both_ways(_eager(problem), leaves, inputs.weights.double(), GRADS[problem.op])


def trunk_implementations(
    problem: TrunkProblem, inputs: TrunkInputs, peers: tuple[str, ...]
) -> dict[str, Implementation]:
    """The layers of transformers, ours where such inputs have kernels, and the peers that exist here."""
    like, eager = inputs.weights, _eager(problem)
    functions = {"eager": eager}
    if like.is_cuda:
        functions["triton"] = _ours(problem, "triton")
        if "compile" in peers:
            functions["compile"] = torch.compile(eager, dynamic=False)
    elif like.dtype in NATIVE_FLOATS:
        functions["native"] = _ours(problem, "native")
    calls = {name: _both_ways(problem, function) for name, function in functions.items()}
    if like.is_cuda and "liger" in peers and importable("liger"):
        over = _both_ways(problem, _liger(problem))
        calls["liger"] = lambda inputs: over(inputs.copies)
    return calls


Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _eager(problem: TrunkProblem) -> Function:
    return partial(rms_norm_reference, eps=EPS) if problem.op == "norm" else partial(gated_reference, activation="silu")


def _ours(problem: TrunkProblem, backend: str) -> Function:
    if problem.op == "norm":
        return partial(rms_norm, eps=EPS, backend=backend)
    return partial(gated, activation="silu", backend=backend)


def _liger(problem: TrunkProblem) -> Function:
    """As Liger's layers for Llama call them."""
    if problem.op == "norm":
        norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return lambda x, weight: norm.apply(x, weight, EPS)
    return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply


def _both_ways(problem: TrunkProblem, function: Function) -> Implementation:
    """Forward and backward."""
    return lambda inputs: both_ways(function, inputs.leaves, inputs.weights, GRADS[problem.op])
