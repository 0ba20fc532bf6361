"""Plan A on the GPU: one GEMM whose epilogue turns logits into E and partial row sums; logits never reach memory.

Policy rows and behavior rows share the launch: `x` holds the policy's rows in whole blocks, then the behavior's. A
row's place there is its slot. Behavior rows may have a head of their own and never store E. Legend: R policy rows.
"""

# `*epilogue` is unpacked by Triton, which knows its length
# pyright: reportCallIssue=false

import triton
import triton.language as tl

from bpo_fast_kernels.triton_passes import _cap


@triton.jit
def _place(tile, row_blocks, col_blocks, GROUP_M: tl.constexpr):
    """(row block, tile of the vocabulary) of a tile.

    Blocks of rows that share a tile of the head run close together, so that the head is read from memory once.
    """
    group = tile // (GROUP_M * col_blocks)
    group_rows = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * col_blocks)
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def _exp_part(
    acc,
    row,
    col,
    targets,
    shift,
    e,
    num_rows,
    vocab,
    stride_e,
    scale,
    softcap,
    TOP: tl.constexpr,
    STORE_E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    E_BY_TMA: tl.constexpr,
):
    """The products of a tile, or of half of one, to E; their row sums (or, with TOP, row maxima)."""
    slots = row.to(tl.int64) + tl.arange(0, acc.shape[0])
    cols = col + tl.arange(0, acc.shape[1])
    logits, slope = _cap(acc, scale, softcap, HAS_CAP)
    dropped = (cols[None, :] == tl.load(targets + slots).to(tl.int32)[:, None]) | (cols >= vocab)[None, :]
    if TOP:
        return tl.max(tl.where(dropped, float("-inf"), logits), axis=1)
    else:
        exps = tl.where(dropped, 0.0, tl.exp(logits - tl.load(shift + slots)[:, None]))
        sums = tl.sum(exps, axis=1)
        if STORE_E and row < num_rows:
            if E_BY_TMA:  # which drops what is beyond E
                e.store([row, col], (exps * slope).to(e.dtype))
            else:
                mask = (slots < num_rows)[:, None] & (cols < vocab)[None, :]
                at = e + slots[:, None] * stride_e + cols[None, :]
                tl.store(at, (exps * slope).to(e.dtype.element_ty), mask=mask)
        return sums


@triton.jit
def _exp_tile(
    place,
    x,
    w,
    w_behavior,
    partial,
    num_slots,
    width,
    stride_x,
    stride_w,
    stride_partial,
    epilogue,
    TOP: tl.constexpr,
    STORE_E: tl.constexpr,
    SECOND_HEAD: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TMA: tl.constexpr,
    E_BY_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One tile; see the kernel. `epilogue` holds the arguments of `_exp_part` beside its products and their place."""
    num_rows, vocab = epilogue[3], epilogue[4]
    row = place[0] * BLOCK_M
    col = place[1] * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for k in range(0, width, BLOCK_K):
            acc = tl.dot(x.load([row, k]), w.load([col, k]).T, acc)
    else:
        head = w
        if SECOND_HEAD and row >= num_rows:
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
    if HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        found = _exp_part(left, row, col, *epilogue, TOP, STORE_E, HAS_CAP, E_BY_TMA)
        other = _exp_part(right, row, col + HALF, *epilogue, TOP, STORE_E, HAS_CAP, E_BY_TMA)
        found = tl.maximum(found, other) if TOP else found + other
    else:
        found = _exp_part(acc, row, col, *epilogue, TOP, STORE_E, HAS_CAP, E_BY_TMA)
    slots = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    tl.store(partial + place[1].to(tl.int64) * stride_partial + slots, found)


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
    PERSISTENT: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Tiles of E and of its row sums (or, with TOP, of its row maxima) into partial[tile of the vocabulary, slot].

    A program makes one tile or, with PERSISTENT, every so many of them: the loads of the next begin before the last is
    written. With FLAGGED only row blocks whose flag is set do anything: the second attempt after an overflow is an
    empty launch otherwise; never persistent. A second head is chosen by pointer, so it cannot be read through a
    descriptor (TMA). HALVES writes half a tile at a time, for want of shared memory.
    """
    tl.static_assert(not (PERSISTENT and FLAGGED))
    row_blocks = tl.cdiv(num_slots, BLOCK_M)
    col_blocks = tl.cdiv(vocab, BLOCK_N)
    first = tl.program_id(0)
    E_BY_TMA: tl.constexpr = TMA and PERSISTENT
    epilogue = (targets, shift, e, num_rows, vocab, stride_e, scale, softcap)
    product = (x, w, w_behavior, partial, num_slots, width, stride_x, stride_w, stride_partial)
    # Twice: a loop over one tile spills on sm_100, and constants in a starred tuple would be tensors.
    if PERSISTENT:
        for tile in tl.range(first, row_blocks * col_blocks, tl.num_programs(0), flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
            _exp_tile(
                _place(tile, row_blocks, col_blocks, GROUP_M),
                *product,
                epilogue,
                TOP,
                STORE_E,
                SECOND_HEAD,
                HAS_CAP,
                TMA,
                E_BY_TMA,
                UPCAST,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                HALVES,
            )
    else:
        place = _place(first, row_blocks, col_blocks, GROUP_M)
        if FLAGGED and tl.load(flags + place[0]) == 0:
            return
        _exp_tile(
            place,
            *product,
            epilogue,
            TOP,
            STORE_E,
            SECOND_HEAD,
            HAS_CAP,
            TMA,
            E_BY_TMA,
            UPCAST,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            HALVES,
        )


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
