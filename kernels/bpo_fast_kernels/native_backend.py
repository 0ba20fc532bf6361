"""The CPU backend on csrc/: logits become E in cache, both cores, no [T, V] array unless E is asked for."""

import torch

from bpo_fast_kernels.build import cxx_command, load_library
from bpo_fast_kernels.rows import Head, Kept, RowStats
from bpo_fast_kernels.torch_backend import sum_sequences


class NativeBackend:
    """Implements `rows.Backend` on the CPU; a row's numbers do not depend on the rows beside it."""

    name = "native"
    # Small chunks of pairs keep E near the caches: 256 rows of a vocabulary of 32,000.
    chunk_bytes = 33_000_000

    def __init__(self) -> None:
        load_library("ops_cpu.cpp", tuple(cxx_command()), ("torch_cpu", "torch"))
        self.ops = torch.ops.bpo_fast_cpu
        self.lanes, self.tile_rows = self.ops.panel_lanes(), self.ops.tile_rows()

    def _score(self, hidden, targets, head: Head, unit_dx, e) -> RowStats:
        stats = torch.empty(4, len(hidden))
        hidden, weight = hidden.detach().contiguous(), head.weight.detach().contiguous()
        self.ops.score(hidden, weight, targets.contiguous(), head.scale, head.softcap or 0.0, stats, unit_dx, e)
        return RowStats(*stats.unbind())

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> RowStats:
        """2THV."""
        return self._score(hidden, targets, head, None, None)

    def score_dx(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[RowStats, torch.Tensor]:
        """4THV."""
        unit_dx = torch.empty(hidden.shape)
        return self._score(hidden, targets, head, unit_dx, None), unit_dx

    def score_keep(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head, with_dx: bool) -> Kept:
        """2THV, or 4THV with d logp / d hidden formed while E is in cache."""
        e = torch.empty(self._panels(len(hidden)), self._padded(head), self.lanes)
        unit_dx = torch.empty(hidden.shape) if with_dx else None
        return Kept(e, self._score(hidden, targets, head, unit_dx, e), unit_dx)

    def kept_dx(self, kept: Kept, coefs: torch.Tensor, head: Head) -> torch.Tensor:
        """A scaling, or 2THV that skips panels whose coefficients are all 0."""
        if kept.unit_dx is not None:
            return kept.unit_dx * coefs[:, None]
        dx = torch.empty(len(coefs), head.weight.shape[1])
        self.ops.kept_dx(kept.e, head.weight.detach().contiguous(), self._factor(kept.stats, coefs, head), dx)
        return dx

    def kept_dw_(self, dw: torch.Tensor, kept: Kept, coefs: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
        """2THV; skips panels whose coefficients are all 0."""
        self.ops.kept_dw(kept.e, hidden.detach().contiguous(), self._factor(kept.stats, coefs, head), dw)

    def recompute_dw_(
        self,
        dw: torch.Tensor,
        stats: RowStats,
        coefs: torch.Tensor,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
    ) -> None:
        """4THV."""
        hidden, weight = hidden.detach().contiguous(), head.weight.detach().contiguous()
        factor, shift = self._factor(stats, coefs, head), stats.shift.contiguous()
        softcap, push = head.softcap or 0.0, (stats.miss * coefs).mul_(head.scale)
        self.ops.recompute_dw(hidden, weight, targets.contiguous(), head.scale, softcap, shift, factor, push, dw)

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """Whole panels of float32."""
        return self._panels(num_rows) * self._padded(head) * self.lanes * 4

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Row-by-row sums in float64."""
        return sum_sequences(token_values, cu_seqlens)

    def _factor(self, stats: RowStats, coefs: torch.Tensor, head: Head) -> torch.Tensor:
        return (stats.inv_sum * coefs).mul_(-head.scale)

    def _panels(self, num_rows: int) -> int:
        return -(-num_rows // self.lanes)

    def _padded(self, head: Head) -> int:
        return -(-len(head.weight) // self.tile_rows) * self.tile_rows
