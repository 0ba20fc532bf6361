"""Shared prompts as variable-length attention: one call for all sequences of a packed row, and no padding.

A packed row is its sequences already: prompt, completion, completion, ... in turn are the queries. A prompt's keys are
its own rows; a completion's are those of its prompt, then its own, gathered. Causal attention aligned at the last query
and key, as flash attention does it, is then exactly what a completion may see. Not yet measured on a GPU.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarlenLayout:
    """Sequences of M packed rows, one row after the other.

    Attributes:
        cu_queries, cu_keys: [N + 1] int32. bounds of the sequences among queries and among gathered keys.
        key_rows: [K] int64. row of the flattened [M * S] keys of each gathered key.
        max_queries, max_keys: of a sequence.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    key_rows: Tensor
    max_queries: int
    max_keys: int


# (q [Tq, heads, D], k [Tk, kv heads, D], v, layout, scale, window or None, softcap or None) -> [Tq, heads, D]
Varlen = Callable[[Tensor, Tensor, Tensor, VarlenLayout, float, int | None, float | None], Tensor]


def bounds_of(lengths: Sequence[int]) -> Tensor:
    """[N + 1] int32 bounds of what lies one after the other."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def lay_out_varlen(lengths: Sequence[Sequence[int]], num_rows: int, device: torch.device) -> VarlenLayout:
    """The sequences of groups of (prompt length, completion length, ...), for `num_rows` rows of the same layout."""
    queries, keys, rows, start = [], [], [], 0
    for prompt, *completions in lengths:
        own = torch.arange(start, start + prompt)
        queries.append(prompt)
        keys.append(prompt)
        rows.append(own)
        start += prompt
        for length in completions:
            queries.append(length)
            keys.append(prompt + length)
            rows += [own, torch.arange(start, start + length)]
            start += length
    one = torch.cat(rows)
    return VarlenLayout(
        bounds_of(queries * num_rows).to(device, non_blocking=True),
        bounds_of(keys * num_rows).to(device, non_blocking=True),
        torch.cat([one + m * start for m in range(num_rows)]).to(device, non_blocking=True),
        max(queries),
        max(keys),
    )


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, call: Varlen, **options: Any) -> Tensor:
    """Attention of packed rows by a variable-length function: q [M, heads, S, D], k and v alike -> [M, heads, S, D]."""
    num_rows, num_heads, num_tokens, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    k, v = k.index_select(0, layout.key_rows), v.index_select(0, layout.key_rows)
    out = call(q, k, v, layout, options["scale"], options["window"], options["softcap"])
    return out.view(num_rows, num_tokens, num_heads, -1).transpose(1, 2)


def pick_varlen(q: Tensor, v: Tensor, softcap: float | None) -> Varlen | None:
    """The written rule: on a GPU from compute capability 8.0, 16-bit heads of up to 256 elements, as many in values as
    in keys, go to flash-attn if it is installed, else to torch's own varlen kernel, which knows no softcap and pads no
    heads to a multiple of 8; the rest goes to SDPA (None)."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    if q.shape[-1] > 256 or v.shape[-1] != q.shape[-1]:
        return None
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    if _has_flash_attn():
        return _flash_attn
    return _torch_varlen if softcap is None and q.shape[-1] % 8 == 0 else None


def varlen_operator() -> Any:
    """As which torch's own kernel is seen by what follows operators; those in it are not."""
    import torch.nn.attention.varlen

    return torch.ops.torch_attn._varlen_attn.default


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The naive twin of the kernels: a sequence at a time, causal from the last query and key."""
    repeats, parts = q.shape[1] // k.shape[1], []
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    bounds = [b.tolist() for b in (layout.cu_queries, layout.cu_keys)]
    for qa, qb, ka, kb in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[qa:qb], k[ka:kb]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(qb - qa)[:, None] + (kb - ka) - (qb - qa) - torch.arange(kb - ka)
        hidden = (distance < 0) | (distance >= (window or kb))
        weights = scores.masked_fill(hidden.to(q.device), -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[ka:kb]))
    return torch.cat(parts)


def _flash_attn(q, k, v, layout, scale, window, softcap) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _torch_varlen(q, k, v, layout, scale, window, softcap) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _asks_for_groups(varlen_attn) else {}
    out = varlen_attn(
        q,
        k,
        v,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor), "no auxiliary result was asked for"
    return out


@cache
def _asks_for_groups(varlen_attn: Callable[..., Any]) -> bool:
    """Whether fewer heads of keys than of queries have to be announced; torch 2.11 takes them without a word."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def _has_flash_attn() -> bool:
    """Whether it imports: a folder of that name can be left from another version, or hold other kernels only."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError):
        return False
    return True
