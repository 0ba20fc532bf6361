"""Plan B on the GPU: the passes around library GEMMs, one program a row, no atomics, no host sync.

Legend: R rows of a block, C columns of a vocabulary tile, H hidden size. See rows.py for E, S' and the shift.
"""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

# Tile of push_dw_kernel: most targets have fewer rows than 8.
PUSH_BLOCKS = {"BLOCK_ROWS": 8, "BLOCK": 512}


@triton.jit
def _cap(z, scale, softcap, HAS_CAP: tl.constexpr):
    """Scaled logits and the slope of the cap; tanh(x) = 2 sigmoid(2 x) - 1."""
    if HAS_CAP:
        t = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
        return t * (softcap * scale), 1.0 - t * t
    else:
        return z * scale, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _log1p(s):
    """log(1 + s) that keeps a small s: the rounding error of 1 + s cancels in the quotient."""
    u = 1.0 + s
    gap = u - 1.0
    return tl.where(gap == 0.0, s, tl.log(u) * (s / tl.where(gap == 0.0, 1.0, gap)))


@triton.jit
def target_logit_kernel(
    x, w, targets, logits, slopes, width, stride_x, stride_w, scale, softcap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """logits[r] = cap(x[r] . w[targets[r]]) * scale, and the cap's slope there."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        a = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(w + target * stride_w + cols, mask=mask, other=0.0).to(tl.float32)
        acc += a * b
    raw = tl.sum(acc, axis=0)
    if HAS_CAP:
        t = 2.0 * tl.sigmoid(2.0 * raw / softcap) - 1.0
        tl.store(logits + row, t * (softcap * scale))
        tl.store(slopes + row, 1.0 - t * t)
    else:
        tl.store(logits + row, raw * scale)
        tl.store(slopes + row, 1.0)


@triton.jit
def exp_tile_kernel(
    z,
    e,
    targets,
    shift,
    new_shift,
    miss_sum,
    factor,
    gain,
    first,
    width,
    stride_z,
    stride_e,
    scale,
    softcap,
    slack,
    HAS_CAP: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    COLS: tl.constexpr,
):
    """A row of raw products -> E, the row's sum, and a higher shift where a logit passes the old one by `slack`.

    A program holds its whole row, so that the maximum separates the last load from the first store: `e` may lie over
    `z`.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    mask = cols < width
    raw = tl.load(z + row * stride_z + cols, mask=mask, other=0.0)
    logits, slope = _cap(raw, scale, softcap, HAS_CAP)
    is_target = cols + first == tl.load(targets + row)
    logits = tl.where(mask & (is_target == 0), logits, float("-inf"))
    top = tl.max(logits, axis=0)
    old = tl.load(shift + row)
    new = tl.where(top > old + slack, top, old)
    shrink = tl.exp(old - new)
    exps = tl.exp(logits - new)
    tl.store(miss_sum + row, tl.load(miss_sum + row) * shrink + tl.sum(exps, axis=0))
    tl.store(new_shift + row, new)
    tl.store(factor + row, shrink)
    out = exps * slope
    if HAS_GAIN:
        out = out * tl.load(gain + row)
    tl.debug_barrier()
    tl.store(e + row * stride_e + cols, out.to(e.dtype.element_ty), mask=mask)


@triton.jit
def shrink_kernel(sums, factor, width, stride, BLOCK: tl.constexpr):
    """sums[r] *= factor[r]; rows with factor 1, nearly all, leave at once."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor + row)
    if scale != 1.0:
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < width
            value = tl.load(sums + row * stride + cols, mask=mask, other=0.0)
            tl.store(sums + row * stride + cols, value * scale, mask=mask)


@triton.jit
def settle_kernel(e, shifts, last_shift, num_rows, num_tiles, tile_cols, stride_e, BLOCK: tl.constexpr):
    """Bring the tiles of a kept row to the last shift."""
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(last_shift + row)
    at = shifts + row
    first = 0
    for _ in range(0, num_tiles - 1):
        shift = tl.load(at)
        if shift != last:
            for start in range(first, first + tile_cols, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                mask = cols < first + tile_cols
                value = tl.load(e + row * stride_e + cols, mask=mask, other=0.0).to(tl.float32)
                value = value * tl.exp(shift - last)
                tl.store(e + row * stride_e + cols, value.to(e.dtype.element_ty), mask=mask)
        at += num_rows
        first += tile_cols


@triton.jit
def finish_kernel(logits, slopes, shift, miss_sum, logps, inv_sum, push, num_rows, BLOCK: tl.constexpr):
    """Statistics of swept rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    gap = tl.load(logits + rows, mask=mask, other=0.0) - tl.load(shift + rows, mask=mask, other=0.0)
    missed = tl.load(miss_sum + rows, mask=mask, other=0.0)
    own = tl.exp(gap)
    total = missed + own
    logp = tl.where(gap == 0.0, -_log1p(missed), gap - tl.log(total))
    tl.store(logps + rows, logp, mask=mask)
    tl.store(inv_sum + rows, 1.0 / total, mask=mask)
    tl.store(push + rows, missed / total * tl.load(slopes + rows, mask=mask, other=0.0), mask=mask)


@triton.jit
def unit_dx_kernel(
    pull, w, targets, inv_sum, push, dx, width, stride_pull, stride_w, stride_dx, scale, BLOCK: tl.constexpr
):
    """dx[r] = scale * (push * w[target] - inv_sum * pull[r])."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    toward = tl.load(push + row) * scale
    inv = tl.load(inv_sum + row) * scale
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        own = tl.load(w + target * stride_w + cols, mask=mask, other=0.0).to(tl.float32)
        away = tl.load(pull + row * stride_pull + cols, mask=mask, other=0.0)
        tl.store(dx + row * stride_dx + cols, toward * own - inv * away, mask=mask)


@triton.jit
def push_dw_kernel(
    x,
    push,
    ids,
    order,
    dw,
    num_rows,
    width,
    stride_x,
    stride_dw,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dw[y] += the sum of push[r] * x[r] over the rows r whose target is y.

    They are neighbors in `order`, which lists rows by target, and `ids` has the targets in that order. The program at
    the first of them adds all: one writer a number, one order.
    """
    at = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + at)
    if tl.load(ids + at - 1, mask=at > 0, other=-1) != target:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
        found = BLOCK_ROWS
        while found == BLOCK_ROWS:
            places = at + tl.arange(0, BLOCK_ROWS)
            mine = tl.load(ids + places, mask=places < num_rows, other=-1) == target
            rows = tl.load(order + places, mask=mine, other=0)
            mask = mine[:, None] & (cols < width)[None, :]
            value = tl.load(x + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += value * tl.load(push + rows, mask=mine, other=0.0)[:, None]
            found = tl.sum(mine.to(tl.int32), axis=0)
            at += BLOCK_ROWS
        to = dw + target * stride_dw + cols
        tl.store(to, tl.load(to, mask=cols < width, other=0.0) + tl.sum(acc, axis=0), mask=cols < width)


@triton.jit
def sequence_sum_kernel(values, cu_seqlens, out, BLOCK: tl.constexpr):
    """out[n] = the sum of the rows of sequence n, in a fixed order."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + n)
    last = tl.load(cu_seqlens + n + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        acc += tl.load(values + rows, mask=rows < last, other=0.0)
    tl.store(out + n, tl.sum(acc, axis=0))
