"""Shared-prompt attention: a prompt is encoded once for all its completions, in one padding-free row of tokens.

A pair is [prompt | chosen | rejected]; the positions of both completions go on from the prompt, and a completion sees
its prompt and itself. The function is registered with transformers' AttentionInterface, so decoder models work
unchanged: it looks for a `SharedPrompts` among the arguments that models pass down, and without one attends as usual.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "bpo_shared_prompt"


@dataclass(frozen=True)
class SharedPrompts:
    """Where the tokens of a packed row belong.

    P groups of a prompt and its completions, S tokens in all, L tokens in the longest group.

    Attributes:
        groups: [P, L] int64. token of the packed row in each place of the padded form; 0 where there is none.
        places: [S] int64. place of each token in the flattened padded form.
        segments: [P, L] int64. 0 in the prompt, k in completion k, -1 where there is no token.
        positions: [P, L] int64. position of each token in its sequence.
    """

    groups: Tensor
    places: Tensor
    segments: Tensor
    positions: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def mask(self, window: int | None) -> Tensor:
        """[P, 1, L, L] bool. True where a query (row) sees a key (column); `window` counts the query itself."""
        if window not in self._masks:
            distance = self.positions[:, :, None] - self.positions[:, None, :]
            segment, key_segment = self.segments[:, :, None], self.segments[:, None, :]
            seen = (distance >= 0) & ((key_segment == 0) | (key_segment == segment)) & (key_segment >= 0)
            if window is not None:
                seen &= distance < window
            # a place without a token sees itself: a row that sees nothing is NaN
            seen |= torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
            self._masks[window] = seen[:, None]
        return self._masks[window]


def lay_out(lengths: Sequence[Sequence[int]], device: torch.device) -> tuple[SharedPrompts, Tensor]:
    """Lays out groups of (prompt length, completion length, ...) one after the other in a packed row.

    Returns:
        (the layout; position of each token of the packed row: [S] int64)
    """
    num, width = len(lengths), max(map(sum, lengths))
    groups = torch.zeros((num, width), dtype=torch.int64)
    segments = torch.full((num, width), -1, dtype=torch.int64)
    positions = torch.zeros((num, width), dtype=torch.int64)
    places, flat_positions, start = [], [], 0
    for g, (prompt, *completions) in enumerate(lengths):
        size = prompt + sum(completions)
        groups[g, :size] = torch.arange(start, start + size)
        places.append(torch.arange(g * width, g * width + size))
        bounds = [(0, 0, prompt)]
        for k, length in enumerate(completions, 1):
            bounds.append((k, bounds[-1][2], bounds[-1][2] + length))
        for k, first, last in bounds:
            segments[g, first:last] = k
            positions[g, first:last] = torch.arange(last - first) + (prompt if k else 0)
        flat_positions.append(positions[g, :size])
        start += size
    layout = SharedPrompts(groups.to(device), torch.cat(places).to(device), segments.to(device), positions.to(device))
    return layout, torch.cat(flat_positions).to(device)


def shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of packed rows, each completion over its own prompt and itself.

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
    num_rows, num_heads, num_tokens, _ = q.shape
    q, k, v = (_padded(x, layout) for x in (q, k, v))
    repeats = num_heads // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    mask = layout.mask(window).repeat(num_rows, 1, 1, 1) if num_rows > 1 else layout.mask(window)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = _capped(q, k, v, mask, scale, softcap)
    flat = out.transpose(1, 2).reshape(num_rows, -1, num_heads, v.shape[-1])
    return flat.index_select(1, layout.places).view(num_rows, num_tokens, num_heads, -1).transpose(1, 2)


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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function that models call; see transformers' AttentionInterface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shared_prompts is not None:
        window = sliding_window or None
        out = shared_prompt_attention(query, key, value, shared_prompts, scale=scale, window=window, softcap=softcap)
        return out.transpose(1, 2).contiguous(), None
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
