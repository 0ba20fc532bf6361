"""Scores of preference pairs for training: what both texts of a pair begin with is encoded once, and nothing is padded.

A decoder's state at a token depends on what stands before it alone, so the prompt and the words that the two answers
share need one pass. Other models (encoders, odd attention) are given padded texts, two a pair.
"""

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from bpo_fast.annotate.reward_model import Encoded, RewardScorer
from bpo_fast.attention import exchange_attention_, has_attention_dropout, lay_out, packed_arguments

NUM_TRIED = 2

log = logging.getLogger(__name__)


class PairScores:
    """r(x, chosen) and r(x, rejected) of encoded pairs, differentiable.

    Args:
        scorer: the reward model. Its attention is exchanged where that gives the same scores.
        pairs: encoded pairs; it is tried on the first two whose texts begin alike.
    """

    def __init__(self, scorer: RewardScorer, pairs: Sequence[tuple[Encoded, Encoded]]):
        self._scorer = scorer
        alike = (pair for pair in pairs if num_common(pair[0].ids, pair[1].ids))
        self.packed = self._pack(list(itertools.islice(alike, NUM_TRIED)))

    def __call__(self, pairs: Sequence[tuple[Encoded, Encoded]]) -> Tensor:
        """[2, P] scores of P encoded pairs: the first texts', then the second ones'."""
        if self.packed and all(common := [num_common(one.ids, other.ids) for one, other in pairs]):
            return self._packed(pairs, common)
        return self._scorer.forward([one for one, _ in pairs] + [other for _, other in pairs]).view(2, -1)

    def num_tokens(self, pair: tuple[Encoded, Encoded]) -> int:
        """Tokens that a pair takes in a batch, before padding."""
        one, other = pair
        if self.packed:
            return len(one.ids) + len(other.ids) - num_common(one.ids, other.ids)
        return 2 * max(len(one.ids), len(other.ids))

    def _pack(self, pairs: list[tuple[Encoded, Encoded]]) -> bool:
        model = self._scorer.model
        if not hasattr(model, "score"):
            reason = "it is not a decoder with a score head"
        elif has_attention_dropout(model):
            reason = "its attention has dropout"
        elif not pairs:
            reason = "no pair begins alike"
        else:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                texts = [one for one, _ in pairs] + [other for _, other in pairs]
                reason = exchange_attention_(
                    model,
                    lambda: self._scorer.forward(texts).view(2, -1),
                    lambda: self._packed(pairs, [num_common(one.ids, other.ids) for one, other in pairs]),
                    tolerance=1e-3 if model.dtype == torch.float32 else 0.1,
                )
            model.train(was_training)
        if reason:
            log.warning("%s: pairs are padded, not packed (%s)", type(model).__name__, reason)
        return not reason

    def _packed(self, pairs: Sequence[tuple[Encoded, Encoded]], nums_common: Sequence[int]) -> Tensor:
        model = self._scorer.model
        device = next(model.parameters()).device
        ids, lengths, last, total = [], [], ([], []), 0
        for (one, other), common in zip(pairs, nums_common, strict=True):
            ids += [*one.ids, *other.ids[common:]]
            lengths.append((common, len(one.ids) - common, len(other.ids) - common))
            last[0].append(total + len(one.ids) - 1)
            total += len(one.ids) + len(other.ids) - common
            last[1].append(total - 1)
        layout, positions = lay_out(lengths, device)
        arguments = packed_arguments(layout, positions[None])
        inputs = torch.tensor([ids]).to(device, non_blocking=True)
        states = model.base_model(input_ids=inputs, **arguments).last_hidden_state[0]
        rows = torch.tensor([*last[0], *last[1]]).to(device, non_blocking=True)
        return model.score(states.index_select(0, rows)).view(2, -1)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, one less than the shorter has at most: each keeps its last token to itself."""
    limit = max(0, min(len(one), len(other)) - 1)
    return next((i for i in range(limit) if one[i] != other[i]), limit)
