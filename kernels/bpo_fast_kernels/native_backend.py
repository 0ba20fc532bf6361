"""The CPU backend on csrc/: logits become E in cache, both cores, no [T, V] array unless E is asked for."""

import torch

from bpo_fast_kernels.build import cxx_command, load_library
from bpo_fast_kernels.rows import Head, LossSpec, Rows, RowStats, Scored
from bpo_fast_kernels.torch_backend import pair_slopes, sum_sequences


class NativeBackend:
    """Implements `rows.Backend` on the CPU; a row's numbers do not depend on the rows beside it."""

    name = "native"
    # Small chunks of pairs keep E near the caches: 256 rows of a vocabulary of 32,000.
    chunk_bytes = 33_000_000

    def __init__(self) -> None:
        load_library("ops_cpu.cpp", tuple(cxx_command()), ("torch_cpu", "torch"))
        self.ops = torch.ops.bpo_fast_cpu
        self.lanes, self.tile_rows = self.ops.panel_lanes(), self.ops.tile_rows()

    def score(self, rows: Rows, *, dx: bool, keep: bool, behavior: Rows | None = None) -> Scored:
        """One sweep; dX is formed while E is in cache."""
        head, hidden = rows.head, rows.hidden.detach().contiguous()
        stats = torch.empty(4, len(hidden))
        unit_dx = torch.empty(hidden.shape) if dx else None
        e = torch.empty(self._panels(len(hidden)), self._padded(head), self.lanes) if keep else None
        weight, softcap = head.weight.detach().contiguous(), head.softcap or 0.0
        self.ops.score(hidden, weight, rows.targets.contiguous(), head.scale, softcap, stats, unit_dx, e)
        logps = None if behavior is None else self.score(behavior, dx=False, keep=False).stats.token_logps
        return Scored(RowStats(*stats.unbind()), unit_dx, e, logps)

    def kept_dx(self, scored: Scored, coefs: torch.Tensor, head: Head, *, zeros: bool) -> torch.Tensor:
        """2THV that skips panels whose coefficients are all 0."""
        dx = torch.empty(len(coefs), head.weight.shape[1])
        self.ops.kept_dx(scored.e, head.weight.detach().contiguous(), self._factor(scored.stats, coefs, head), dx)
        return dx

    def kept_dw_(self, dw: torch.Tensor, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> None:
        """2THV; skips panels whose coefficients are all 0."""
        factor = self._factor(scored.stats, coefs, rows.head)
        self.ops.kept_dw(scored.e, rows.hidden.detach().contiguous(), factor, dw)

    def recompute_dw_(self, dw: torch.Tensor, stats: RowStats, coefs: torch.Tensor, rows: Rows) -> None:
        """4THV."""
        head, targets, softcap = rows.head, rows.targets.contiguous(), rows.head.softcap or 0.0
        hidden, weight = rows.hidden.detach().contiguous(), head.weight.detach().contiguous()
        factor, push = self._factor(stats, coefs, head), (stats.miss * coefs).mul_(head.scale)
        self.ops.recompute_dw(hidden, weight, targets, head.scale, softcap, stats.shift, factor, push, dw)

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """Whole panels of float32."""
        return self._panels(num_rows) * self._padded(head) * self.lanes * 4

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Row-by-row sums in float64."""
        return sum_sequences(token_values, cu_seqlens)

    def pair_loss(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A handful of vector operations on P numbers: nothing for native code to win."""
        return pair_slopes(policy_logps, ref_logps, lengths, spec)

    def _factor(self, stats: RowStats, coefs: torch.Tensor, head: Head) -> torch.Tensor:
        return (stats.inv_sum * coefs).mul_(-head.scale)

    def _panels(self, num_rows: int) -> int:
        return -(-num_rows // self.lanes)

    def _padded(self, head: Head) -> int:
        return -(-len(head.weight) // self.tile_rows) * self.tile_rows
