"""The GPU backends: Plan B (library GEMMs and Triton passes) and Plan A (a Triton GEMM with the exp-store epilogue).

On CPU tensors they run only in the Triton interpreter (TRITON_INTERPRET=1 before triton is imported).
"""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from dataclasses import dataclass, replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from bpo_fast_kernels.rows import Head, LossSpec, Rows, RowStats, Scored, WeightSums
from bpo_fast_kernels.torch_backend import SHIFT_SLACK, TILE_COLS, TILE_ROWS, Sweep, TorchBackend
from bpo_fast_kernels.triton_config import INTERPRETED, SHARED_BYTES, GemmConfig, gemm_config, with_tile
from bpo_fast_kernels.triton_gemm import exp_gemm_kernel, raise_shift_kernel, row_sums_kernel
from bpo_fast_kernels.triton_live import live_dw_, live_pull
from bpo_fast_kernels.triton_pair import pair_slopes_triton
from bpo_fast_kernels.triton_passes import (
    PUSH_BLOCKS,
    exp_tile_kernel,
    finish_kernel,
    push_dw_kernel,
    sequence_sum_kernel,
    settle_kernel,
    shrink_kernel,
    target_logit_kernel,
    unit_dx_kernel,
)

BLOCK = 1024
# Row sums past this send a row block to the second attempt: E stays within bfloat16 and E @ W within float32. Below
# e^SHIFT_SLACK, or the tile pass of "recompute" would move the shift of a row that was settled here.
OVERFLOW = 1e26


class TritonBackend(TorchBackend):
    """Plan B: the frame of `TorchBackend`, with every pass one launch, no host sync and no atomics."""

    name = "triton"

    def start(self, rows: Rows) -> Sweep:
        """Target logits by one program a row."""
        num_rows, width = rows.hidden.shape
        hidden, weight, head = contiguous_rows(rows.hidden), contiguous_rows(rows.head.weight), rows.head
        logits, slopes, sums = torch.zeros(3, num_rows, device=hidden.device).unbind()
        if num_rows:
            target_logit_kernel[(num_rows,)](
                hidden,
                weight,
                rows.targets,
                logits,
                slopes,
                width,
                hidden.stride(0),
                weight.stride(0),
                head.scale,
                head.softcap or 0.0,
                HAS_CAP=head.softcap is not None,
                BLOCK=BLOCK,
            )
        return Sweep(rows.targets, logits, slopes, logits.clone(), sums)

    def room_for_e(self, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Over the logits: a program reads its whole row before it writes any of it."""
        return z.view(dtype)[:, : z.shape[1]]

    def tile_bytes(self, num_rows: int, head: Head) -> int:
        """A tile of float32."""
        return 4 * min(num_rows, TILE_ROWS) * min(len(head.weight), TILE_COLS)

    def exp_tile_(
        self, z: torch.Tensor, e: torch.Tensor, sweep: Sweep, first: int, head: Head, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One program a row."""
        num_rows, width = z.shape
        new_shift, factor = torch.empty(2, num_rows, device=z.device).unbind()
        if num_rows:
            exp_tile_kernel[(num_rows,)](
                z,
                e,
                sweep.targets,
                sweep.shift,
                new_shift,
                sweep.miss_sum,
                factor,
                sweep.shift if gain is None else gain,
                first,
                width,
                z.stride(0),
                e.stride(0),
                head.scale,
                head.softcap or 0.0,
                SHIFT_SLACK,
                HAS_CAP=head.softcap is not None,
                HAS_GAIN=gain is not None,
                COLS=min(TILE_COLS, triton.next_power_of_2(width)),
                num_warps=8,
            )
        sweep.shift = new_shift
        return factor

    def shrink_(self, sums: torch.Tensor, factor: torch.Tensor) -> None:
        """Rows whose factor is 1 cost one load."""
        if len(sums):
            shrink_kernel[(len(sums),)](sums, factor, sums.shape[1], sums.stride(0), BLOCK=BLOCK)

    def settle_(self, kept: torch.Tensor, shifts: list[torch.Tensor], last: torch.Tensor) -> None:
        """One program a row, which leaves after a few loads unless a shift moved."""
        if len(kept) and len(shifts) > 1:
            args = (kept, torch.stack(shifts), last, len(kept), len(shifts), TILE_COLS, kept.stride(0))
            settle_kernel[(len(kept),)](*args, BLOCK=BLOCK)

    def finish(self, sweep: Sweep) -> RowStats:
        """One launch for the four statistics."""
        num_rows = len(sweep.shift)
        logps, inv_sum, push = torch.empty(3, num_rows, device=sweep.shift.device).unbind()
        if num_rows:
            grid = (triton.cdiv(num_rows, BLOCK),)
            state = (sweep.target_logits, sweep.target_slope, sweep.shift, sweep.miss_sum)
            finish_kernel[grid](*state, logps, inv_sum, push, num_rows, BLOCK=BLOCK)
        return RowStats(logps, sweep.shift, inv_sum, push)

    def unit_dx(self, rows: Rows, stats: RowStats, pull: torch.Tensor) -> torch.Tensor:
        """One launch."""
        dx, weight = torch.empty_like(pull), contiguous_rows(rows.head.weight)
        if len(dx):
            args = (pull, weight, rows.targets, stats.inv_sum, stats.push, dx, dx.shape[1])
            strides = (pull.stride(0), weight.stride(0), dx.stride(0))
            unit_dx_kernel[(len(dx),)](*args, *strides, rows.head.scale, BLOCK=BLOCK)
        return dx

    def live_pull(self, e: torch.Tensor, weight: torch.Tensor, coefs: torch.Tensor) -> torch.Tensor:
        """A GEMM over the live rows, which only the device counts."""
        return live_pull(e, contiguous_rows(weight), coefs)

    def live_dw_(self, dw: torch.Tensor, e: torch.Tensor, scaled: torch.Tensor, coefs: torch.Tensor) -> None:
        """The same."""
        live_dw_(dw, e, scaled, coefs)

    def push_dw_(self, dw: torch.Tensor, rows: Rows, push: torch.Tensor) -> None:
        """One launch after a sort."""
        if len(push):
            hidden, (ids, order) = contiguous_rows(rows.hidden), rows.targets.sort(stable=True)
            grid = (len(push), triton.cdiv(dw.shape[1], PUSH_BLOCKS["BLOCK"]))
            args = (hidden, push, ids, order, dw, *hidden.shape, hidden.stride(0), dw.stride(0))
            push_dw_kernel[grid](*args, **PUSH_BLOCKS)

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """One program a sequence."""
        out = torch.empty(len(cu_seqlens) - 1, device=token_values.device)
        if len(out):
            sequence_sum_kernel[(len(out),)](token_values.contiguous(), cu_seqlens.contiguous(), out, BLOCK=BLOCK)
        return out

    def pair_loss(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One launch."""
        return pair_slopes_triton(policy_logps, ref_logps, lengths, spec)


def contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with neighbors in a row side by side."""
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@dataclass(frozen=True)
class _Slots:
    """Policy rows in whole blocks, then behavior rows, as Plan A's kernels see them; [slots] each."""

    x: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor
    slopes: torch.Tensor
    shift: torch.Tensor
    sums: torch.Tensor
    flags: torch.Tensor
    partial: torch.Tensor
    first_behavior: int
    num_slots: int


class TritonGemmBackend(TritonBackend):
    """Plan A: policy and behavior rows in one launch; `forward` uses no memory for logits at all.

    Args:
        tile: as `with_tile` takes it, in place of what the rule gives; empty for the rule.
    """

    name = "triton-gemm"

    def __init__(self, tile: str = "") -> None:
        self.tile = tile
        with_tile(INTERPRETED, tile)  # refuses an unknown form at once

    def score(
        self, rows: Rows, *, dx: bool, keep: bool, behavior: Rows | None = None, sums: WeightSums | None = None
    ) -> Scored:
        """One GEMM; dX comes from its E by a library GEMM.

        float32 rows take Plan B on a GPU: tensor cores would round them to TF32.
        """
        num_rows = len(rows.hidden)
        if num_rows == 0 or (rows.hidden.is_cuda and rows.hidden.dtype == torch.float32):
            return super().score(rows, dx=dx, keep=keep, behavior=behavior, sums=sums)
        if dx and not keep:
            return self.score_by_chunks(rows, behavior)
        config = self.config(rows, behavior)
        slots = self.lay_out(rows, behavior, config)
        e = self.room_for_kept(rows) if keep else None
        self.sweep(slots, rows, behavior, e, config)
        stats = self.finish(Sweep(slots.targets, slots.logits, slots.slopes, slots.shift, slots.sums))
        first = slots.first_behavior
        cut = RowStats(*(value[:num_rows] for value in vars(stats).values()))
        return Scored(cut, None, e, None if behavior is None else stats.token_logps[first : first + num_rows])

    def score_by_chunks(self, rows: Rows, behavior: Rows | None) -> Scored:
        """Log-probs and dX of all rows, with E of one chunk of rows at a time."""
        step = max(1, self.chunk_bytes // self.kept_bytes(1, rows.head))
        parts, unit = [], []
        for start in range(0, len(rows.hidden), step):
            cut = slice(start, start + step)
            chunk = Rows(rows.hidden[cut], rows.targets[cut], rows.head)
            other = None if behavior is None else Rows(behavior.hidden[cut], chunk.targets, behavior.head)
            scored = self.score(chunk, dx=True, keep=True, behavior=other)
            unit.append(self.kept_dx(scored, torch.ones_like(scored.stats.inv_sum), chunk, zeros=False))
            parts.append((scored.stats, scored.behavior_logps))
        stats = [torch.cat(values) for values in zip(*(vars(part).values() for part, _ in parts), strict=True)]
        logps = None if behavior is None else torch.cat([logps for _, logps in parts])
        return Scored(RowStats(*stats), torch.cat(unit), None, logps)

    def config(self, rows: Rows, behavior: Rows | None) -> GemmConfig:
        """Descriptors where the device has them, rows start on 16 bytes and there is one head."""
        if not rows.hidden.is_cuda:
            return with_tile(INTERPRETED, self.tile)
        major, minor = torch.cuda.get_device_capability(rows.hidden.device)
        second = behavior is not None and behavior.head.weight.data_ptr() != rows.head.weight.data_ptr()
        matrices = (rows.hidden, rows.head.weight)
        aligned = all(m.stride(1) == 1 and m.stride(0) % 8 == m.data_ptr() % 16 == 0 for m in matrices)
        aligned = aligned and rows.hidden.shape[1] % 8 == 0
        capped = rows.head.softcap is not None
        config = gemm_config(10 * major + minor, tma=aligned and not second, softcap=capped)
        return with_tile(config, self.tile, SHARED_BYTES[90])  # of every device with descriptors

    def lay_out(self, rows: Rows, behavior: Rows | None, config: GemmConfig) -> _Slots:
        """Slots of both kinds of rows; spare slots have shift inf, so that they sum to 0."""
        num_rows, block = len(rows.hidden), config.block_m
        first = triton.cdiv(num_rows, block) * block
        device, x, num_slots = rows.hidden.device, contiguous_rows(rows.hidden), num_rows
        if behavior is not None:
            num_slots = first + num_rows
            x = torch.zeros(num_slots, x.shape[1], dtype=x.dtype, device=device)
            x[:num_rows], x[first:] = rows.hidden.detach(), behavior.hidden
        whole = triton.cdiv(num_slots, block) * block
        logits, slopes, sums = torch.zeros(3, whole, device=device).unbind()
        shift = torch.full((whole,), torch.inf, device=device)
        targets = torch.full((whole,), -1, dtype=torch.int64, device=device)
        for start, part in ((0, rows), (first, behavior)):
            if part is not None:
                here, begun = slice(start, start + num_rows), self.start(part)
                targets[here], slopes[here] = part.targets, begun.target_slope
                logits[here] = shift[here] = begun.target_logits
        tiles = triton.cdiv(len(rows.head.weight), config.block_n)
        flags = torch.zeros(whole // block, dtype=torch.int32, device=device)
        partial = torch.empty(tiles, whole, device=device)
        return _Slots(x, targets, logits, slopes, shift, sums, flags, partial, first, num_slots)

    def sweep(
        self, slots: _Slots, rows: Rows, behavior: Rows | None, e: torch.Tensor | None, config: GemmConfig
    ) -> None:
        """E and row sums, then once more, with the largest logit as shift, for row blocks that overflowed."""
        tiles, whole = slots.partial.shape
        blocks, stride = (whole // config.block_m,), slots.partial.stride(0)
        self.launch(slots, rows, behavior, e, config, top=False, flagged=False)
        row_sums_kernel[blocks](slots.partial, slots.sums, slots.flags, tiles, stride, OVERFLOW, BLOCK_M=config.block_m)
        self.launch(slots, rows, behavior, e, config, top=True, flagged=True)
        args = (slots.partial, slots.sums, slots.logits, slots.shift, slots.flags, tiles, stride, OVERFLOW)
        raise_shift_kernel[blocks](*args, BLOCK_M=config.block_m)
        self.launch(slots, rows, behavior, e, config, top=False, flagged=True)
        row_sums_kernel[blocks](slots.partial, slots.sums, slots.flags, tiles, stride, OVERFLOW, BLOCK_M=config.block_m)

    def launch(
        self,
        slots: _Slots,
        rows: Rows,
        behavior: Rows | None,
        e: torch.Tensor | None,
        config: GemmConfig,
        *,
        top: bool,
        flagged: bool,
    ) -> None:
        """One launch of the exp-store GEMM or of its row-maximum form."""
        head, weight = rows.head, contiguous_rows(rows.head.weight)
        vocab, width = weight.shape
        other = weight if behavior is None else contiguous_rows(behavior.head.weight)
        stores_e = e is not None and not top
        if flagged:  # most programs have nothing to do
            config = replace(config, persistent=False)
        num_programs = slots.flags.shape[0] * slots.partial.shape[0]
        if config.persistent:
            num_programs = min(num_programs, _multiprocessors(slots.x.device))
        matrices = {"x": slots.x, "w": weight, "e": slots.partial if e is None else e}
        for name, block in config.descriptor_blocks(stores_e).items():
            matrices[name] = TensorDescriptor.from_tensor(matrices[name], block)
        exp_gemm_kernel[(num_programs,)](
            matrices["x"],
            matrices["w"],
            other,
            slots.targets,
            slots.shift,
            slots.flags,
            matrices["e"],
            slots.partial,
            len(rows.hidden),
            slots.num_slots,
            vocab,
            width,
            slots.x.stride(0),
            weight.stride(0),
            0 if e is None else e.stride(0),
            slots.partial.stride(0),
            head.scale,
            head.softcap or 0.0,
            TOP=top,
            FLAGGED=flagged,
            STORE_E=stores_e,
            SECOND_HEAD=other.data_ptr() != weight.data_ptr(),
            HAS_CAP=head.softcap is not None,
            UPCAST=not slots.x.is_cuda,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **config.constexprs(),
        )
