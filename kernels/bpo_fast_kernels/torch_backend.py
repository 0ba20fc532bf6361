"""The plain PyTorch backend: library GEMMs by tile with float32 output, and the tile pass as tensor operations.

Also the frame of the GPU backends, which replace the tile pass. A tile is at most `TILE_ROWS` x `TILE_COLS` logits and
every mode cuts rows and vocabulary at the same places, so that all modes give the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from bpo_fast_kernels.inverse import cuts, draw
from bpo_fast_kernels.rows import Head, LossSpec, Rows, RowStats, Scored, WeightSums, row_factors

TILE_ROWS = 4096
TILE_COLS = 4096
# A shift moves when a logit passes it by more: E stays below e^60 and the products E @ W far below the float32 limit.
SHIFT_SLACK = 60.0
# Bytes that rows of a kept E begin at a multiple of: a GPU's GEMMs load a vocabulary of an odd size element by element.
ROW_ALIGNMENT = 16


@dataclass
class Sweep:
    """What a row block carries from one vocabulary tile to the next; all [R] float32 but `targets`."""

    targets: torch.Tensor
    target_logits: torch.Tensor
    target_slope: torch.Tensor
    shift: torch.Tensor
    miss_sum: torch.Tensor


def mm_f32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated and returned in float32, by products that autocast passes over: they are given their output."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=a.new_empty(len(a), b.shape[1], dtype=torch.float32))


def add_mm_f32_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in float32, by the product itself: apart, product and sum would pass over memory twice more."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def scale_rows(hidden: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """factor[t] * hidden[t], rounded once; one launch."""
    return torch.mul(hidden.detach(), factor[:, None], out=hidden.new_empty(hidden.shape, dtype=dtype))


def live_rows(coefs: torch.Tensor) -> torch.Tensor | None:
    """Rows with a coefficient; a host sync on a GPU. None for all of them."""
    return None if bool(coefs.all()) else coefs.nonzero().squeeze(1)


def sum_sequences(token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[T] -> [N]: sums in float64, rounded once; sequential on the CPU."""
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=token_values.device)
    owner = torch.repeat_interleave(numbers, lengths, output_size=len(token_values))
    sums = token_values.new_zeros(len(lengths), dtype=torch.float64)
    return sums.index_add_(0, owner, token_values.double()).float()


def pair_slopes(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [P], margins [P], d loss_p / d policy_logps [2P]) by the formulas of pair_loss.py."""
    ratios = policy_logps.float() - ref_logps.float()
    inv = None
    if spec.loss == "ipo":
        assert lengths is not None
        inv = lengths.clamp(min=1).float().reciprocal()
        ratios = ratios * inv
    chosen, rejected = ratios.chunk(2)
    h = chosen - rejected
    u, eps = spec.beta * h, spec.label_smoothing
    if spec.loss == "dpo":
        loss = -(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u)
        slope = spec.beta * (eps * torch.sigmoid(u) - (1 - eps) * torch.sigmoid(-u))
    elif spec.loss == "slic":
        loss = torch.relu(1 - u)
        slope = torch.where(u >= 1, 0.0, -spec.beta)  # as relu's: a margin that is NaN shows
    else:
        gap = h - 1 / (2 * spec.beta)
        loss, slope = gap * gap, 2 * gap
    both = torch.cat([slope, -slope])
    return loss, h, both if inv is None else both * inv


def capped(z: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled logits and d cap / d z, from raw products."""
    if head.softcap is None:
        return z.mul_(head.scale), None
    tanh = z.div_(head.softcap).tanh_()
    return tanh * (head.softcap * head.scale), 1.0 - tanh.square()


def columns(vocab: int) -> Iterator[slice]:
    """Vocabulary tiles."""
    for start in range(0, vocab, TILE_COLS):
        yield slice(start, min(start + TILE_COLS, vocab))


def add_dw_(dw: torch.Tensor, e: torch.Tensor, scaled: torch.Tensor) -> None:
    """dW += E.T @ scaled."""
    for cols in columns(len(dw)):
        add_mm_f32_(dw[cols], e[:, cols].T, scaled)


def row_length(vocab: int, dtype: torch.dtype) -> int:
    """Elements between the beginnings of two rows of a kept E."""
    step = ROW_ALIGNMENT // dtype.itemsize
    return -(-vocab // step) * step


def blocks(num_rows: int) -> Iterator[slice]:
    """Row blocks; an empty batch has one empty block."""
    for start in range(0, max(num_rows, 1), TILE_ROWS):
        yield slice(start, min(start + TILE_ROWS, num_rows))


def draw_rows(hidden: torch.Tensor, uniforms: torch.Tensor | None, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_draw` by the logits of these rows."""
    logits, _ = capped(mm_f32(hidden, head.weight.T), head)
    total = logits.logsumexp(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        tokens = draw((logits - logits.amax(-1, keepdim=True)).exp_(), uniforms)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - total


class TorchBackend:
    """Implements `rows.Backend` with tensor operations on any device."""

    name = "torch"
    # E of 4,096 rows and a vocabulary of 128k in bfloat16.
    chunk_bytes = 1_074_000_000

    def release(self) -> None:
        """Nothing is kept."""

    def work_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Type of E: bfloat16 for 16-bit inputs on a GPU (float16 could not hold E), else float32."""
        return torch.bfloat16 if hidden.is_cuda and hidden.dtype != torch.float32 else torch.float32

    def start(self, rows: Rows) -> Sweep:
        """Target logits of a row block, and sums at zero."""
        raw = (rows.hidden.float() * rows.head.weight[rows.targets].float()).sum(1)
        logits, slope = capped(raw, rows.head)
        slope = torch.ones_like(logits) if slope is None else slope
        return Sweep(rows.targets, logits, slope, logits.clone(), torch.zeros_like(logits))

    def room_for_e(self, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Where the E of a tile that is not kept goes: over its logits, if they have its type."""
        return z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)

    def room_for_kept(self, rows: Rows) -> torch.Tensor:
        """[rows, V] for the E of whole rows."""
        vocab, dtype = len(rows.head.weight), self.work_dtype(rows.hidden)
        room = torch.empty(len(rows.hidden), row_length(vocab, dtype), dtype=dtype, device=rows.hidden.device)
        return room[:, :vocab]

    def exp_tile_(
        self, z: torch.Tensor, e: torch.Tensor, sweep: Sweep, first: int, head: Head, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turn raw products `z` of the tile at `first` into E in `e`, 0 at the target; `gain` [R] multiplies its rows.

        Adds the row sums and raises the shift where exp would overflow; returns the factor [R] by which everything
        summed before must shrink.
        """
        z, slope = capped(z, head)
        is_target = torch.arange(z.shape[1], device=z.device) == (sweep.targets - first)[:, None]
        z.masked_fill_(is_target, -torch.inf)
        top = z.amax(1)
        shift = torch.where(top > sweep.shift + SHIFT_SLACK, top, sweep.shift)
        factor = (sweep.shift - shift).exp()
        exps = z.sub_(shift[:, None]).exp_()
        sweep.miss_sum = sweep.miss_sum * factor + exps.sum(1)
        sweep.shift = shift
        exps = exps if slope is None else exps * slope
        e.copy_(exps if gain is None else exps * gain[:, None])
        return factor

    def shrink_(self, sums: torch.Tensor, factor: torch.Tensor) -> None:
        """Scale the rows of what was summed or kept before a shift moved."""
        sums.mul_(factor[:, None].to(sums.dtype))

    def finish(self, sweep: Sweep) -> RowStats:
        """Statistics of swept rows; log1p keeps the log-prob of a target with p near 1."""
        gap = sweep.target_logits - sweep.shift
        total = sweep.miss_sum + gap.exp()
        logps = gap - torch.log1p(sweep.miss_sum + torch.expm1(gap))
        push = sweep.miss_sum / total * sweep.target_slope
        return RowStats(token_logps=logps, shift=sweep.shift, inv_sum=1.0 / total, push=push)

    def unit_dx(self, rows: Rows, stats: RowStats, pull: torch.Tensor) -> torch.Tensor:
        """d logp / d hidden from pull = E @ W."""
        push = stats.push[:, None] * rows.head.weight[rows.targets].float()
        return (push - pull * stats.inv_sum[:, None]) * rows.head.scale

    def score(
        self, rows: Rows, *, dx: bool, keep: bool, behavior: Rows | None = None, sums: WeightSums | None = None
    ) -> Scored:
        """One sweep over row blocks and vocabulary tiles; with `keep`, dX is one large GEMM later.

        Behavior rows are row blocks of their own: a GEMM cut by rows reads each tile of the head once a block, joined
        or not.
        """
        hidden, head = rows.hidden, rows.head
        e = self.room_for_kept(rows) if keep else None
        parts, dx_parts = [], []
        for block in blocks(len(hidden)):
            part = Rows(hidden[block], rows.targets[block], head)
            stats, unit_dx = self.sweep_block(part, dx and not keep, None if e is None else e[block])
            parts.append(stats)
            dx_parts.append(unit_dx)
        names = ("token_logps", "shift", "inv_sum", "push")
        stats = RowStats(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
        logps = None if behavior is None else self.score(behavior, dx=False, keep=False).stats.token_logps
        return Scored(stats, torch.cat(dx_parts) if dx and not keep else None, e, logps)

    def sweep_block(self, rows: Rows, dx: bool, kept: torch.Tensor | None) -> tuple[RowStats, torch.Tensor | None]:
        """All vocabulary tiles of one row block."""
        head, x, sweep = rows.head, rows.hidden, self.start(rows)
        pull = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if dx else None
        shifts = []
        for cols in columns(len(head.weight)):
            w = head.weight[cols]
            z = mm_f32(x, w.T)
            e = self.room_for_e(z, self.work_dtype(x)) if kept is None else kept[:, cols]
            factor = self.exp_tile_(z, e, sweep, cols.start, head)
            shifts.append(sweep.shift)
            if pull is not None:
                self.shrink_(pull, factor)
                add_mm_f32_(pull, e, w.to(e.dtype))
            del z, e  # before the next tile
        stats = self.finish(sweep)
        if kept is not None:
            self.settle_(kept, shifts, sweep.shift)
        return stats, None if pull is None else self.unit_dx(rows, stats, pull)

    def settle_(self, kept: torch.Tensor, shifts: list[torch.Tensor], last: torch.Tensor) -> None:
        """Bring kept tiles to the last shift."""
        for shift, cols in zip(shifts, columns(kept.shape[1]), strict=True):
            self.shrink_(kept[:, cols], (shift - last).exp())

    def kept_dx(self, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> torch.Tensor:
        """2THV."""
        stats, weight = scored.stats, rows.head.weight.to(scored.e.dtype)
        pull = self.live_pull(scored.e, weight, coefs) if zeros else mm_f32(scored.e, weight)
        return self.unit_dx(rows, replace(stats, inv_sum=stats.inv_sum * coefs, push=stats.push * coefs), pull)

    def live_pull(self, e: torch.Tensor, weight: torch.Tensor, coefs: torch.Tensor) -> torch.Tensor:
        """E @ W of the rows with a coefficient, zero elsewhere."""
        live = live_rows(coefs)
        if live is None:
            return mm_f32(e, weight)
        pull = torch.zeros(len(coefs), weight.shape[1], device=coefs.device)
        return pull.index_copy_(0, live, mm_f32(e[live], weight))

    def draw(
        self, hidden: torch.Tensor, head: Head, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows of logits at a time."""
        if not hidden.is_cuda:  # once, and not for every cut
            hidden, head = hidden.float(), replace(head, weight=head.weight.float())
        parts = [
            draw_rows(hidden[cut], None if uniforms is None else uniforms[cut], head)
            for cut in cuts(len(hidden), len(head.weight), hidden.device)
        ]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logps for _, logps in parts])

    def dw_sums(self, weight: torch.Tensor, visits: int) -> WeightSums:
        """float32 whatever the visits."""
        return WeightSums(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), begun=True)

    def free_rows(self, weight: torch.Tensor) -> int:
        """None: a GEMM that adds to dW cannot have E in it."""
        return 0

    def kept_dw_(self, sums: WeightSums, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> None:
        """2THV."""
        factor, push = row_factors(scored.stats, coefs, rows.head)
        scaled = scale_rows(rows.hidden, factor, scored.e.dtype)
        if zeros:
            self.live_dw_(sums.total, scored.e, scaled, coefs)
        else:
            add_dw_(sums.total, scored.e, scaled)
        self.push_dw_(sums.total, rows, push)

    def live_dw_(self, dw: torch.Tensor, e: torch.Tensor, scaled: torch.Tensor, coefs: torch.Tensor) -> None:
        """dW += E.T @ scaled over the rows with a coefficient."""
        live = live_rows(coefs)
        add_dw_(dw, *((e, scaled) if live is None else (e[live], scaled[live])))

    def push_dw_(self, dw: torch.Tensor, rows: Rows, push: torch.Tensor) -> None:
        """The targets' part of dW, in a fixed order: dW[y] += push_t * hidden_t over the rows whose target is y."""
        pushes = rows.hidden.detach() * push[:, None]
        if dw.is_cuda:
            dw.index_put_((rows.targets,), pushes, accumulate=True)  # sorts; index_add_ is atomic there
        else:
            dw.index_add_(0, rows.targets, pushes)

    def recompute_dw_(self, sums: WeightSums, stats: RowStats, coefs: torch.Tensor, rows: Rows) -> None:
        """4THV: logits again by tile, E from the shift that the forward pass settled on.

        The coefficients are known here: they multiply E before it is rounded.
        """
        head = rows.head
        factor, push = row_factors(stats, coefs, head)
        for block in blocks(len(rows.hidden)):
            part = Rows(rows.hidden[block], rows.targets[block], head)
            x, sweep = part.hidden, self.start(part)
            sweep.shift = stats.shift[block].clone()
            right = x.to(self.work_dtype(x))
            for cols in columns(len(head.weight)):
                z = mm_f32(x, head.weight[cols].T)
                e = self.room_for_e(z, right.dtype)
                self.exp_tile_(z, e, sweep, cols.start, head, factor[block])
                add_mm_f32_(sums.total[cols], e.T, right)
            self.push_dw_(sums.total, part, push[block])

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """E in its working type."""
        dtype = self.work_dtype(head.weight)
        return num_rows * row_length(len(head.weight), dtype) * dtype.itemsize

    def tile_bytes(self, num_rows: int, head: Head) -> int:
        """A tile of float32, and its E beside it if that is of another type."""
        dtype = self.work_dtype(head.weight)
        num_bytes = 4 if dtype == torch.float32 else 4 + dtype.itemsize
        return num_bytes * min(num_rows, TILE_ROWS) * min(len(head.weight), TILE_COLS)

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Row-by-row sums in float64."""
        return sum_sequences(token_values, cu_seqlens)

    def pair_loss(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A handful of vector operations."""
        return pair_slopes(policy_logps, ref_logps, lengths, spec)
