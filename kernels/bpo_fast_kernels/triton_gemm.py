"""Plan A on the GPU: one GEMM whose epilogue turns logits into E and partial row sums; logits never reach memory.

Policy rows and behavior rows share the launch: `x` holds the policy's rows in whole blocks, then the behavior's. A
row's place there is its slot. Behavior rows may have a head of their own and never store E. Legend: R policy rows.
"""

import triton
import triton.language as tl

from bpo_fast_kernels.triton_passes import _cap


@triton.jit
def exp_gemm_kernel(
    x,
    w,
    w_behavior,
    targets,
    shift,
    flags,
    e,
    partial,
    num_rows,
    num_slots,
    vocab,
    width,
    stride_x,
    stride_w,
    stride_e,
    stride_partial,
    scale,
    softcap,
    TOP: tl.constexpr,
    FLAGGED: tl.constexpr,
    STORE_E: tl.constexpr,
    SECOND_HEAD: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of E and of its row sums (or, with TOP, of its row maxima) into partial[tile of the vocabulary, slot].

    With FLAGGED only row blocks whose flag is set do anything: the second attempt after an overflow is an empty launch
    otherwise. A second head is chosen by pointer, so it cannot be read through a descriptor (TMA).
    """
    policy_blocks = tl.cdiv(num_rows, BLOCK_M)
    row_blocks = tl.cdiv(num_slots, BLOCK_M)
    col_blocks = tl.cdiv(vocab, BLOCK_N)
    # Blocks of rows that share a tile of the head run close together, so that the head is read from memory once.
    pid = tl.program_id(0)
    group = pid // (GROUP_M * col_blocks)
    group_rows = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    row_block = group * GROUP_M + (pid % (GROUP_M * col_blocks)) % group_rows
    col_block = (pid % (GROUP_M * col_blocks)) // group_rows
    if FLAGGED and tl.load(flags + row_block) == 0:
        return
    row = row_block * BLOCK_M
    col = col_block * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for k in range(0, width, BLOCK_K):
            acc = tl.dot(x.load([row, k]), w.load([col, k]).T, acc)
    else:
        head = w
        if SECOND_HEAD and row_block >= policy_blocks:
            head = w_behavior
        rows = row + tl.arange(0, BLOCK_M)
        ids = col + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        # Rows past the end read row 0 and are dropped below, so that the loop needs one mask only.
        x_at = x + tl.where(rows < num_slots, rows, 0).to(tl.int64)[:, None] * stride_x + ks[None, :]
        w_at = head + tl.where(ids < vocab, ids, 0).to(tl.int64)[:, None] * stride_w + ks[None, :]
        for k in range(0, width, BLOCK_K):
            mask = ks[None, :] < width - k
            a = tl.load(x_at, mask=mask, other=0.0)
            b = tl.load(w_at, mask=mask, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
            x_at += BLOCK_K
            w_at += BLOCK_K
    slots = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    logits, slope = _cap(acc, scale, softcap, HAS_CAP)
    dropped = (cols[None, :] == tl.load(targets + slots)[:, None]) | (cols >= vocab)[None, :]
    cell = partial + col_block.to(tl.int64) * stride_partial + slots
    if TOP:
        tl.store(cell, tl.max(tl.where(dropped, float("-inf"), logits), axis=1))
    else:
        exps = tl.where(dropped, 0.0, tl.exp(logits - tl.load(shift + slots)[:, None]))
        tl.store(cell, tl.sum(exps, axis=1))
        if STORE_E and row_block < policy_blocks:
            mask = (slots < num_rows)[:, None] & (cols < vocab)[None, :]
            at = e + slots[:, None] * stride_e + cols[None, :]
            tl.store(at, (exps * slope).to(e.dtype.element_ty), mask=mask)


@triton.jit
def row_sums_kernel(partial, sums, flags, num_tiles, stride_partial, limit, BLOCK_M: tl.constexpr):
    """Row sums from the tiles' in rising order, and a flag for the block if one of them left the safe range."""
    block = tl.program_id(0).to(tl.int64)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M], tl.float32)
    at = partial + slots
    for _ in range(0, num_tiles):
        acc += tl.load(at)
        at += stride_partial
    tl.store(sums + slots, acc)
    bad = (acc <= limit) == 0
    tl.store(flags + block, tl.max(bad.to(tl.int32), axis=0))


@triton.jit
def raise_shift_kernel(partial, sums, logits, shift, flags, num_tiles, stride_partial, limit, BLOCK_M: tl.constexpr):
    """In flagged blocks: the rows past the limit take their largest logit as shift; the others keep theirs."""
    block = tl.program_id(0).to(tl.int64)
    if tl.load(flags + block) == 0:
        return
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.load(logits + slots)
    at = partial + slots
    for _ in range(0, num_tiles):
        top = tl.maximum(top, tl.load(at))
        at += stride_partial
    bad = (tl.load(sums + slots) <= limit) == 0
    tl.store(shift + slots, tl.where(bad, top, tl.load(shift + slots)))
