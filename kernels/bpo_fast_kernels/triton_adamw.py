"""AdamW with moments of 8 bits on a GPU: each block is read, stepped and written once."""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from bpo_fast_kernels.adamw_8bit import BLOCK, AdamW, State, moments_of

CONFIG = {"BLOCKS": 4, "SIZE": BLOCK, "num_warps": 4}


@triton.jit
def adamw_8bit_kernel(
    weight,
    grad,
    first_codes,
    first_scale,
    second_codes,
    second_scale,
    correction_first,
    correction_second,
    grad_scale,
    found_inf,
    num,
    lr,
    beta2,
    rest_first,
    rest_second,
    eps,
    kept,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """See `adamw_8bit_`; `kept` is what weight decay leaves, `rest_` is 1 - beta."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    begin = blocks[:, None] * SIZE + tl.zeros([1, SIZE], tl.int64)
    at = begin + tl.arange(0, SIZE)[None, :]
    end = tl.zeros([1], tl.int64) + num
    if HAS_INF:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
    steps, inside = blocks * SIZE < end, at < end
    held = begin < end  # codes are there to the end of a block
    g = tl.load(grad + at, mask=inside, other=0.0)
    if HAS_SCALE:
        g = g / tl.load(grad_scale)
    root = tl.load(first_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    was = root * root * root * tl.load(first_scale + blocks, mask=steps, other=0.0)[:, None]
    m = was + (g - was) * rest_first
    root = tl.load(second_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    root = root * root
    v = root * root * tl.load(second_scale + blocks, mask=steps, other=0.0)[:, None] * beta2 + rest_second * g * g
    size = (tl.sqrt(v / tl.load(correction_second)) + eps) * tl.load(correction_first)
    w = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(weight + at, w * kept - lr * m / size, mask=inside)
    most = tl.max(tl.abs(m), axis=1)
    tl.store(first_scale + blocks, most, mask=steps)
    part = tl.abs(m) / tl.maximum(most, 1.17549435e-38)[:, None]
    code = tl.floor(tl.exp2(tl.log2(part) * (1.0 / 3.0)) * 127.0 + 0.5)
    tl.store(first_codes + at, tl.where(m < 0.0, -code, code).to(tl.int8), mask=held)
    most = tl.max(v, axis=1)
    tl.store(second_scale + blocks, most, mask=steps)
    part = v / tl.maximum(most, 1.17549435e-38)[:, None]
    tl.store(second_codes + at, tl.floor(tl.sqrt(tl.sqrt(part)) * 127.0 + 0.5).to(tl.int8), mask=held)


def step(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    form: AdamW,
    corrections: list[torch.Tensor],
    *,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Weight and moments, in place."""
    if not weight.numel():
        return
    scalars = [grad if s is None else s for s in (grad_scale, found_inf)]  # an address that is not read
    rests = [1 - beta for beta in form.betas]
    numbers = (weight.numel(), form.lr, form.betas[1], *rests, form.eps, 1 - form.lr * form.weight_decay)
    options = {"HAS_SCALE": grad_scale is not None, "HAS_INF": found_inf is not None}
    grid = (triton.cdiv(weight.numel(), BLOCK * CONFIG["BLOCKS"]),)
    adamw_8bit_kernel[grid](weight, grad, *moments_of(state), *corrections, *scalars, *numbers, **options, **CONFIG)
