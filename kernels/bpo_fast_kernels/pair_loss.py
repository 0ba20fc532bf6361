"""The preference losses of a batch of pairs: dpo, ipo and slic with their closed-form gradient.

Legend: P pairs; vectors of 2P hold all chosen sequences first, then all rejected. With h the margin (policy
minus reference, chosen minus rejected; for ipo every log-prob is divided by its length):

    dpo   -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)    (Rafailov et al. 2023, eq. 7; eps: cDPO)
    ipo   (h - 1 / (2 beta))^2                                         (Azar et al. 2023, eq. 17)
    slic  max(0, 1 - beta h)                                           (Zhao et al. 2023, eq. 3)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import check_lengths, check_logps, check_loss, require
from bpo_fast_kernels.rows import Backend, LossSpec


@dataclass(frozen=True)
class PairLoss:
    """Losses and margins of P pairs.

    Attributes:
        loss: [P] float32. loss of each pair.
        margins: [P] float32, no gradient. h, nats (ipo: nats a token).
        policy_logps: [2P] float32, no gradient. sequence log-probs of the policy, nats.
        ref_logps: [2P] float32, no gradient. the same of the reference.
    """

    loss: torch.Tensor
    margins: torch.Tensor
    policy_logps: torch.Tensor
    ref_logps: torch.Tensor


def pair_loss_reference(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive twin of `pair_loss`: (loss [P], margins [P]) with autograd's gradient."""
    ratios = policy_logps - ref_logps
    if loss == "ipo":
        assert lengths is not None
        ratios = ratios / lengths
    chosen, rejected = ratios.chunk(2)
    h = chosen - rejected
    if loss == "dpo":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h), h
    if loss == "slic":
        return torch.relu(1 - beta * h), h
    return (h - 1 / (2 * beta)) ** 2, h


def pair_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> PairLoss:
    """Loss and margin of every pair, with the gradient formed in the same pass.

    Args:
        policy_logps: [2P] float32. sequence log-probs of the policy, nats; chosen, then rejected.
        ref_logps: [2P] float32. the same of the reference; gets no gradient.
        loss: "dpo", "ipo" or "slic".
        beta: temperature of the loss, above 0.
        label_smoothing: eps, 0 <= eps < 0.5, for dpo only.
        lengths: [2P] int32, int64 or float32. completion tokens; required by ipo (ones give its sum form), unused by
            the others. A length of 0 counts as 1.
        backend: "auto", "native", "torch" or "triton".

    Returns:
        PairLoss; its `loss` is differentiable in `policy_logps`.

    Raises:
        ValueError: an unknown loss, a number out of range, vectors that do not match, ipo without lengths, a length
            below 0 on the CPU.
    """
    check_loss(loss, beta, label_smoothing)
    require(policy_logps.dim() == 1, "policy_logps.shape", list(policy_logps.shape), "expected [2P]")
    require(len(policy_logps) % 2 == 0, "policy_logps.shape", list(policy_logps.shape), "expected an even length, [2P]")
    check_logps("policy_logps", policy_logps, policy_logps)
    check_logps("ref_logps", ref_logps, policy_logps)
    require(lengths is not None or loss != "ipo", "lengths", None, "expected [2P], required by loss 'ipo'")
    if lengths is not None:
        check_lengths(lengths, policy_logps)
    call = _Call(ref_logps, lengths, LossSpec(loss, beta, label_smoothing), pick_backend(backend, policy_logps.device))
    with torch.cuda.device_of(policy_logps):
        value, margins = _PairLoss.apply(policy_logps, call)
    return PairLoss(value, margins, policy_logps.detach(), ref_logps.detach())


@dataclass(frozen=True)
class _Call:
    ref_logps: torch.Tensor
    lengths: torch.Tensor | None
    spec: LossSpec
    engine: Backend


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy_logps: torch.Tensor, call: _Call):
        loss, margins, slope = call.engine.pair_loss(policy_logps, call.ref_logps, call.lengths, call.spec)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(margins)
        return loss, margins

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: torch.Tensor, _):
        (slope,) = ctx.saved_tensors
        return grad_loss.repeat(2) * slope, None
