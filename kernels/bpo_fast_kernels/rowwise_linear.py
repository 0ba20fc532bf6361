"""A linear layer whose rows do not depend on each other's company, for the few rows of a decoding step."""

from typing import Any

import torch
import torch.nn.functional as F

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import NATIVE_FLOATS, require


def rowwise_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The naive twin of `rowwise_linear`; float64 stays float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def rowwise_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, natively on the CPU.

    A number is summed in the same order in any batch: a row's bits do not depend on how many rows there are, on which,
    or on the threads. Libraries pack the weight for every product, which takes as long as a product of 64 rows; here it
    is read where it stands. No gradients.

    Args:
        x: [..., K] float32 or bfloat16.
        weight: [N, K] of the same type.
        bias: [N] of the same type, or None.

    Returns:
        [..., N] float32.

    Raises:
        ValueError: a wrong shape, dtype or device, or native code cannot be built here.

    Promise: within 1e-6 of the largest number of the result of float64 on the same inputs; 5e-6 where all products have
    one sign, as sums of so many equal numbers round one way. Where the processor multiplies pairs of bfloat16, numbers
    of x and weight below 1e-38 count as 0.
    """
    if not _fits(x, weight, bias):
        _say_why(x, weight, bias)
    native: Any = pick_backend("native", x.device)
    num_out, width = weight.shape
    rows = x.detach().reshape(-1, width).contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    out = rows.new_empty(len(rows), num_out, dtype=torch.float32)
    # on top of what stays: its memory is free again
    panels = rows.new_empty(native.padded_rows(len(rows)), width, dtype=torch.float32)
    native.ops.linear(rows, weight.detach().contiguous(), bias, panels, out)
    return out.view(*x.shape[:-1], num_out)


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `_say_why` says nothing: its messages take longer to make than a small product."""
    good = x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and x.dtype in NATIVE_FLOATS
    good = good and x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] > 0
    return good and (bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.shape == weight.shape[:1]))


def _say_why(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    require(x.dtype in NATIVE_FLOATS, "x.dtype", x.dtype, "expected torch.float32 or torch.bfloat16")
    require(x.dim() > 0, "x.shape", list(x.shape), "expected rows")
    require(weight.dim() == 2, "weight.shape", list(weight.shape), "expected [N, K]")
    num_out, width = weight.shape
    require(width > 0, "weight.shape", [num_out, width], "expected one column at least")
    shapes = [("x", x, [*x.shape[:-1], width]), ("weight", weight, [num_out, width])]
    for name, tensor, shape in shapes if bias is None else [*shapes, ("bias", bias, [num_out])]:
        require(list(tensor.shape) == shape, f"{name}.shape", list(tensor.shape), f"expected {shape}")
        require(tensor.dtype == x.dtype, f"{name}.dtype", tensor.dtype, f"expected {x.dtype}")
        require(tensor.device.type == "cpu", f"{name}.device", tensor.device, "expected cpu")
