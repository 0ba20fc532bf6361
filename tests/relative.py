"""How far tensors are from what they should be."""

from collections.abc import Iterable

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected number; against exact zeros, the difference itself."""
    assert found.shape == expected.shape
    wanted = expected.detach().double()
    scale = float(wanted.abs().max()) or 1.0
    return float((found.detach().double() - wanted).abs().max()) / scale


def worst_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The greatest `relative_error` of tensors one by one."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
