"""Inverse transform: the index on which a number in [0, 1) falls."""

import torch
import torch.nn.functional as F

# indices whose masses are summed first: a draw finds the block, then the index in it, and never sums a row in float64
BLOCK = 128
# Scores that are looked at together. On a CPU 4 MiB: temporaries of that size stay near the cores.
CPU_SCORES, GPU_SCORES = 2**20, 2**26


def cuts(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Runs of rows of so many scores that are drawn from together; at least one, which may be empty."""
    size = max(1, (CPU_SCORES if device.type == "cpu" else GPU_SCORES) // width)
    return [slice(start, start + size) for start in range(0, max(num_rows, 1), size)]


def draw(masses: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws an index for each row by inverse transform.

    Args:
        masses: [B, V] float32. what the chance of an index is proportional to, not negative and not all 0.
        uniforms: [B] float64. in [0, 1).

    Returns:
        [B] int64. indices of positive mass; any index where a mass is NaN.
    """
    missing = -masses.shape[1] % BLOCK
    blocks = (F.pad(masses, (0, missing)) if missing else masses).unflatten(1, (-1, BLOCK))
    block, rest = invert(blocks.sum(-1), uniforms)
    inside, _ = invert(blocks[torch.arange(len(masses), device=masses.device), block], rest)
    return (block * BLOCK + inside).clamp_max(masses.shape[1] - 1)


def invert(masses: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] index that a number in [0, 1) falls on; [B] float64. where in that index's share it does, about [0, 1])."""
    cumulative = masses.double().cumsum(-1)
    total = cumulative[:, -1:]
    # at least 0 and strictly below the total, so that right=True always lands on a positive mass
    target = torch.minimum(uniforms[:, None].clamp_min(0.0) * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp_max(masses.shape[1] - 1)  # NaN is past the end
    mass = masses.gather(1, index).double()
    below = cumulative.gather(1, index) - mass
    return index.squeeze(1), ((target - below) / mass).squeeze(1)
