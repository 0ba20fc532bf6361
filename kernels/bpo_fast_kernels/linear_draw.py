"""Next tokens straight from hidden states, by inverse transform."""

import torch

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import check_head, check_scaling, require
from bpo_fast_kernels.linear_logps import logits_reference
from bpo_fast_kernels.rows import Head


def linear_draw_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    uniforms: torch.Tensor | None,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive twin of `linear_draw`: all logits at once, in the type of its inputs."""
    logits = logits_reference(hidden, weight, temperature, logit_softcap)
    logps = torch.log_softmax(logits, dim=-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cumulative = logps.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1)


def linear_draw(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    uniforms: torch.Tensor | None,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row from softmax(cap(hidden @ weight.T) / temperature), in the order of their ids.

    "native" sweeps the head once (2THV), keeps the largest logit and the mass of every block of 6 to 112
    tokens (fewer the wider the head), and makes the logits of the one block that a row's number falls on again: no
    [T, V] array of logits exists.

    Args:
        hidden: [T, H] float32, bfloat16 or float16. final hidden states.
        weight: [V, H] same dtype. output head.
        uniforms: [T] float64 in [0, 1), the share of the distribution's mass in front of the token; None: the likeliest
            tokens.
        temperature, logit_softcap, backend: as in `linear_token_logps`.

    Returns:
        (tokens: [T] int64; their log-probs: [T] float32, nats, not finite where a row's logits are not). With
        "native" rows do not depend on each other.

    Raises:
        ValueError: a wrong shape, dtype, device or range; a uniform out of range on the CPU.
    """
    check_head(hidden, weight)
    check_scaling(temperature, logit_softcap)
    if uniforms is not None:
        require(uniforms.dtype == torch.float64, "uniforms.dtype", uniforms.dtype, "expected torch.float64")
        require(uniforms.shape == hidden.shape[:1], "uniforms.shape", list(uniforms.shape), f"expected [{len(hidden)}]")
        require(uniforms.device == hidden.device, "uniforms.device", uniforms.device, f"expected {hidden.device}")
        if uniforms.device.type == "cpu" and uniforms.numel():
            for bound in map(float, uniforms.aminmax()):
                require(0.0 <= bound < 1.0, "uniforms", bound, "expected 0 <= number < 1")
    head = Head(weight.detach(), 1.0 / temperature, logit_softcap)
    return pick_backend(backend, hidden.device).draw(hidden.detach(), head, uniforms)
