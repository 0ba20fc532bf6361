"""Log-probs of target tokens and of packed sequences from hidden states, without keeping logits.

Legend: T rows (response tokens only), N sequences, H hidden size, V vocabulary; THV = T * H * V, 2THV FLOP a GEMM.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import MODES, check_behavior, check_cu_seqlens, check_rows, check_scaling, require
from bpo_fast_kernels.rows import Backend, Head, Rows, Scored

# Most bytes of E that mode="auto" keeps for a trained head until the backward pass.
STORE_BYTES = 1_200_000_000


def logits_reference(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, logit_softcap: float | None
) -> torch.Tensor:
    """[T, V] logits of the twins, over the temperature, in the type of the inputs."""
    logits = F.linear(hidden, weight)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def linear_token_logps_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """The naive twin of `linear_token_logps`: all logits at once, in the type of its inputs."""
    logits = logits_reference(hidden, weight, temperature, logit_softcap)
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


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

    Promise: |d logp| <= 1e-4 a token, gradients <= 4e-3 relative (Frobenius) against float64 on the same inputs, as far
    as their own type can hold them:
        bfloat16 rounds a number by up to 3.9e-3. What a target's row gets, half of a gradient or more, is rounded once,
        with the gradient: errors are 1.7e-3, up to 2.6e-3 where a dozen numbers make up dW (targets of probability
        e^-80 and a sparse head), on a GPU as emulated on a CPU. What other tokens' rows get is rounded with E too and,
        where E was kept, with the scaled hidden states. That averages out over rows and over the numbers of a hidden
        state. It does not where at most 14 rows make up a gradient, each is sure of one wrong token and each hidden
        state is one large number: dW was off by up to 5.4e-3 (4.1e-3 with "recompute" on a GPU), dX by up to 4.6e-3,
        past 4e-3 in 3% and 1% of draws of a single row. Dense hidden states kept to 3.9e-3 even there. Making up for
        what a row of E loses in rounding, by a factor for its sum, would leave 4.6e-3: hence not done.
        float16 loses digits below 6e-5 and is 0 below 3e-8: with every target's probability above 1 - 1e-6 gradients
        were off by 3 to 20%. Scale the loss by 2^14, and they are off by 3e-4.
        Factors of rows are float32: those of targets whose probability times their coefficient is below 1e-38 are lost.
    """
    check_rows(hidden, weight, targets)
    check_scaling(temperature, logit_softcap)
    engine = pick_backend(backend, hidden.device)
    head = Head(weight, 1.0 / temperature, logit_softcap)
    mode = choose_mode(mode, hidden, head, engine, budget_bytes)
    return token_scores(_Call(Rows(hidden, targets.contiguous(), head), None, engine, mode))[0]


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
        cu_seqlens: [N + 1] int32, beside the rows or on the CPU. row offsets of the sequences, from 0 to T; empty
            sequences are fine. Its ranges are checked where it lies on the CPU.
        behavior_hidden: [T, H] same dtype. the behavior's hidden states of the same rows; they get no gradient.
        behavior_weight: [V, H] same dtype. the behavior's head; `weight` if None.

    Returns:
        logps [N] float32, nats; with `behavior_hidden` (logps, behavior_logps). Equal rows give equal bits.

    Raises:
        ValueError: as `linear_token_logps`; `cu_seqlens` that does not rise from 0 to T; rows or a head of the
            behavior in another form than the policy's.
    """
    check_rows(hidden, weight, targets)
    check_cu_seqlens(cu_seqlens, hidden)
    check_scaling(temperature, logit_softcap)
    engine = pick_backend(backend, hidden.device)
    head = Head(weight, 1.0 / temperature, logit_softcap)
    mode = choose_mode(mode, hidden, head, engine, budget_bytes)
    targets, behavior = targets.contiguous(), None
    if behavior_hidden is not None:
        check_behavior(behavior_hidden, behavior_weight, hidden, weight)
        behavior_head = head if behavior_weight is None else replace(head, weight=behavior_weight)
        behavior = Rows(behavior_hidden.detach(), targets, replace(behavior_head, weight=behavior_head.weight.detach()))
    require(behavior_weight is None or behavior is not None, "behavior_hidden", None, "expected with behavior_weight")
    token_logps, behavior_logps = token_scores(_Call(Rows(hidden, targets, head), behavior, engine, mode))
    logps = sequence_sums(token_logps, cu_seqlens, engine)
    if behavior_logps is None:
        return logps
    return logps, sequence_sums(behavior_logps, cu_seqlens, engine)


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
    with torch.cuda.device_of(token_logps):
        return _SequenceSums.apply(token_logps, cu_seqlens.to(token_logps.device, non_blocking=True), engine)


@dataclass(frozen=True)
class _Call:
    rows: Rows
    behavior: Rows | None
    engine: Backend
    mode: str


def token_scores(call: _Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token log-probs of the policy rows, differentiable, and of the behavior rows.

    Triton launches on the current device: every operator makes its tensors' device that. Autograd does it backward.
    """
    with torch.cuda.device_of(call.rows.hidden):
        if call.mode == "forward":
            with torch.no_grad():
                scored = call.engine.score(call.rows, dx=False, keep=False, behavior=call.behavior)
            return scored.stats.token_logps, scored.behavior_logps
        return _TokenLogps.apply(call.rows.hidden, call.rows.head.weight, call)


def hidden_gradient(engine: Backend, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> torch.Tensor:
    """coefs_t * d token_logp_t / d hidden_t, from what the backend formed or kept."""
    if scored.unit_dx is None:
        return engine.kept_dx(scored, coefs, rows, zeros=zeros)
    return scored.unit_dx * coefs[:, None]


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, call: _Call):
        keep = call.mode == "store"
        scored = call.engine.score(call.rows, dx=ctx.needs_input_grad[0], keep=keep, behavior=call.behavior)
        ctx.call, ctx.scored = call, scored
        ctx.save_for_backward(hidden, weight, call.rows.targets)  # read again: a change of one is noticed
        if scored.behavior_logps is not None:
            ctx.mark_non_differentiable(scored.behavior_logps)
        return scored.stats.token_logps.clone(), scored.behavior_logps

    @staticmethod
    @once_differentiable
    def backward(ctx, coefs: torch.Tensor, _):
        hidden, weight, _ = ctx.saved_tensors
        engine, rows, scored = ctx.call.engine, ctx.call.rows, ctx.scored
        coefs = coefs.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = hidden_gradient(engine, scored, coefs, rows, zeros=False).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            sums = engine.dw_sums(weight, 1)
            if scored.e is not None:
                engine.kept_dw_(sums, scored, coefs, rows, zeros=False)
            else:
                engine.recompute_dw_(sums, scored.stats, coefs, rows)
            dw = sums.result().to(weight.dtype)
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
