"""RMS norms and gated activations on a GPU: rows by blocks, no atomics, no host sync.

A program holds whole rows of a norm, so that each is read once; the weight's gradient is summed by a fixed number of
programs, in an order that no schedule changes.
"""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

BLOCK = 4096  # numbers of a program
SUMMING = 256  # programs that sum the gradient of a norm's weight, at most
WIDEST = 8192  # of the rows of a norm: the registers of a program hold no more


@triton.jit
def _load(at, rows, cols, stride, mask):
    """A block of rows in float32, 0 outside of the mask."""
    return tl.load(at + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(at, rows, cols, stride, mask, value):
    """A block of rows, rounded to the type that is there."""
    tl.store(at + rows[:, None] * stride + cols[None, :], value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_kernel(
    x,
    w,
    out,
    scales,
    num_rows,
    width,
    stride_x,
    stride_out,
    eps,
    offset,
    TWICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[r] = x[r] * scales[r] * (offset + w), scales[r] = 1 / sqrt(mean(x[r]^2) + eps)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    raw = _load(x, rows, cols, stride_x, mask)
    scale = tl.rsqrt(tl.sum(raw * raw, axis=1) / width + eps)
    tl.store(scales + rows, scale, mask=rows < num_rows)
    value = raw * scale[:, None]
    if TWICE:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    weight = tl.load(w + cols, mask=cols < width, other=0.0).to(tl.float32) + offset
    value = value * weight[None, :]
    _store(out, rows, cols, stride_out, mask, value)


@triton.jit
def rms_norm_backward_kernel(
    dout,
    x,
    w,
    scales,
    dx,
    sums,
    num_rows,
    width,
    stride_dout,
    stride_x,
    stride_dx,
    stride_sums,
    offset,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and of every program the sum over its rows of dout * x * scale."""
    cols = tl.arange(0, COLS)
    inside = cols < width
    weight = tl.load(w + cols, mask=inside, other=0.0).to(tl.float32) + offset
    acc = tl.zeros([COLS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        unit = _load(x, rows, cols, stride_x, mask) * scale
        grad = _load(dout, rows, cols, stride_dout, mask)
        if SUMS:
            acc += tl.sum(grad * unit, axis=0)
        grad = grad * weight[None, :]
        mean = tl.sum(grad * unit, axis=1) / width
        value = (grad - unit * mean[:, None]) * scale
        _store(dx, rows, cols, stride_dx, mask, value)
    if SUMS:
        tl.store(sums + tl.program_id(0).to(tl.int64) * stride_sums + cols, acc, mask=inside)


@triton.jit
def _activation(x, SILU: tl.constexpr):
    """The activation at x and its slope there: both kinds are x sigmoid(t(x))."""
    if SILU:
        gate = tl.sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    else:
        # tanh(u) = 2 sigmoid(2 u) - 1, u = sqrt(2 / pi) (x + 0.044715 x^3); past 16 the gate is open or shut
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)
        gate = tl.sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * near * near))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
        return x * gate, gate * (1.0 + near * (1.0 - gate) * slope)


@triton.jit
def gated_kernel(
    gate,
    up,
    out,
    num_rows,
    width,
    stride_gate,
    stride_up,
    stride_out,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = activation(gate) * up, the activation rounded first."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    x = _load(gate, rows, cols, stride_gate, mask)
    times = _load(up, rows, cols, stride_up, mask)
    active, _ = _activation(x, SILU)
    value = active.to(gate.dtype.element_ty).to(tl.float32) * times
    _store(out, rows, cols, stride_out, mask, value)


@triton.jit
def gated_backward_kernel(
    dout,
    gate,
    up,
    dgate,
    dup,
    num_rows,
    width,
    stride_dout,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dgate = dout * up * slope, dup = dout * activation(gate)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    grad = _load(dout, rows, cols, stride_dout, mask)
    x = _load(gate, rows, cols, stride_gate, mask)
    times = _load(up, rows, cols, stride_up, mask)
    active, slope = _activation(x, SILU)
    active = active.to(gate.dtype.element_ty).to(tl.float32)
    down = grad * times * slope
    _store(dgate, rows, cols, stride_dgate, mask, down)
    _store(dup, rows, cols, stride_dup, mask, grad * active)


def norm_config(width: int) -> dict[str, int]:
    """Rows of a program, their room, and its warps."""
    cols = triton.next_power_of_2(width)
    return {"ROWS": max(1, BLOCK // cols), "COLS": cols, "num_warps": max(8, cols // 512)}


def gate_config(width: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    cols = min(1024, triton.next_power_of_2(width))
    return {"ROWS": BLOCK // cols, "COLS": cols, "num_warps": 8}


def norm(x: torch.Tensor, weight: torch.Tensor, form: tuple[float, float, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, H] normed, [R] float32 scales); `form` is (eps, offset, whether it rounds twice)."""
    (num_rows, width), (eps, offset, twice) = x.shape, form
    out, scales = x.new_empty(x.shape), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if out.numel():
        config = norm_config(width)
        grid = (triton.cdiv(num_rows, config["ROWS"]),)
        strides = (x.stride(0), out.stride(0))
        rms_norm_kernel[grid](x, weight, out, scales, num_rows, width, *strides, eps, offset, TWICE=twice, **config)
    return out, scales


def norm_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    form: tuple[float, float, bool],
    *,
    dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """([R, H], [H] if asked for)."""
    num_rows, width = x.shape
    dx, config = x.new_empty(x.shape), norm_config(width)
    num_programs = triton.cdiv(num_rows, config["ROWS"])
    if dweight:
        num_programs = min(SUMMING, num_programs)
    sums = torch.empty((num_programs, width) if dweight else (1, 1), dtype=torch.float32, device=x.device)
    if dx.numel():
        strides = (dout.stride(0), x.stride(0), dx.stride(0), sums.stride(0))
        args = (dout, x, weight, scales, dx, sums, num_rows, width, *strides, form[1])
        rms_norm_backward_kernel[(num_programs,)](*args, SUMS=dweight, **config)
    return dx, sums.sum(0).to(weight.dtype) if dweight else None


def gating(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """[R, I]"""
    (num_rows, width), out = gate.shape, gate.new_empty(gate.shape)
    if out.numel():
        config = gate_config(width)
        grid = (triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(width, config["COLS"]))
        args = (gate, up, out, num_rows, width, gate.stride(0), up.stride(0), out.stride(0))
        gated_kernel[grid](*args, SILU=activation == "silu", **config)
    return out


def gating_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup), [R, I] each"""
    num_rows, width = gate.shape
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dgate.numel():
        config = gate_config(width)
        grid = (triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(width, config["COLS"]))
        strides = (t.stride(0) for t in (dout, gate, up, dgate, dup))
        args = (dout, gate, up, dgate, dup, num_rows, width, *strides)
        gated_backward_kernel[grid](*args, SILU=activation == "silu", **config)
    return dgate, dup
