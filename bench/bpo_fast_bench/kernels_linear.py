"""Linear layers of a decoding step in `bench kernels`: a few rows, forward, on a CPU.

"eager" is F.linear; "swapped" the same product of PyTorch with its operands in the other order, whose result lies by
columns and is brought into rows; "native" is `rowwise_linear`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from bpo_fast_kernels import rowwise_linear

from bpo_fast_bench.kernels_impls import Implementation, Outcome

WEIGHTS = 6  # a call takes one after the other, as a trunk does: large ones come from memory


@dataclass(frozen=True)
class LinearProblem:
    """One question for every implementation: so many rows by `WEIGHTS` layers of one shape."""

    rows: int
    width: int
    num_out: int
    op: str = field(default="linear", kw_only=True)

    def min_flop(self) -> float:
        """One product a layer."""
        return 2.0 * self.rows * self.width * self.num_out * WEIGHTS

    def label(self) -> str:
        """A short name for tables and plots."""
        return f"linear R={self.rows} {self.width}->{self.num_out}"


@dataclass(frozen=True)
class LinearInputs:
    """One input set: [R, K] and `WEIGHTS` times [N, K]."""

    x: torch.Tensor
    weights: tuple[torch.Tensor, ...]


def linear_inputs(problem: LinearProblem, sets: int) -> list[LinearInputs]:
    """Input sets with fixed seeds; outputs have a size of about one."""
    generator, out = torch.Generator().manual_seed(0), []
    for _ in range(sets):
        x = torch.randn(problem.rows, problem.width, generator=generator)
        shape = (WEIGHTS, problem.num_out, problem.width)
        out.append(LinearInputs(x, (torch.randn(shape, generator=generator) / problem.width**0.5).unbind()))
    return out


def linear_answer(inputs: LinearInputs) -> Outcome:
    """float64 on the very same inputs, of the last layer."""
    return Outcome(F.linear(inputs.x.double(), inputs.weights[-1].double()))


def linear_implementations() -> dict[str, Implementation]:
    """PyTorch in both orders, and ours."""
    return {"eager": _each(F.linear), "swapped": _each(_swapped), "native": _each(rowwise_linear)}


def _swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight @ x.T).T.contiguous()


def _each(function) -> Implementation:
    return lambda inputs: Outcome([function(inputs.x, w) for w in inputs.weights][-1])
