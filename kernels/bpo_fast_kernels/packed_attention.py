"""Attention of completions over prompts that they share: whole ones in one row without padding, or token by token."""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bpo_fast_kernels.backends import native_ops
from bpo_fast_kernels.checks import NATIVE_FLOATS, check_bounds, check_softcap, require


def _scores_reference(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def packed_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The naive twin of `packed_attention`: all scores of a row at once, in the type of its inputs."""
    starts, num_tokens = cu_seqlens[:-1], q.shape[2]
    sequence = torch.searchsorted(cu_seqlens, torch.arange(num_tokens), right=True) - 1
    group = torch.searchsorted(cu_groups, sequence, right=True) - 1
    prompt = cu_groups[group]
    # a completion goes on from its prompt
    shared = torch.where(sequence == prompt, 0, cu_seqlens[prompt + 1] - cu_seqlens[prompt])
    position = torch.arange(num_tokens) - starts[sequence] + shared
    distance = position[:, None] - position
    seen = (sequence[:, None] == sequence) | (prompt[:, None] == sequence)
    seen &= (distance >= 0) & (distance < (num_tokens if window is None else window))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return _scores_reference(q, k, scale, softcap).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention in which a completion sees its prompt and itself, natively on the CPU.

    A group's keys are packed once for all its queries; scores live in cache, forward and backward. For bfloat16,
    weights meet values in bfloat16, and all sums are float32.

    Args:
        q: [M, heads, S, D] float32 or bfloat16. queries of M rows of the same layout.
        k, v: [M, key-value heads, S, D] of the same type. keys and values.
        cu_seqlens: [N + 1] int32. bounds of the sequences among the S tokens.
        cu_groups: [P + 1] int32. the first sequence of each group, which is its prompt; the others are its completions.
        scale: multiplies the scores.
        window: sliding window in tokens, the query included; None sees all.
        softcap: c of c * tanh(score / c), or None.

    Returns:
        [M, heads, S, D] of that type, laid out as [M, S, heads, D].

    Raises:
        ValueError: a wrong shape, dtype, device or range, or native code cannot be built here.
    """
    require(q.dim() == 4, "q.shape", list(q.shape), "expected [M, heads, S, D]")
    num_rows, num_heads, num_tokens, width = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        fits = x.dim() == 4 and (len(x), *x.shape[2:]) == (num_rows, num_tokens, width)
        require(fits, f"{name}.shape", list(x.shape), f"expected [{num_rows}, heads, {num_tokens}, {width}] like q")
        _check_floats(name, x, q)
    fits = k.shape == v.shape and k.shape[1] > 0 and num_heads % k.shape[1] == 0
    require(fits, "k.shape", list(k.shape), f"does not go with q {list(q.shape)} and v {list(v.shape)}")
    for name, x, count, of in (
        ("cu_seqlens", cu_seqlens, num_tokens, "tokens"),
        ("cu_groups", cu_groups, len(cu_seqlens) - 1, "sequences"),
    ):
        require(x.device.type == "cpu", f"{name}.device", x.device, "expected cpu")
        check_bounds(name, x, count, of)
    groups = cu_groups.tolist()
    require(len(set(groups)) == len(groups), "cu_groups", groups, "expected a prompt in each group")
    require(window is None or window > 0, "window", window, "expected None or a number above 0")
    _check_scores(scale, softcap)
    # native code holds the window in 32 bits, and one as long as the row hides nothing
    window = 0 if window is None or window >= num_tokens else window
    options = (cu_seqlens.contiguous(), cu_groups.contiguous(), float(scale), softcap or 0.0, window)
    return _PackedAttention.apply(*map(_dense, (q, k, v)), options)


def decoded_attention_reference(
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prompts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The naive twin of `decoded_attention`: a row at a time, in the type of its inputs."""
    repeats, out = q.shape[1] // k.shape[1], []
    for row, prompt in enumerate(prompts.tolist()):
        tokens = slice(int(cu_seqlens[prompt]), int(cu_seqlens[prompt + 1]))
        keys, values = (
            torch.cat([shared[0, :, tokens], own[row]], 1).repeat_interleave(repeats, 0)
            for shared, own in ((prompt_k, k), (prompt_v, v))
        )
        out.append(_scores_reference(q[row], keys, scale, softcap).softmax(-1) @ values)
    return torch.stack(out)


def decoded_attention(
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prompts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one new token a row over its prompt, held once for all rows that share it, and what it wrote so far.

    Native, on the CPU; the rows of a prompt take its keys and values from cache. Sums are float32. No gradients.

    Args:
        q: [B, heads, 1, D] float32 or bfloat16. queries of the new tokens.
        prompt_k, prompt_v: [1, key-value heads, S, D] of the same type. of the prompts, one after the other.
        cu_seqlens: [U + 1] int32. bounds of the prompts among the S tokens.
        prompts: [B] int64. the prompt of each row.
        k, v: [B, key-value heads, N, D] likewise. of what the rows wrote, the new token the last.
        scale: multiplies the scores.
        softcap: c of c * tanh(score / c), or None.

    Returns:
        [B, heads, 1, D] of that type; a row's bits do not depend on the rows that share its prompt.

    Raises:
        ValueError: a wrong shape, dtype, device or range, or native code cannot be built here.
    """
    for name, x in (("q", q), ("prompt_k", prompt_k), ("k", k)):
        require(x.dim() == 4, f"{name}.shape", list(x.shape), "expected four dimensions")
    num_rows, num_heads, num_kv_heads, width = len(q), q.shape[1], k.shape[1], q.shape[-1]
    shapes = {
        "q": (q, (num_rows, num_heads, 1, width)),
        "prompt_k": (prompt_k, (1, num_kv_heads, prompt_k.shape[2], width)),
        "prompt_v": (prompt_v, tuple(prompt_k.shape)),
        "k": (k, (num_rows, num_kv_heads, k.shape[2], width)),
        "v": (v, tuple(k.shape)),
    }
    for name, (x, shape) in shapes.items():
        require(tuple(x.shape) == shape, f"{name}.shape", list(x.shape), f"expected {list(shape)}")
        _check_floats(name, x, q)
    fits = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    require(fits, "k.shape", list(k.shape), f"does not go with q {list(q.shape)}")
    require(k.shape[2] > 0, "k.shape", list(k.shape), "expected the new token at least")
    for name, x in (("cu_seqlens", cu_seqlens), ("prompts", prompts)):
        require(x.device.type == "cpu", f"{name}.device", x.device, "expected cpu")
    check_bounds("cu_seqlens", cu_seqlens, prompt_k.shape[2], "tokens")
    require(prompts.dtype == torch.int64, "prompts.dtype", prompts.dtype, "expected torch.int64")
    require(prompts.shape == (num_rows,), "prompts.shape", list(prompts.shape), f"expected [{num_rows}]")
    size = len(cu_seqlens) - 1
    for bound in map(int, prompts.aminmax()) if num_rows else ():
        require(0 <= bound < size, "prompts", bound, f"expected 0 <= prompt < {size}")
    _check_scores(scale, softcap)
    q, prompt_k, prompt_v, k, v = map(_dense, (q, prompt_k, prompt_v, k, v))
    cu_seqlens, prompts = cu_seqlens.contiguous(), prompts.contiguous()
    out = _like(q)
    rows = (q, prompt_k, prompt_v, cu_seqlens, prompts, k, v)
    native_ops(q.device).attend_decoded(*rows, float(scale), softcap or 0.0, out)
    return out


def _check_floats(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    require(x.dtype in NATIVE_FLOATS, f"{name}.dtype", x.dtype, "expected float32 or bfloat16")
    require(x.dtype == like.dtype, f"{name}.dtype", x.dtype, f"expected {like.dtype} like q")
    require(x.device.type == "cpu", f"{name}.device", x.device, "expected cpu")


def _check_scores(scale: float, softcap: float | None) -> None:
    require(math.isfinite(scale), "scale", scale, "expected a finite number")
    check_softcap("softcap", softcap)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: tuple[Any, ...]) -> torch.Tensor:
        out, shifts = _like(q), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
        native_ops(q.device).attend(q, k, v, *options, out, shifts)
        bounds, ctx.options = options[:2], options[2:]
        ctx.save_for_backward(q, k, v, *bounds, out, shifts)  # bounds that were changed would be addresses anywhere
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *rows, out, shifts = ctx.saved_tensors
        grads = [_like(x) for x in rows[:3]]
        native_ops(out.device).attend_backward(*rows, *ctx.options, out, shifts, _dense(dout), *grads)
        return *grads, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With the numbers of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """Room for [M, heads, S, D] as the projections lay it out: [M, S, heads, D]."""
    num_rows, num_heads, num_tokens, width = x.shape
    return x.new_empty((num_rows, num_tokens, num_heads, width)).transpose(1, 2)
