"""The pair loss as one Triton launch: losses, margins and the gradient's coefficients. See pair_loss.py."""

# Triton's launch syntax is beyond a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from bpo_fast_kernels.rows import LossSpec

BLOCK = 128
LOSS_IDS = {"dpo": 0, "ipo": 1, "slic": 2}


@triton.jit
def _softplus(u):
    """log(1 + exp(u)) without overflow."""
    return tl.maximum(u, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(u)))


@triton.jit
def pair_loss_kernel(
    policy,
    ref,
    lengths,
    loss,
    margins,
    slopes,
    num_pairs,
    beta,
    smoothing,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss [P], margins [P] and d loss_p / d policy [2P]; LOSS is 0 dpo, 1 ipo, 2 slic."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < num_pairs
    chosen = tl.load(policy + pair, mask=mask, other=0.0) - tl.load(ref + pair, mask=mask, other=0.0)
    other = pair + num_pairs
    rejected = tl.load(policy + other, mask=mask, other=0.0) - tl.load(ref + other, mask=mask, other=0.0)
    inv_chosen = tl.full([BLOCK], 1.0, tl.float32)
    inv_rejected = tl.full([BLOCK], 1.0, tl.float32)
    if LOSS == 1:
        inv_chosen = 1.0 / tl.maximum(tl.load(lengths + pair, mask=mask, other=1), 1).to(tl.float32)
        inv_rejected = 1.0 / tl.maximum(tl.load(lengths + other, mask=mask, other=1), 1).to(tl.float32)
    h = chosen * inv_chosen - rejected * inv_rejected
    u = beta * h
    if LOSS == 0:
        value = (1.0 - smoothing) * _softplus(-u) + smoothing * _softplus(u)
        slope = beta * (smoothing * tl.sigmoid(u) - (1.0 - smoothing) * tl.sigmoid(-u))
    elif LOSS == 1:
        gap = h - 0.5 / beta
        value = gap * gap
        slope = 2.0 * gap
    else:
        value = tl.maximum(1.0 - u, 0.0)
        slope = tl.where(u >= 1.0, 0.0, -beta)
    tl.store(loss + pair, value, mask=mask)
    tl.store(margins + pair, h, mask=mask)
    tl.store(slopes + pair, slope * inv_chosen, mask=mask)
    tl.store(slopes + other, -slope * inv_rejected, mask=mask)


def pair_slopes_triton(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [P], margins [P], d loss_p / d policy_logps [2P]) in one launch."""
    policy, ref = policy_logps.float().contiguous(), ref_logps.float().contiguous()
    num_pairs = len(policy) // 2
    loss, margins, slopes = policy.new_empty(num_pairs), policy.new_empty(num_pairs), torch.empty_like(policy)
    if num_pairs:
        used = policy if lengths is None else lengths.contiguous()
        args = (policy, ref, used, loss, margins, slopes, num_pairs, spec.beta, spec.label_smoothing)
        pair_loss_kernel[(triton.cdiv(num_pairs, BLOCK),)](*args, LOSS=LOSS_IDS[spec.loss], BLOCK=BLOCK)
    return loss, margins, slopes
