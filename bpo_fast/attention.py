"""Shared-prompt attention: a prompt is encoded once for all its completions, in one padding-free row of tokens.

A pair is [prompt | chosen | rejected]; the positions of both completions go on from the prompt, and a completion sees
its prompt and itself. The function is registered with transformers' AttentionInterface, so decoder models work
unchanged: it looks for a `SharedPrompts` among the arguments that models pass down, and without one attends as usual.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from bpo_fast_kernels import decoded_attention, packed_attention
from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import NATIVE_FLOATS
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bpo_fast.loading import quiet_transformers
from bpo_fast.varlen import Varlen, VarlenLayout, attend_varlen, bounds_of, lay_out_varlen, pick_varlen

NAME = "bpo_shared_prompt"
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # which it does not have
# lengths, of configurations and of layers, below which a restriction of attention is not felt
SPANS = ("sliding_window", "attention_chunk_size", "floor_scale")
TRIED_SPAN = 6  # tokens
_uncompiled: Any = torch.compiler.disable  # its types forget the arguments of what it decorates


@dataclass(eq=False)  # not frozen, or the compiler of PyTorch 2.11 makes code anew for every number of groups
class SharedPrompts:
    """Where the tokens of a packed row belong.

    P groups of a prompt and its completions, S tokens in all. A group is padded to its prompt in L_p places, then all
    its completions in L_c places, L = L_p + L_c.

    Attributes:
        groups: [P, L] int64. token of the packed row in each place of the padded form; 0 where there is none.
        places: [S] int64. place of each token in the padded form flattened, all prompts first.
        segments: [P, L] int64. 0 in the prompt, k in completion k, -1 where there is no token.
        positions: [P, L] int64. position of each token in its sequence.
        prompts: [P, L_p] int64. the prompts' part of `groups`.
        lengths: of each group's prompt and completions.
    """

    groups: Tensor
    places: Tensor
    segments: Tensor
    positions: Tensor
    prompts: Tensor
    lengths: tuple[tuple[int, ...], ...]
    _masks: dict[tuple[str, int | None], Tensor] = field(default_factory=dict, compare=False, repr=False)
    _varlen: dict[int, VarlenLayout] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt_width(self) -> int:
        """L_p; the shape of a tensor, which a compiler takes as a number that may vary."""
        return self.prompts.shape[1]

    def varlen(self, num_rows: int) -> VarlenLayout:
        """The same as sequences of their own, for `num_rows` packed rows."""
        if num_rows not in self._varlen:
            self._varlen[num_rows] = lay_out_varlen(self.lengths, num_rows, self.places.device)
        return self._varlen[num_rows]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of the sequences among a row's tokens, and of the groups among the sequences: [N + 1] and [P + 1] int32."""
        sequences = [length for group in self.lengths for length in group]
        return bounds_of(sequences), bounds_of([len(group) for group in self.lengths])

    def mask(self, queries: str, window: int | None) -> Tensor:
        """True where a query (row) sees a key (column); `window` counts the query itself.

        Args:
            queries: "prompts" among themselves: [P, 1, L_p, L_p], or "completions" over all: [P, 1, L_c, L].
            window: None sees all.
        """
        key = (queries, window)
        if key not in self._masks:
            cut = self.prompt_width
            rows, columns = (slice(cut), slice(cut)) if queries == "prompts" else (slice(cut, None), slice(None))
            distance = self.positions[:, rows, None] - self.positions[:, None, columns]
            segment, key_segment = self.segments[:, rows, None], self.segments[:, None, columns]
            seen = (distance >= 0) & ((key_segment == 0) | (key_segment == segment)) & (key_segment >= 0)
            if window is not None:
                seen &= distance < window
            # a place without a token sees the prompt's first token: a row that sees nothing is NaN
            seen[:, :, 0] |= segment[:, :, 0] < 0
            self._masks[key] = seen[:, None]
        return self._masks[key]


@dataclass(frozen=True)
class DecodedRows:
    """Whose prompts the rows of a batch go on from, token by token.

    Attributes:
        caches: of each layer, with its prompts' keys and values as `prompts`: twice [1, key-value heads, S, D].
        cu_seqlens: [U + 1] int32. bounds of the prompts among the S tokens.
        prompts: [B] int64. the prompt of each row.
    """

    caches: Sequence[Any]
    cu_seqlens: Tensor
    prompts: Tensor


def lay_out(lengths: Sequence[Sequence[int]], device: torch.device) -> tuple[SharedPrompts, Tensor]:
    """Lays out groups of (prompt length, completion length, ...) one after the other in a packed row.

    Returns:
        (the layout; position of each token of the packed row: [S] int64)
    """
    num, cut = len(lengths), max(prompt for prompt, *_ in lengths)
    rest = max(sum(completions) for _, *completions in lengths)
    groups = torch.zeros((num, cut + rest), dtype=torch.int64)
    segments = torch.full((num, cut + rest), -1, dtype=torch.int64)
    positions = torch.zeros((num, cut + rest), dtype=torch.int64)
    places, flat_positions, start = [], [], 0
    for g, group in enumerate(lengths):
        first = 0
        for k, length in enumerate(group):
            span = torch.arange(length)
            groups[g, first : first + length] = span + start
            segments[g, first : first + length] = k
            positions[g, first : first + length] = span + (group[0] if k else 0)
            flat_positions.append(positions[g, first : first + length])
            places.append(span + (num * cut + g * rest + first - cut if k else g * cut))
            start += length
            first = first + length if k else cut
    groups = groups.to(device, non_blocking=True)
    layout = SharedPrompts(
        groups,
        torch.cat(places).to(device, non_blocking=True),
        segments.to(device, non_blocking=True),
        positions.to(device, non_blocking=True),
        groups[:, :cut].clone(),
        tuple(tuple(group) for group in lengths),
    )
    return layout, torch.cat(flat_positions).to(device, non_blocking=True)


def shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of packed rows, each completion over its own prompt and itself.

    On a GPU one variable-length call, where a kernel for it is there (varlen.py); a CPU has a native kernel for values
    as wide as keys. Else two calls of SDPA: prompts among themselves, causal without a mask, and completions over their
    group. The square of a whole group, most of which no token sees, is never formed.

    Args:
        q: [M, heads, S, D] queries; M rows share the layout.
        k, v: [M, key-value heads, S, D] keys and values.
        layout: where the tokens belong.
        scale: multiplies the scores.
        window: sliding window in tokens, the query included; None sees all.
        softcap: c of c * tanh(score / c), or None.

    Returns:
        [M, heads, S, D], the dtype of q.
    """
    varlen = pick_varlen(q, v, softcap)
    if varlen is not None:
        return _by_varlen(q, k, v, layout, varlen, scale=scale, window=window, softcap=softcap)
    if q.device.type == "cpu" and q.dtype in NATIVE_FLOATS and k.shape == v.shape and has_native():
        return _natively(q, k, v, layout, scale=scale, window=window, softcap=softcap)
    return attend_sdpa(q, k, v, layout, scale, window, softcap)


@torch.compiler.assume_constant_result
def has_native() -> bool:
    """Whether native kernels run on the CPU here."""
    return pick_backend("auto", torch.device("cpu")).name == "native"


@_uncompiled  # kernels of their own, called with host numbers that vary
def _by_varlen(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, call: Varlen, **options: Any) -> Tensor:
    return attend_varlen(q, k, v, layout.varlen(len(q)), call, **options)


@_uncompiled
def _natively(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, **options: Any) -> Tensor:
    return packed_attention(q, k, v, *layout.bounds, **options)


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """`shared_prompt_attention` by two calls of SDPA, or with a softcap in plain PyTorch."""
    num_rows, num_heads, num_tokens, _ = q.shape
    cut = layout.prompt_width
    q, k, v = (_padded(x, layout) for x in (q, k, v))
    repeats = num_heads // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    parts = []
    for name, rows, columns in (("prompts", slice(cut), slice(cut)), ("completions", slice(cut, None), slice(None))):
        # prompts are padded on the right: a causal query never sees the padding
        causal = name == "prompts" and softcap is None and (window is None or window >= cut)
        mask = None if causal else layout.mask(name, window).repeat(num_rows, 1, 1, 1)
        part = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        if softcap is None:
            parts.append(F.scaled_dot_product_attention(*part, attn_mask=mask, is_causal=causal, scale=scale))
        else:
            parts.append(_capped(*part, mask, scale, softcap))
    flat = [out.transpose(1, 2).reshape(num_rows, -1, num_heads, v.shape[-1]) for out in parts]
    out = torch.cat(flat, 1).index_select(1, layout.places)
    return out.view(num_rows, num_tokens, num_heads, -1).transpose(1, 2)


def _padded(x: Tensor, layout: SharedPrompts) -> Tensor:
    """[M, h, S, D] -> [M * P, h, L, D]."""
    num_rows, num_heads, _, size = x.shape
    num_groups, width = layout.groups.shape
    picked = x.transpose(1, 2).index_select(1, layout.groups.flatten())
    return picked.view(num_rows * num_groups, width, num_heads, size).transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    if mask is not None:
        # not -inf: a padded query sees nothing, and its row must stay finite
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    decoded_rows: DecodedRows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function that models call; see transformers' AttentionInterface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shared_prompts is not None:
        if attention_mask is not None and attention_mask.numel() > 1:  # not that of `packed_arguments`
            raise ValueError("its layers make masks of their own")
        window = sliding_window or None
        out = shared_prompt_attention(query, key, value, shared_prompts, scale=scale, window=window, softcap=softcap)
        return out.transpose(1, 2).contiguous(), None
    if decoded_rows is not None:
        if sliding_window:
            raise ValueError("its layers have windows that its cache does not know of")
        prompt_k, prompt_v = decoded_rows.caches[module.layer_idx].prompts
        rows = (decoded_rows.cu_seqlens, decoded_rows.prompts, key, value)
        out = decoded_attention(query, prompt_k, prompt_v, *rows, scale=scale, softcap=softcap)
        return out.transpose(1, 2), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None and query.shape[2] > 1:  # sdpa's masks leave the causal one to a flag
        size = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril(size[1] - size[0])
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _capped(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(device: torch.device) -> Tensor:
    """What models are given for a mask where the attention has its own: one of four dimensions is taken as it is."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def packed_arguments(layout: SharedPrompts, position_ids: Tensor) -> dict[str, Any]:
    """What a model with this module's attention is called with for packed rows, beside their ids.

    Args:
        layout: where the tokens belong.
        position_ids: [M, S] int64.
    """
    return {
        "position_ids": position_ids,
        "attention_mask": no_mask(position_ids.device),
        "use_cache": False,
        "shared_prompts": layout,
    }


def has_attention_dropout(model: Any) -> bool:
    """Whether the model's own attention drops weights while it is trained."""
    return any(getattr(model.config.get_text_config(), name, 0.0) for name in DROPOUTS)


def exchange_attention_(
    model: Any, apart: Callable[[], Tensor], shared: Callable[[], Tensor], *, tolerance: float
) -> str:
    """Gives a model this module's attention if it then computes the same, sliding windows narrowed to a few tokens.

    Args:
        model: a transformers model; it has its own attention again where the reason is not empty.
        apart: numbers that the model gives with its own attention, on sequences by themselves; some are longer than
            `TRIED_SPAN`.
        shared: the same numbers from packed rows, under the new attention.
        tolerance: absolute, and a tenth of it relative. What narrow windows change must be met to its half as well:
            it can be less than the rounding of 16 bits allows.

    Returns:
        Why not, in words; empty if it has the new attention now.
    """
    if model.config._attn_implementation == "sdpa" and _has_softcap(model):
        model.set_attn_implementation("eager")  # some releases let SDPA drop the softcap in silence
    before = model.config._attn_implementation
    wide = apart()
    try:
        with _narrow_spans(model):
            expected = apart()
            with quiet_transformers():  # the caller says in one line what became of it
                model.set_attn_implementation(NAME)
            if model.config._attn_implementation != NAME:
                return "its attention cannot be exchanged"
            found = shared()
        same = torch.allclose(found, expected, rtol=tolerance / 10, atol=tolerance)
        if not torch.equal(wide, expected):
            same &= float((found - expected).norm()) < float((wide - expected).norm()) / 2
        reason = "" if same else f"results differ by {float((found - expected).abs().max()):.3g}"
    except torch.OutOfMemoryError:
        model.set_attn_implementation(before)
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
    if reason:
        model.set_attn_implementation(before)
    return reason


def _has_softcap(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


@contextmanager
def _narrow_spans(model: Any) -> Iterator[None]:
    """Inside, a few tokens are enough to feel every sliding window; models read them from both places."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}
    kept = []
    for owner in (*configs.values(), *model.modules()):
        for name in SPANS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > TRIED_SPAN:
                kept.append((owner, name, value))
                setattr(owner, name, TRIED_SPAN)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
