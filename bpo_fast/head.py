"""The output head of a model: in which way its hidden rows become logits."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bpo_fast_kernels import rowwise_linear
from bpo_fast_kernels.torch_backend import mm_f32
from torch import Tensor
from transformers import PreTrainedModel

from bpo_fast.attention import has_native
from bpo_fast.loading import head_weight, num_embeddings, trunk_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """How hidden rows become logits.

    Attributes:
        fused: logits are scale * softcap(hidden @ weight.T), so that the fused kernels apply.
        softcap: c of c * tanh(z / c), or None.
        scale: a constant factor, 1 for most models.
    """

    fused: bool
    softcap: float | None = None
    scale: float = 1.0

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """What operators on hidden rows take, for logits over this temperature."""
        return {"temperature": temperature / self.scale, "logit_softcap": self.softcap}

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., V] float32 logits of hidden rows; only where `fused`."""
        logits = unrounded_logits(hidden, weight)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.scale == 1 else self.scale * logits


def unrounded_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden W^T + bias in float32, as training has it: in bfloat16 logits of 16 to 32 have steps of 0.125.

    On a CPU without native code they are rounded still: it would take a float32 copy of W.

    Args:
        hidden: [..., H] of any float type.
        weight: [V, H] of the same type.
        bias: [V] of the same type, or None.

    Returns:
        [..., V] float32.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = mm_f32(hidden.reshape(-1, hidden.shape[-1]), weight.T).view(*hidden.shape[:-1], len(weight))
        return logits if bias is None else logits + bias
    if hidden.is_cpu and hidden.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and has_native():
        return rowwise_linear(hidden, weight, bias)
    return F.linear(hidden, weight, bias).float()


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> Head:
    """Compares the model's own logits with scale * softcap(hidden @ weight.T) on a few tokens."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # a small one would pass below in 16 bits, and zeros can be trained
        log.warning("%s: a head with a bias; logits are taken whole", type(model).__name__)
        return Head(fused=False)
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 6, device=model.device)[None] % num_embeddings(model)
    own = model(input_ids=ids, use_cache=False).logits.double()
    hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    plain = (hidden @ head_weight(model).T).double()
    if softcap:
        plain = softcap * torch.tanh(plain / softcap)
    scale = float((own * plain).sum() / (plain * plain).sum().clamp_min(1e-30))
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    unscaled = abs(scale - 1) < tolerance
    same = torch.allclose(own, scale * plain, rtol=tolerance, atol=tolerance * float(own.abs().max()))
    if same and scale > 0:
        return Head(fused=True, softcap=softcap, scale=1.0 if unscaled else scale)
    log.warning("%s: a head of a form of its own; logits are taken whole", type(model).__name__)
    return Head(fused=False)
