"""The CPU backend on csrc/: logits become E in cache, both cores, no [T, V] array unless E is asked for."""

import math
import threading
from typing import Any

import torch

from bpo_fast_kernels.build import cxx_command, load_library
from bpo_fast_kernels.inverse import invert
from bpo_fast_kernels.rows import Head, LossSpec, Rows, RowStats, Scored, WeightSums, row_factors
from bpo_fast_kernels.torch_backend import pair_slopes, sum_sequences

# Sums of dW of bfloat16 inputs are rounded once a visit; past so many visits they are float32 until the end. Eight
# roundings on the way cost 0.0023 of the promised 0.004.
ROUNDED_VISITS = 8


class NativeBackend:
    """Implements `rows.Backend` on the CPU; a row's numbers do not depend on the rows beside it.

    Where the processor multiplies bfloat16 pairs (AVX512_BF16), bfloat16 inputs take that instruction for all products.
    float32 inputs are multiplied as float32, unless `torch.set_float32_matmul_precision("medium")` was asked for: then
    E, W and the hidden states are rounded to bfloat16 for dX and dW. Log-probs stay exact. Elsewhere everything is
    multiplied as float32.
    """

    name = "native"
    # 312 rows of a vocabulary of 32,000, or 625 in bfloat16: an eighth of what plain PyTorch takes for 1,024 rows.
    chunk_bytes = 40_000_000

    def __init__(self) -> None:
        self._kept = threading.local()
        load_library("ops_cpu.cpp", tuple(cxx_command()), ("torch_cpu", "torch"))
        self.ops = torch.ops.bpo_fast_cpu
        self.lanes, self.tile_rows, self.pairs = self.ops.panel_lanes(), self.ops.tile_rows(), self.ops.has_pairs()

    def narrow(self, dtype: torch.dtype) -> bool:
        """Whether gradients of such inputs are products of bfloat16."""
        medium = dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return self.pairs and (medium or dtype == torch.bfloat16)

    def score(
        self, rows: Rows, *, dx: bool, keep: bool, behavior: Rows | None = None, sums: WeightSums | None = None
    ) -> Scored:
        """One sweep; dX is formed while E is in cache. The first H rows of E are kept in an empty dW.

        Behavior rows are a sweep of their own: rows share nothing but the packed head, 1% of the work.
        """
        head, hidden = rows.head, rows.hidden.detach().contiguous()
        stats, narrow = torch.empty(4, len(hidden)), self.narrow(hidden.dtype)
        unit_dx = torch.empty(hidden.shape) if dx else None
        dtype, panels, inside = self._kept_dtype(narrow), self._panels(len(hidden)), None
        if keep and sums is not None and not sums.begun:
            free = self._free_panels(sums.total, dtype)
            panels, inside = max(panels - free, 0), sums.total if free else None
        e = self._room((panels, self._padded(head), self.lanes), dtype, lasting=sums is None) if keep else None
        weight, softcap = head.weight.detach().contiguous(), head.softcap or 0.0
        self.ops.score(
            hidden, weight, rows.targets.contiguous(), head.scale, softcap, narrow, stats, unit_dx, e, inside
        )
        logps = None if behavior is None else self.score(behavior, dx=False, keep=False).stats.token_logps
        return Scored(RowStats(*stats.unbind()), unit_dx, e, logps, inside)

    def kept_dx(self, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> torch.Tensor:
        """2THV that skips panels whose coefficients are all 0."""
        weight, targets = rows.head.weight.detach().contiguous(), rows.targets.contiguous()
        dx, narrow = torch.empty(len(coefs), weight.shape[1]), self._is_narrow(scored)
        factors = row_factors(scored.stats, coefs, rows.head)
        self.ops.kept_dx(scored.e, scored.e_in_dw, weight, targets, narrow, *factors, dx)
        return dx

    def draw(
        self, hidden: torch.Tensor, head: Head, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks first: a logit takes part in its block's largest one and mass, and is forgotten."""
        hidden, weight = hidden.contiguous(), head.weight.contiguous()
        narrow = self.pairs and hidden.dtype == torch.bfloat16
        size, scaling = self.ops.mass_block(hidden, weight, narrow), (head.scale, head.softcap or 0.0, narrow)
        shape = (-(-len(weight) // size), self._panels(len(hidden)) * self.lanes)
        tops, sums = torch.empty(shape), torch.empty(shape)
        self.ops.block_masses(hidden, weight, *scaling, tops, sums)
        tops, sums = tops[:, : len(hidden)].T, sums[:, : len(hidden)].T
        highest = tops.amax(1, keepdim=True)
        masses = (tops - highest).double().exp_().mul_(sums)
        if uniforms is None:
            block, rest = tops.argmax(1), None
        else:
            block, rest = invert(masses, uniforms)
        logits = torch.empty(len(hidden), size)
        self.ops.block_logits(hidden, weight, *scaling, block, logits)
        inside = logits.argmax(1) if rest is None else invert((logits - logits.amax(1, keepdim=True)).exp_(), rest)[0]
        logps = logits.gather(1, inside[:, None]).sub_(highest).squeeze(1) - masses.sum(1).log().float()
        logps.clamp_max_(0.0)  # made twice, a logit may be rounded otherwise
        return (block * size + inside).clamp_max_(len(weight) - 1), logps

    def dw_sums(self, weight: torch.Tensor, visits: int) -> WeightSums:
        """In the gradient's own type for a few visits of bfloat16: the float32 sums would be the largest tensor."""
        rounded = weight.dtype == torch.bfloat16 and visits <= ROUNDED_VISITS
        total = torch.empty(weight.shape, dtype=torch.bfloat16 if rounded else torch.float32)
        self.ops.use_large_pages(total)
        return WeightSums(total, begun=False)

    def free_rows(self, weight: torch.Tensor) -> int:
        """Whole panels in the gradient's own type, while the four copies a chunk makes of rows fit `chunk_bytes`."""
        room = self._free_panels(weight, self._kept_dtype(self.narrow(weight.dtype)))
        return min(room, self.chunk_bytes // (16 * weight.shape[1] * self.lanes)) * self.lanes

    def kept_dw_(self, sums: WeightSums, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> None:
        """2THV; skips panels whose coefficients are all 0."""
        hidden, targets = rows.hidden.detach().contiguous(), rows.targets.contiguous()
        narrow, factors = self._is_narrow(scored), row_factors(scored.stats, coefs, rows.head)
        fresh, sums.begun = not sums.begun, True
        self.ops.kept_dw(scored.e, scored.e_in_dw, hidden, targets, narrow, *factors, fresh, sums.total)

    def recompute_dw_(self, sums: WeightSums, stats: RowStats, coefs: torch.Tensor, rows: Rows) -> None:
        """4THV."""
        head, targets, softcap = rows.head, rows.targets.contiguous(), rows.head.softcap or 0.0
        hidden, weight = rows.hidden.detach().contiguous(), head.weight.detach().contiguous()
        factors, fresh, sums.begun = row_factors(stats, coefs, head), not sums.begun, True
        scaling = (head.scale, softcap, self.narrow(hidden.dtype))
        self.ops.recompute_dw(hidden, weight, targets, *scaling, stats.shift, *factors, fresh, sums.total)

    def padded_rows(self, num_rows: int) -> int:
        """Rows of whole panels."""
        return self._panels(num_rows) * self.lanes

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """Whole panels of E."""
        itemsize = self._kept_dtype(self.narrow(head.weight.dtype)).itemsize
        return self._panels(num_rows) * self._padded(head) * self.lanes * itemsize

    def tile_bytes(self, num_rows: int, head: Head) -> int:
        """Tiles are of a thread's cache."""
        return 0

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Row-by-row sums in float64."""
        return sum_sequences(token_values, cu_seqlens)

    def pair_loss(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A handful of vector operations on P numbers: nothing for native code to win."""
        return pair_slopes(policy_logps, ref_logps, lengths, spec)

    def release(self) -> None:
        """Gives back E of a chunk."""
        self._kept.room = None

    def _room(self, shape: tuple[int, int, int], dtype: torch.dtype, *, lasting: bool) -> torch.Tensor:
        """Memory for E: fresh where it lasts, else that of the thread's last call, which is done with it.

        Faults on fresh memory take up to a fifth of a call.
        """
        size = math.prod(shape)
        if lasting or size == 0:
            return torch.empty(shape, dtype=dtype)
        room: Any = getattr(self._kept, "room", None)
        if room is None or room.numel() < size * dtype.itemsize:
            room = torch.empty(max(size * dtype.itemsize, self.chunk_bytes), dtype=torch.uint8)
            self._kept.room = room
            self.ops.use_large_pages(room)
        return room[: size * dtype.itemsize].view(dtype).view(shape)

    def _free_panels(self, dw: torch.Tensor, kept: torch.dtype) -> int:
        """Panels of E of this type that fit into the rows of dW, whose length must be whole words of E."""
        row_bytes = dw.shape[1] * dw.itemsize
        return 0 if row_bytes % 4 else row_bytes // (self.lanes * kept.itemsize)

    def _kept_dtype(self, narrow: bool) -> torch.dtype:
        return torch.bfloat16 if narrow else torch.float32

    def _is_narrow(self, scored: Scored) -> bool:
        return scored.e.dtype == torch.bfloat16

    def _panels(self, num_rows: int) -> int:
        return -(-num_rows // self.lanes)

    def _padded(self, head: Head) -> int:
        return -(-len(head.weight) // self.tile_rows) * self.tile_rows
