"""Log-probs of target tokens and of packed sequences from hidden states, without keeping logits.

Legend: T rows (response tokens only), N sequences, H hidden size, V vocabulary; THV = T * H * V, 2THV FLOP a GEMM.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import MODES, check_cu_seqlens, check_rows, check_scaling, require
from bpo_fast_kernels.rows import Backend, Head, Kept, RowStats

# Most bytes of E that mode="auto" keeps for a trained head until the backward pass.
STORE_BYTES = 1_200_000_000


def linear_token_logps_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """The naive twin of `linear_token_logps`: all logits at once, in the type of its inputs."""
    logits = F.linear(hidden, weight)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None]).squeeze(1)


def linear_logps_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """The naive twin of `linear_logps`, policy rows only."""
    token_logps = linear_token_logps_reference(
        hidden, weight, targets, temperature=temperature, logit_softcap=logit_softcap
    )
    bounds = cu_seqlens.tolist()
    return torch.stack([token_logps[a:b].sum() for a, b in pairwise(bounds)])


def linear_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    mode: str = "auto",
    budget_bytes: int = STORE_BYTES,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-prob of each target under softmax(cap(hidden @ weight.T) / temperature).

    Args:
        hidden: [T, H] float32, bfloat16 or float16. final hidden states of the rows that predict `targets`.
        weight: [V, H] same dtype. output head; gets a gradient only where it requires one.
        targets: [T] int64. token ids, 0 <= target < V.
        temperature: divides the (capped) logits, above 0.
        logit_softcap: cap of Gemma 2, cap * tanh(logits / cap); None for none.
        mode: "forward" (2THV, no gradient), "fused" (4THV, frozen weight: d logp / d hidden is formed with the
            log-probs), "store" (E kept for the backward pass: 6THV, T * V numbers), "recompute" (8THV, nothing kept),
            or "auto": the first that serves the gradients asked for, "store" only while E fits `budget_bytes`.
        budget_bytes: most bytes of E that "auto" keeps.
        backend: "auto", "native", "torch" or "triton".

    Returns:
        [T] float32, nats; differentiable in `hidden` and `weight` unless mode is "forward".

    Raises:
        ValueError: a wrong shape, dtype, device, or range; a target out of range on the CPU.

    Promise: |d logp| <= 1e-4 a token, gradients <= 4e-3 relative (Frobenius) against float64 on the same inputs.
    """
    check_rows(hidden, weight, targets)
    check_scaling(temperature, logit_softcap)
    engine = pick_backend(backend, hidden.device)
    head = Head(weight, 1.0 / temperature, logit_softcap)
    mode = choose_mode(mode, hidden, head, engine, budget_bytes)
    if mode == "forward":
        with torch.no_grad():
            return engine.score(hidden, targets, head).token_logps
    return _TokenLogps.apply(hidden, weight, _Call(targets, head, engine, mode))


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    behavior_hidden: torch.Tensor | None = None,
    behavior_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    mode: str = "auto",
    budget_bytes: int = STORE_BYTES,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sequence log-probs of the policy and, in the same pass, of the behavior on the same targets.

    Args:
        hidden, weight, targets, temperature, logit_softcap, mode, budget_bytes, backend: as in `linear_token_logps`.
        cu_seqlens: [N + 1] int32. row offsets of the sequences, from 0 to T; empty sequences are fine. Its ranges
            are checked where it lies on the CPU.
        behavior_hidden: [T, H] same dtype. the behavior's hidden states of the same rows; they get no gradient.
        behavior_weight: [V, H] same dtype. the behavior's head; `weight` if None.

    Returns:
        logps [N] float32, nats; with `behavior_hidden` (logps, behavior_logps). Equal rows give equal bits.

    Raises:
        ValueError: as `linear_token_logps`; `cu_seqlens` that does not rise from 0 to T.
    """
    check_cu_seqlens(cu_seqlens, len(hidden))
    token_logps = linear_token_logps(
        hidden,
        weight,
        targets,
        temperature=temperature,
        logit_softcap=logit_softcap,
        mode=mode,
        budget_bytes=budget_bytes,
        backend=backend,
    )
    engine = pick_backend(backend, hidden.device)
    logps = sequence_sums(token_logps, cu_seqlens, engine)
    if behavior_hidden is None:
        require(behavior_weight is None, "behavior_weight", "given", "expected None without behavior_hidden")
        return logps
    head = Head(weight if behavior_weight is None else behavior_weight, 1.0 / temperature, logit_softcap)
    check_rows(behavior_hidden, head.weight, targets, "behavior_")
    with torch.no_grad():
        stats = engine.score(behavior_hidden, targets, head)
        return logps, engine.sequence_sums(stats.token_logps, cu_seqlens)


def choose_mode(mode: str, hidden: torch.Tensor, head: Head, engine: Backend, budget_bytes: int) -> str:
    """The written rule behind mode="auto"."""
    require(mode in MODES, "mode", repr(mode), f"expected one of {', '.join(MODES)}")
    trained = head.weight.requires_grad
    if mode == "forward" or not (torch.is_grad_enabled() and (hidden.requires_grad or trained)):
        return "forward"
    if mode != "auto":
        require(mode != "fused" or not trained, "mode", "'fused'", "expected 'store' or 'recompute': weight is trained")
        return mode
    if not trained:
        return "fused"
    return "store" if engine.kept_bytes(len(hidden), head) <= budget_bytes else "recompute"


def sequence_sums(token_logps: torch.Tensor, cu_seqlens: torch.Tensor, engine: Backend) -> torch.Tensor:
    """Differentiable sums over packed sequences."""
    return _SequenceSums.apply(token_logps, cu_seqlens.to(token_logps.device), engine)


@dataclass(frozen=True)
class _Call:
    targets: torch.Tensor
    head: Head
    engine: Backend
    mode: str


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, call: _Call) -> torch.Tensor:
        wants_dx = ctx.needs_input_grad[0]
        unit_dx = kept_e = None
        if call.mode == "store":
            kept = call.engine.score_keep(hidden, call.targets, call.head, wants_dx)
            stats, kept_e, unit_dx = kept.stats, kept.e, kept.unit_dx
        elif wants_dx:
            stats, unit_dx = call.engine.score_dx(hidden, call.targets, call.head)
        else:
            stats = call.engine.score(hidden, call.targets, call.head)
        ctx.call, ctx.kept_e, ctx.unit_dx, ctx.stats = call, kept_e, unit_dx, stats
        ctx.save_for_backward(hidden, weight)
        return stats.token_logps.clone()

    @staticmethod
    def backward(ctx, coefs: torch.Tensor):
        hidden, weight = ctx.saved_tensors
        call: _Call = ctx.call
        stats: RowStats = ctx.stats
        engine, head, coefs = call.engine, call.head, coefs.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            later = ctx.unit_dx is None
            dx = engine.kept_dx(Kept(ctx.kept_e, stats), coefs, head) if later else ctx.unit_dx * coefs[:, None]
            dx = dx.to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if ctx.kept_e is not None:
                engine.kept_dw_(dw, Kept(ctx.kept_e, stats), coefs, hidden, head)
            else:
                engine.recompute_dw_(dw, stats, coefs, hidden, call.targets, head)
            dw = dw.to(weight.dtype)
        return dx, dw, None


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps: torch.Tensor, cu_seqlens: torch.Tensor, engine: Backend) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.num_rows = len(token_logps)
        return engine.sequence_sums(token_logps, cu_seqlens)

    @staticmethod
    def backward(ctx, coefs: torch.Tensor):
        (cu_seqlens,) = ctx.saved_tensors
        return spread(coefs, cu_seqlens, ctx.num_rows), None, None


def spread(values: torch.Tensor, cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[N] -> [T]: every row gets its sequence's value."""
    return torch.repeat_interleave(values, cu_seqlens.diff().long(), output_size=num_rows)
