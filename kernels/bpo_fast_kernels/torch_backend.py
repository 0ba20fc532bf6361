"""The plain PyTorch backend: library GEMMs by tile with float32 output, and the tile pass as tensor operations.

Also the frame of the Triton backend, which replaces the tile pass. A tile is at most `TILE_ROWS` x `TILE_COLS` logits
and every pass cuts rows and vocabulary at the same places, so that all modes give the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bpo_fast_kernels.rows import Head, Kept, RowStats

TILE_ROWS = 4096
TILE_COLS = 4096
# exp(z - shift) stays below e^60 and the products E @ W far below the float32 limit.
SHIFT_SLACK = 60.0


@dataclass
class Sweep:
    """What a row block carries from one vocabulary tile to the next."""

    targets: torch.Tensor
    target_logits: torch.Tensor
    target_slope: torch.Tensor
    shift: torch.Tensor
    miss_sum: torch.Tensor


def mm_f32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def capped(z: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled logits and d cap / d z, from raw products."""
    if head.softcap is None:
        return z.mul_(head.scale), None
    tanh = z.div_(head.softcap).tanh_()
    return tanh * (head.softcap * head.scale), 1.0 - tanh.square()


def finish(sweep: Sweep) -> RowStats:
    """Statistics of finished rows; log1p keeps the log-prob of a target with p near 1."""
    gap = sweep.target_logits - sweep.shift
    total = sweep.miss_sum + gap.exp()
    logps = gap - torch.log1p(sweep.miss_sum + torch.expm1(gap))
    return RowStats(token_logps=logps, shift=sweep.shift, inv_sum=1.0 / total, miss=sweep.miss_sum / total)


def join(parts: list[RowStats]) -> RowStats:
    """Statistics of consecutive row blocks as one."""
    if len(parts) == 1:
        return parts[0]
    fields = ("token_logps", "shift", "inv_sum", "miss")
    return RowStats(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def sum_sequences(token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[T] -> [N]: sums in float64, rounded once; sequential on the CPU."""
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=token_values.device)
    owner = torch.repeat_interleave(numbers, lengths, output_size=len(token_values))
    sums = token_values.new_zeros(len(lengths), dtype=torch.float64)
    return sums.index_add_(0, owner, token_values.double()).float()


class TorchBackend:
    """Implements `rows.Backend` with tensor operations on any device."""

    name = "torch"
    # E of 4,096 rows and a vocabulary of 128k in bfloat16.
    chunk_bytes = 1_074_000_000

    def work_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Type of E: bfloat16 only where the GEMMs run in it; float16 could not hold E."""
        return torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else torch.float32

    def blocks(self, num_rows: int) -> Iterator[slice]:
        """Row blocks; an empty batch has one empty block."""
        for start in range(0, max(num_rows, 1), TILE_ROWS):
            yield slice(start, min(start + TILE_ROWS, num_rows))

    def columns(self, vocab: int) -> Iterator[slice]:
        """Vocabulary tiles."""
        for start in range(0, vocab, TILE_COLS):
            yield slice(start, min(start + TILE_COLS, vocab))

    def start(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> Sweep:
        """Target logits of a row block, and sums at zero."""
        raw = (hidden.float() * head.weight[targets].float()).sum(1)
        logits, slope = capped(raw, head)
        slope = torch.ones_like(logits) if slope is None else slope
        return Sweep(targets, logits, slope, logits.clone(), torch.zeros_like(logits))

    def exp_tile(self, z: torch.Tensor, sweep: Sweep, cols: slice, head: Head, dtype: torch.dtype):
        """Turn raw products into E (zero at the target), add the row sums, raise the shift where exp would overflow.

        Returns E and the factor by which what was summed before must shrink.
        """
        z, slope = capped(z, head)
        local = sweep.targets - cols.start
        z.masked_fill_(torch.arange(z.shape[1], device=z.device) == local[:, None], -torch.inf)
        top = z.amax(1)
        shift = torch.where(top > sweep.shift + SHIFT_SLACK, top, sweep.shift)
        factor = (sweep.shift - shift).exp()
        e = z.sub_(shift[:, None]).exp_()
        sweep.miss_sum = sweep.miss_sum * factor + e.sum(1)
        sweep.shift = shift
        return (e if slope is None else e * slope).to(dtype), factor

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> RowStats:
        """2THV."""
        parts = []
        for rows in self.blocks(len(hidden)):
            x, sweep = hidden[rows], self.start(hidden[rows], targets[rows], head)
            for cols in self.columns(len(head.weight)):
                self.exp_tile(mm_f32(x, head.weight[cols].T), sweep, cols, head, torch.float32)
            parts.append(finish(sweep))
        return join(parts)

    def score_dx(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[RowStats, torch.Tensor]:
        """4THV: dX needs no coefficients, so it is summed tile by tile and E is never kept."""
        parts, unit_dx = [], torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        dtype = self.work_dtype(hidden)
        for rows in self.blocks(len(hidden)):
            x, sweep = hidden[rows], self.start(hidden[rows], targets[rows], head)
            pull = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for cols in self.columns(len(head.weight)):
                tile = head.weight[cols]
                e, factor = self.exp_tile(mm_f32(x, tile.T), sweep, cols, head, dtype)
                pull.mul_(factor[:, None]).add_(mm_f32(e, tile.to(dtype)))
            stats = finish(sweep)
            push = (stats.miss * sweep.target_slope)[:, None] * head.weight[targets[rows]].float()
            unit_dx[rows] = (push - pull * stats.inv_sum[:, None]) * head.scale
            parts.append(stats)
        return join(parts), unit_dx

    def score_keep(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head, with_dx: bool) -> Kept:
        """2THV, E kept as [T, V]; dX is one large GEMM later, whatever `with_dx` says."""
        dtype, parts = self.work_dtype(hidden), []
        kept = torch.empty(len(hidden), len(head.weight), dtype=dtype, device=hidden.device)
        for rows in self.blocks(len(hidden)):
            x, sweep, shifts = hidden[rows], self.start(hidden[rows], targets[rows], head), []
            for cols in self.columns(len(head.weight)):
                kept[rows, cols], _ = self.exp_tile(mm_f32(x, head.weight[cols].T), sweep, cols, head, dtype)
                shifts.append(sweep.shift)
            for cols, shift in zip(self.columns(len(head.weight)), shifts, strict=True):
                kept[rows, cols] *= (shift - sweep.shift).exp()[:, None].to(dtype)
            kept[rows].scatter_(1, targets[rows, None], -(sweep.miss_sum * sweep.target_slope)[:, None].to(dtype))
            parts.append(finish(sweep))
        return Kept(kept, join(parts))

    def kept_dx(self, kept: Kept, coefs: torch.Tensor, head: Head) -> torch.Tensor:
        """2THV."""
        row = (-head.scale * coefs * kept.stats.inv_sum)[:, None]
        return mm_f32(kept.e, head.weight.to(kept.e.dtype)) * row

    def kept_dw_(self, dw: torch.Tensor, kept: Kept, coefs: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
        """2THV."""
        row = (-head.scale * coefs * kept.stats.inv_sum)[:, None]
        scaled = (hidden.float() * row).to(kept.e.dtype)
        for cols in self.columns(len(head.weight)):
            dw[cols] += mm_f32(kept.e[:, cols].T, scaled)

    def recompute_dw_(
        self,
        dw: torch.Tensor,
        stats: RowStats,
        coefs: torch.Tensor,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
    ) -> None:
        """4THV: logits again by tile, E from the shift that the forward pass settled on."""
        dtype = self.work_dtype(hidden)
        for rows in self.blocks(len(hidden)):
            x, sweep = hidden[rows], self.start(hidden[rows], targets[rows], head)
            sweep.shift = stats.shift[rows].clone()
            scaled = x.float() * (-head.scale * coefs[rows] * stats.inv_sum[rows])[:, None]
            for cols in self.columns(len(head.weight)):
                e, _ = self.exp_tile(mm_f32(x, head.weight[cols].T), sweep, cols, head, dtype)
                dw[cols] += mm_f32(e.T, scaled.to(dtype))
            push = (head.scale * coefs[rows] * stats.miss[rows] * sweep.target_slope)[:, None]
            dw.index_add_(0, targets[rows], x.float() * push)

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """E in its working type."""
        return num_rows * len(head.weight) * (2 if self.work_dtype(head.weight) == torch.bfloat16 else 4)

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Row-by-row sums in float64."""
        return sum_sequences(token_values, cu_seqlens)
