"""AdamW on a GPU: each weight, its gradient and its moments are read, stepped and written once.

A launch steps many tensors. A table holds a row for each: how many elements, and the addresses of what a step reads and
writes. Tensors are cut into chunks; a list of them says which tensor and which of its chunks a program works in.
"""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bpo_fast_kernels.adamw import Step, Stepped
from bpo_fast_kernels.adamw_moments import BLOCK, kind_of

# What a program steps is the product of the sizes. With 512, 4 to a thread, narrow and wide loads have one layout.
SIZES = {"adamw": {"SIZE": 512}, "adamw_8bit": {"BLOCKS": 4, "SIZE": BLOCK}}
WARPS = 4
CHUNK = 2**13  # elements; programs beyond the end of a tensor end at once
ALIGNMENT = 16  # of addresses in bytes, and of sizes: without it loads are narrow
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}


@triton.jit
def _correction(count, log_beta):
    """1 - beta^count, by its series where the difference would cancel."""
    x = tl.load(count) * log_beta
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8)))
    series = 1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series)))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _pointer(entry, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """What a row of the table points to."""
    pointer = tl.load(entry + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(
    table,
    chunks,
    found_inf,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_INF: tl.constexpr,
):
    """(row of the table, first element, end: 0 where a gradient is not finite) of a program that steps so many."""
    program = tl.program_id(0).to(tl.int64)
    listed = chunks + program // (CHUNK // STEPPED) * 2
    entry = table + tl.load(listed).to(tl.int64) * COLUMNS
    first = tl.load(listed + 1).to(tl.int64) * CHUNK + program % (CHUNK // STEPPED) * STEPPED
    end = tl.load(entry)
    if ALIGNED:
        end = tl.multiple_of(end, 16)
    if HAS_INF:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
    return entry, first, end


@triton.jit
def _gradient(grad, at, inside, grad_scale, HAS_SCALE: tl.constexpr):
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g = g / tl.load(grad_scale)
    return g


@triton.jit
def _step(
    entry,
    at,
    inside,
    m,
    v,
    log_first,
    log_second,
    lr,
    eps,
    kept,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The weights, from the new moments."""
    count, weight = _pointer(entry, 1, tl.float32, False), _pointer(entry, 2, tl.float32, ALIGNED)
    size = (tl.sqrt(v / _correction(count, log_second)) + eps) * _correction(count, log_first)
    w = tl.load(weight + at, mask=inside, other=0.0) * kept - lr * m / size
    tl.store(weight + at, w, mask=inside)
    if ROUNDED is not None:
        tl.store(_pointer(entry, 4, ROUNDED, ALIGNED) + at, w.to(ROUNDED), mask=inside)


@triton.jit
def adamw_kernel(
    table,
    chunks,
    grad_scale,
    found_inf,
    lr,
    beta1,
    beta2,
    rest_first,
    rest_second,
    log_first,
    log_second,
    eps,
    kept,
    GRAD: tl.constexpr,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """See `adamw_`; `kept` is what weight decay leaves, `rest_` is 1 - beta, `log_` that of beta."""
    entry, first, end = _place(table, chunks, found_inf, 7, CHUNK, SIZE, ALIGNED, HAS_INF)
    if first >= end:
        return
    at = first + tl.arange(0, SIZE)
    inside = at < end
    first_moment, second_moment = _pointer(entry, 5, tl.float32, ALIGNED), _pointer(entry, 6, tl.float32, ALIGNED)
    g = _gradient(_pointer(entry, 3, GRAD, ALIGNED), at, inside, grad_scale, HAS_SCALE)
    m = tl.load(first_moment + at, mask=inside, other=0.0) * beta1 + g * rest_first
    v = tl.load(second_moment + at, mask=inside, other=0.0) * beta2 + rest_second * g * g
    tl.store(first_moment + at, m, mask=inside)
    tl.store(second_moment + at, v, mask=inside)
    _step(entry, at, inside, m, v, log_first, log_second, lr, eps, kept, ROUNDED, ALIGNED)


@triton.jit
def adamw_8bit_kernel(
    table,
    chunks,
    grad_scale,
    found_inf,
    lr,
    beta1,
    beta2,
    rest_first,
    rest_second,
    log_first,
    log_second,
    eps,
    kept,
    GRAD: tl.constexpr,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """As `adamw_kernel`, of blocks of codes."""
    entry, first, end = _place(table, chunks, found_inf, 9, CHUNK, BLOCKS * SIZE, ALIGNED, HAS_INF)
    if first >= end:
        return
    first_codes, first_scale = _pointer(entry, 5, tl.int8, ALIGNED), _pointer(entry, 6, tl.float32, False)
    second_codes, second_scale = _pointer(entry, 7, tl.int8, ALIGNED), _pointer(entry, 8, tl.float32, False)
    blocks = first // SIZE + tl.arange(0, BLOCKS)
    begin = blocks[:, None] * SIZE + tl.zeros([1, SIZE], tl.int64)
    at = begin + tl.arange(0, SIZE)[None, :]
    steps, inside = blocks * SIZE < end, at < end
    held = begin < end  # codes are there to the end of a block
    g = _gradient(_pointer(entry, 3, GRAD, ALIGNED), at, inside, grad_scale, HAS_SCALE)
    root = tl.load(first_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    was = root * root * root * tl.load(first_scale + blocks, mask=steps, other=0.0)[:, None]
    m = was * beta1 + g * rest_first
    root = tl.load(second_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    root = root * root
    v = root * root * tl.load(second_scale + blocks, mask=steps, other=0.0)[:, None] * beta2 + rest_second * g * g
    _step(entry, at, inside, m, v, log_first, log_second, lr, eps, kept, ROUNDED, ALIGNED)
    most = tl.max(tl.abs(m), axis=1)
    tl.store(first_scale + blocks, most, mask=steps)
    part = tl.abs(m) / tl.maximum(most, 1.17549435e-38)[:, None]
    code = tl.floor(tl.exp2(tl.log2(part) * (1.0 / 3.0)) * 127.0 + 0.5)
    tl.store(first_codes + at, tl.where(m < 0.0, -code, code).to(tl.int8), mask=held)
    most = tl.max(v, axis=1)
    tl.store(second_scale + blocks, most, mask=steps)
    part = v / tl.maximum(most, 1.17549435e-38)[:, None]
    tl.store(second_codes + at, tl.floor(tl.sqrt(tl.sqrt(part)) * 127.0 + 0.5).to(tl.int8), mask=held)


KERNELS = {"adamw": adamw_kernel, "adamw_8bit": adamw_8bit_kernel}


def launch(tensors: Sequence[Stepped], step: Step) -> None:
    """Weights and moments, in place, and what is rounded; the counts have been raised already."""
    moments, form = kind_of(tensors[0].state), step.form
    rests = [1 - beta for beta in form.betas]
    numbers = (form.lr, *form.betas, *rests, *form.logs, form.eps, 1 - form.lr * form.weight_decay)
    stepped = math.prod(SIZES[moments.name].values())
    device, names = tensors[0].weight.device, list(moments.layout(tensors[0].weight))
    grads = [tensor.grad.contiguous() for tensor in tensors]  # alive until the launches
    alike: dict[tuple[torch.dtype, torch.dtype | None, bool], list[list[int]]] = {}
    for tensor, own in zip(tensors, grads, strict=True):
        if tensor.weight.numel():
            row = _row(tensor, own, names)
            aligned = all(number % ALIGNMENT == 0 for number in (row[0], *row[2:]))
            alike.setdefault((*tensor.types, aligned), []).append(row)
    for (grad, rounded, aligned), rows in alike.items():
        table = torch.tensor(rows).to(device, non_blocking=True)
        chunks = _chunks(tuple(row[0] for row in rows), CHUNK, device)
        options = {"HAS_SCALE": step.grad_scale is not None, "HAS_INF": step.found_inf is not None, "ALIGNED": aligned}
        options |= {"GRAD": TYPES[grad], "ROUNDED": TYPES[rounded], "CHUNK": CHUNK} | SIZES[moments.name]
        # an address that is not read
        scalars = [table if scalar is None else scalar for scalar in (step.grad_scale, step.found_inf)]
        grid = (len(chunks) * (CHUNK // stepped),)
        KERNELS[moments.name][grid](table, chunks, *scalars, *numbers, **options, num_warps=WARPS)


def _row(tensor: Stepped, grad: torch.Tensor, names: Sequence[str]) -> list[int]:
    """Of the table."""
    rounded = 0 if tensor.rounded is None else tensor.rounded.data_ptr()
    kept = [tensor.state[name].data_ptr() for name in names]
    weight = tensor.weight
    return [weight.numel(), tensor.state["step"].data_ptr(), weight.data_ptr(), grad.data_ptr(), rounded, *kept]


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], length: int, device: torch.device) -> torch.Tensor:
    """[chunks, 2] int32: which tensor of these sizes, and which of its chunks. A model's are the same at every step."""
    nums = torch.tensor([-(-size // length) for size in sizes])
    owner = torch.repeat_interleave(nums)
    chunk = torch.arange(len(owner)) - (nums.cumsum(0) - nums)[owner]
    return torch.stack([owner, chunk], 1).to(torch.int32).to(device)
