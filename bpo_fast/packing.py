"""Pairs become micro-batches, and which rows of the trunk predict a completion token.

Shared prompts are the fast form: one padding-free row of tokens in which each prompt stands once, before both of its
completions. Apart is the form for models whose attention cannot do that: two padded sequences a pair. Only rows that
predict a completion token reach the head. A step's loss is a sum over its pairs divided by the pairs of the whole step,
so the split into micro-batches changes nothing but memory. Tensors go to a GPU without a wait (non_blocking).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bpo_fast.attention import SharedPrompts, lay_out
from bpo_fast.types import Pair


@dataclass(frozen=True)
class PairBatch:
    """P pairs, as N = 2P sequences, all chosen first, then all rejected.

    Attributes:
        input_ids: [R, L] int64. R = 1 with shared prompts, else N, padded on the right.
        rows: [T] int64. rows of the flattened [R * L] trunk output that predict a completion token.
        targets: [T] int64. the completion tokens.
        cu_seqlens: [N + 1] int32, on the host. bounds of the sequences in `rows` and `targets`.
        pairs: the P pairs.
        attention_mask: [R, L] int64. 1 on tokens, 0 on padding; None with shared prompts.
        position_ids: [R, L] int64. with shared prompts, else None.
        layout: where the tokens belong, with shared prompts.
    """

    input_ids: Tensor
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pairs: tuple[Pair, ...]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    layout: SharedPrompts | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the 2P sequences, a shared prompt counted for both."""
        return sum(2 * len(p.prompt.ids) + len(p.chosen.ids) + len(p.rejected.ids) for p in self.pairs)

    @property
    def lengths(self) -> Tensor:
        """[N] int32, on the host. completion lengths."""
        return self.cu_seqlens.diff()

    def repeat(self, num_members: int) -> "PairBatch":
        """The same pairs once for each of M members: M P pairs, member by member among the chosen and the rejected."""
        if num_members == 1:
            return self
        num_chosen = int(self.cu_seqlens[len(self.lengths) // 2])
        stride = self.input_ids.numel()

        def by_member(x: Tensor, step: int = 0) -> Tensor:
            sides = (x[:num_chosen], x[num_chosen:])
            return torch.cat([side + m * step for side in sides for m in range(num_members)])

        chosen, rejected = self.lengths.chunk(2)
        lengths = torch.cat([chosen.repeat(num_members), rejected.repeat(num_members)])
        tiled = {
            name: None if x is None else x.repeat(num_members, 1)
            for name, x in (("attention_mask", self.attention_mask), ("position_ids", self.position_ids))
        }
        return replace(
            self,
            input_ids=self.input_ids.repeat(num_members, 1),
            rows=by_member(self.rows, stride),
            targets=by_member(self.targets),
            cu_seqlens=torch.cat([self.cu_seqlens[:1], lengths.cumsum(0, dtype=torch.int32)]),
            **tiled,
        )


def pack_shared(pairs: Sequence[Pair], *, device: torch.device, multiple: int = 1) -> PairBatch:
    """Lays out pairs with shared prompts: [prompt | chosen | rejected] of each, one after the other.

    Args:
        pairs: P pairs with completions of at least one token and prompts of at least one token.
        device: where the tensors go.
        multiple: the row is filled up to a multiple of so many tokens, by a prompt that nobody goes on from.
    """
    ids = [i for p in pairs for i in (*p.prompt.ids, *p.chosen.ids, *p.rejected.ids)]
    lengths = [(len(p.prompt.ids), len(p.chosen.ids), len(p.rejected.ids)) for p in pairs]
    filling = -len(ids) % multiple
    ids += ids[:1] * filling
    layout, positions = lay_out([*lengths, (filling,)] if filling else lengths, device)
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    for prompt, *completions in lengths:
        first = start + prompt
        for side, length in zip(rows, completions, strict=True):
            # the prompt's last row predicts the first token of both completions
            side.append(torch.tensor([start + prompt - 1, *range(first, first + length - 1)]))
            first += length
        start = first
    completions = [p.chosen.ids for p in pairs] + [p.rejected.ids for p in pairs]
    bounds = torch.tensor([0, *map(len, completions)]).cumsum(0, dtype=torch.int32)
    return PairBatch(
        input_ids=torch.tensor([ids]).to(device, non_blocking=True),
        rows=torch.cat([*rows[0], *rows[1]]).to(device, non_blocking=True),
        targets=torch.tensor([i for c in completions for i in c]).to(device, non_blocking=True),
        cu_seqlens=bounds,
        pairs=tuple(pairs),
        position_ids=positions[None],
        layout=layout,
    )


def pack_apart(pairs: Sequence[Pair], *, pad_id: int, device: torch.device) -> PairBatch:
    """Lays out pairs as 2P padded sequences.

    Args:
        pairs: P pairs with completions of at least one token and prompts of at least one token.
        pad_id: id that fills the right side.
        device: where the tensors go.
    """
    sequences = [(p.prompt.ids, p.chosen.ids) for p in pairs] + [(p.prompt.ids, p.rejected.ids) for p in pairs]
    num_sequences, width = len(sequences), max(len(p) + len(c) for p, c in sequences)
    input_ids = torch.full((num_sequences, width), pad_id, dtype=torch.int64)
    mask = torch.zeros((num_sequences, width), dtype=torch.int64)
    rows, targets, bounds = [], [], [0]
    for i, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[i, :length] = torch.tensor(prompt + completion)
        mask[i, :length] = 1
        rows.append(torch.arange(i * width + len(prompt) - 1, i * width + length - 1))
        targets.extend(completion)
        bounds.append(len(targets))
    return PairBatch(
        input_ids=input_ids.to(device, non_blocking=True),
        attention_mask=mask.to(device, non_blocking=True),
        rows=torch.cat(rows).to(device, non_blocking=True),
        targets=torch.tensor(targets).to(device, non_blocking=True),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        pairs=tuple(pairs),
    )


def split(pairs: Sequence[Pair], max_tokens: int, *, shared: bool) -> list[list[Pair]]:
    """Cuts a step's pairs into as few micro-batches of like length as fit `max_tokens`, evenly filled.

    Args:
        pairs: the pairs of a step.
        max_tokens: of a micro-batch, padding included where the form has any.
        shared: True for shared prompts, False for the form apart.

    Raises:
        ValueError: one pair alone is over the budget (`optim.microbatch_tokens`).
    """
    ordered = sorted(pairs, key=lambda p: pair_tokens(p, shared), reverse=True)
    for pair in ordered[:1]:
        if pair_tokens(pair, shared) > max_tokens:
            raise ValueError(
                f"optim.microbatch_tokens = {max_tokens}: one pair (prompt {pair.prompt.id}) needs"
                f" {pair_tokens(pair, shared)}"
            )
    parts = _fill(ordered, max_tokens, shared)
    if len(parts) > 1:  # the same number of parts, the tokens shared out
        low, high = 1, max_tokens
        while low < high:
            middle = (low + high) // 2
            if len(_fill(ordered, middle, shared)) <= len(parts):
                high = middle
            else:
                low = middle + 1
        parts = _fill(ordered, max(high, pair_tokens(ordered[0], shared)), shared)
    return parts


def _fill(ordered: Sequence[Pair], max_tokens: int, shared: bool) -> list[list[Pair]]:
    """Fills parts in order; apart, the first and longest pair of a part sets the width of all."""
    parts: list[list[Pair]] = []
    filled = 0
    for pair in ordered:
        size = pair_tokens(pair, shared) if shared or not parts else pair_tokens(parts[-1][0], shared)
        if parts and filled + size <= max_tokens:
            parts[-1].append(pair)
            filled += size
        else:
            parts.append([pair])
            filled = pair_tokens(pair, shared)
    return parts


def pair_tokens(pair: Pair, shared: bool) -> int:
    """What a pair takes of a micro-batch; apart, without the padding that a longer one causes."""
    prompt, chosen, rejected = len(pair.prompt.ids), len(pair.chosen.ids), len(pair.rejected.ids)
    return prompt + chosen + rejected if shared else 2 * (prompt + max(chosen, rejected))
