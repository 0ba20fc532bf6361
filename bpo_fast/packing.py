"""Pairs become micro-batches: sequences side by side, and which rows of the trunk predict a completion token.

Only those rows reach the head. A step's loss is a sum over its pairs divided by the pairs of the whole step, so the
split into micro-batches changes nothing but memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bpo_fast.types import Pair


@dataclass(frozen=True)
class PairBatch:
    """P pairs as N = 2P sequences, all chosen first, then all rejected.

    Attributes:
        input_ids: [N, L] int64. prompt and completion, padded on the right.
        attention_mask: [N, L] int64. 1 on tokens, 0 on padding.
        rows: [T] int64. rows of the flattened [N * L] trunk output that predict a completion token.
        targets: [T] int64. the completion tokens.
        cu_seqlens: [N + 1] int32. bounds of the sequences in `rows` and `targets`.
        pairs: the P pairs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pairs: tuple[Pair, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(2 * len(p.prompt.ids) + len(p.chosen.ids) + len(p.rejected.ids) for p in self.pairs)

    @property
    def lengths(self) -> Tensor:
        """[N] int32. completion lengths."""
        return self.cu_seqlens.diff()


def pack(pairs: Sequence[Pair], *, pad_id: int, device: torch.device) -> PairBatch:
    """Lays out pairs as one `PairBatch`.

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
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        rows=torch.cat(rows).to(device),
        targets=torch.tensor(targets).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32).to(device),
        pairs=tuple(pairs),
    )


def split(pairs: Sequence[Pair], max_tokens: int) -> list[list[Pair]]:
    """Cuts a step's pairs into micro-batches of like length whose padded size stays within `max_tokens`.

    Raises:
        ValueError: one pair alone is over the budget (`optim.microbatch_tokens`).
    """
    parts: list[list[Pair]] = []
    for pair in sorted(pairs, key=_longest, reverse=True):
        if 2 * _longest(pair) > max_tokens:
            raise ValueError(
                f"optim.microbatch_tokens = {max_tokens}: one pair (prompt {pair.prompt.id}) needs {2 * _longest(pair)}"
            )
        # sorted by length, longest first: the first pair of a part sets its width
        if parts and 2 * _longest(parts[-1][0]) * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(pair)
        else:
            parts.append([pair])
    return parts


def _longest(pair: Pair) -> int:
    return len(pair.prompt.ids) + max(len(pair.chosen.ids), len(pair.rejected.ids))
