"""dX and dW from kept E for the rows that have a coefficient, without asking the host how many there are.

slic gives pairs past their margin coefficient 0. `order` lists the live rows first; row blocks past `num_live` leave at
once and dW sums over live rows only, so both products cost what the live rows cost.
"""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl


@triton.jit
def live_pull_kernel(
    e,
    w,
    order,
    num_live,
    pull,
    vocab,
    width,
    stride_e,
    stride_w,
    stride_pull,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """pull[r] = e[r] @ w of a block of live rows; pull starts as zeros."""
    col_blocks = tl.cdiv(width, BLOCK_N)
    first = (tl.program_id(0) // col_blocks) * BLOCK_M
    live = tl.load(num_live)
    if first >= live:
        return
    slots = first + tl.arange(0, BLOCK_M)
    rows = tl.load(order + slots, mask=slots < live, other=0)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    e_at = e + rows[:, None] * stride_e + ks[None, :]
    w_at = w + ks[:, None].to(tl.int64) * stride_w + cols[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, vocab, BLOCK_K):
        a = tl.load(e_at, mask=ks[None, :] < vocab - k, other=0.0)
        b = tl.load(w_at, mask=(ks[:, None] < vocab - k) & (cols[None, :] < width), other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
        e_at += BLOCK_K
        w_at += BLOCK_K * stride_w
    mask = (slots < live)[:, None] & (cols < width)[None, :]
    tl.store(pull + rows[:, None] * stride_pull + cols[None, :], acc, mask=mask)


@triton.jit
def live_dw_kernel(
    e,
    scaled,
    order,
    num_live,
    dw,
    vocab,
    width,
    stride_e,
    stride_scaled,
    stride_dw,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw[v] += sum over live rows of e[r, v] * scaled[r]; one writer a tile."""
    col_blocks = tl.cdiv(width, BLOCK_N)
    ids = (tl.program_id(0) // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = tl.load(num_live)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, live, BLOCK_K):
        slots = k + tl.arange(0, BLOCK_K)
        rows = tl.load(order + slots, mask=slots < live, other=0)
        some = (slots < live)[:, None]
        a = tl.load(e + rows[:, None] * stride_e + ids[None, :], mask=some & (ids < vocab)[None, :], other=0.0)
        b = tl.load(
            scaled + rows[:, None] * stride_scaled + cols[None, :], mask=some & (cols < width)[None, :], other=0.0
        )
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
    at = dw + ids[:, None].to(tl.int64) * stride_dw + cols[None, :]
    mask = (ids < vocab)[:, None] & (cols < width)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


def live_config(dtype: torch.dtype, *, cuda: bool) -> dict[str, int]:
    """Tile and launch shape; float32 takes a quarter of the depth: at half of it, sm_80 spills 50 to 110 words."""
    if not cuda:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    depth = 16 if dtype == torch.float32 else 64
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": depth, "num_warps": 8, "num_stages": 3}


def live_order(coefs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers with the live rows first, and their number, both on the device."""
    dead = coefs == 0
    return torch.argsort(dead.to(torch.int8), stable=True), (~dead).sum().to(torch.int32)


def live_pull(e: torch.Tensor, weight: torch.Tensor, coefs: torch.Tensor) -> torch.Tensor:
    """e @ weight of the live rows, zero elsewhere; [T, H] float32."""
    order, num_live = live_order(coefs)
    pull, config = torch.zeros(len(e), weight.shape[1], device=e.device), live_config(e.dtype, cuda=e.is_cuda)
    if pull.numel():
        grid = (triton.cdiv(len(e), config["BLOCK_M"]) * triton.cdiv(pull.shape[1], config["BLOCK_N"]),)
        args = (e, weight, order, num_live, pull, *weight.shape, e.stride(0), weight.stride(0), pull.stride(0))
        live_pull_kernel[grid](*args, **config)
    return pull


def live_dw_(dw: torch.Tensor, e: torch.Tensor, scaled: torch.Tensor, coefs: torch.Tensor) -> None:
    """dw += e.T @ scaled over the live rows."""
    order, num_live = live_order(coefs)
    config = live_config(e.dtype, cuda=e.is_cuda)
    grid = (triton.cdiv(dw.shape[0], config["BLOCK_M"]) * triton.cdiv(dw.shape[1], config["BLOCK_N"]),)
    args = (e, scaled, order, num_live, dw, *dw.shape, e.stride(0), scaled.stride(0), dw.stride(0))
    live_dw_kernel[grid](*args, **config)
