"""Fused operators for preference training: log-probs, losses, sampling, attention, norms, gates and AdamW."""

from bpo_fast_kernels.adamw import adamw_
from bpo_fast_kernels.linear_draw import linear_draw
from bpo_fast_kernels.linear_logps import linear_logps, linear_token_logps
from bpo_fast_kernels.linear_pair_loss import LowRank, linear_pair_loss
from bpo_fast_kernels.packed_attention import decoded_attention, packed_attention
from bpo_fast_kernels.pair_loss import PairLoss, pair_loss
from bpo_fast_kernels.rowwise_linear import rowwise_linear
from bpo_fast_kernels.trunk import gated, rms_norm

__all__ = [
    "LowRank",
    "PairLoss",
    "adamw_",
    "decoded_attention",
    "gated",
    "linear_draw",
    "linear_logps",
    "linear_pair_loss",
    "linear_token_logps",
    "packed_attention",
    "pair_loss",
    "rms_norm",
    "rowwise_linear",
]
