"""AdamW on a GPU: each weight, its gradient and its moments are read, stepped and written once."""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import math

import triton
import triton.language as tl

from bpo_fast_kernels.adamw import Moments, Step
from bpo_fast_kernels.adamw_8bit import BLOCK

# What a program steps is the product of the sizes. With 512, 4 to a thread, narrow and wide loads have one layout.
SIZES = {"adamw": {"SIZE": 512}, "adamw_8bit": {"BLOCKS": 4, "SIZE": BLOCK}}
WARPS = 4


@triton.jit
def _correction(count, log_beta):
    """1 - beta^count, by its series where the difference would cancel."""
    x = tl.load(count) * log_beta
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8)))
    series = 1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series)))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _end(num, found_inf, HAS_INF: tl.constexpr):
    """How many weights are stepped: none where a gradient is not finite."""
    end = tl.zeros([1], tl.int64) + num
    if HAS_INF:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
    return end


@triton.jit
def _gradient(grad, at, inside, grad_scale, HAS_SCALE: tl.constexpr):
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g = g / tl.load(grad_scale)
    return g


@triton.jit
def _step(weight, rounded, at, inside, m, v, count, log_first, log_second, lr, eps, kept, ROUNDS: tl.constexpr):
    """The weights, from the new moments."""
    size = (tl.sqrt(v / _correction(count, log_second)) + eps) * _correction(count, log_first)
    w = tl.load(weight + at, mask=inside, other=0.0) * kept - lr * m / size
    tl.store(weight + at, w, mask=inside)
    if ROUNDS:
        tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def adamw_kernel(
    weight,
    grad,
    rounded,
    first_moment,
    second_moment,
    count,
    grad_scale,
    found_inf,
    num,
    lr,
    beta1,
    beta2,
    rest_first,
    rest_second,
    log_first,
    log_second,
    eps,
    kept,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    ROUNDS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """See `adamw_`; `kept` is what weight decay leaves, `rest_` is 1 - beta, `log_` that of beta."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < _end(num, found_inf, HAS_INF)
    g = _gradient(grad, at, inside, grad_scale, HAS_SCALE)
    m = tl.load(first_moment + at, mask=inside, other=0.0) * beta1 + g * rest_first
    v = tl.load(second_moment + at, mask=inside, other=0.0) * beta2 + rest_second * g * g
    tl.store(first_moment + at, m, mask=inside)
    tl.store(second_moment + at, v, mask=inside)
    _step(weight, rounded, at, inside, m, v, count, log_first, log_second, lr, eps, kept, ROUNDS)


@triton.jit
def adamw_8bit_kernel(
    weight,
    grad,
    rounded,
    first_codes,
    first_scale,
    second_codes,
    second_scale,
    count,
    grad_scale,
    found_inf,
    num,
    lr,
    beta1,
    beta2,
    rest_first,
    rest_second,
    log_first,
    log_second,
    eps,
    kept,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """See `adamw_8bit_`; the numbers are those of `adamw_kernel`."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    begin = blocks[:, None] * SIZE + tl.zeros([1, SIZE], tl.int64)
    at = begin + tl.arange(0, SIZE)[None, :]
    end = _end(num, found_inf, HAS_INF)
    steps, inside = blocks * SIZE < end, at < end
    held = begin < end  # codes are there to the end of a block
    g = _gradient(grad, at, inside, grad_scale, HAS_SCALE)
    root = tl.load(first_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    was = root * root * root * tl.load(first_scale + blocks, mask=steps, other=0.0)[:, None]
    m = was * beta1 + g * rest_first
    root = tl.load(second_codes + at, mask=held, other=0).to(tl.float32) / 127.0
    root = root * root
    v = root * root * tl.load(second_scale + blocks, mask=steps, other=0.0)[:, None] * beta2 + rest_second * g * g
    _step(weight, rounded, at, inside, m, v, count, log_first, log_second, lr, eps, kept, ROUNDS)
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


def launch(step: Step, moments: Moments) -> None:
    """Weight and moments, in place, and what is rounded; the count has been raised already."""
    weight, grad, state, form = step.weight, step.grad.contiguous(), step.state, step.form
    if not weight.numel():
        return
    kept = [state[name] for name in moments.layout(weight)]
    # an address that is not read or written
    rounded, *scalars = [grad if t is None else t for t in (step.rounded, step.grad_scale, step.found_inf)]
    rests = [1 - beta for beta in form.betas]
    numbers = (form.lr, *form.betas, *rests, *form.logs, form.eps, 1 - form.lr * form.weight_decay)
    given = {"HAS_SCALE": step.grad_scale, "HAS_INF": step.found_inf, "ROUNDS": step.rounded}
    options = {name: tensor is not None for name, tensor in given.items()} | SIZES[moments.name]
    grid = (triton.cdiv(weight.numel(), math.prod(SIZES[moments.name].values())),)
    tensors = (weight, grad, rounded, *kept, state["step"], *scalars)
    KERNELS[moments.name][grid](*tensors, weight.numel(), *numbers, **options, num_warps=WARPS)
