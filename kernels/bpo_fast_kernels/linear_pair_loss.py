"""The training step's operator: head, sequence log-probs and preference loss with their gradients in one pass.

A frozen head costs 4THV and a trained one 6THV: chunks hold whole pairs, so the coefficient of every sequence is known
before its dW GEMM, while E of the chunk is still there.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.checks import (
    check_cu_seqlens,
    check_lengths,
    check_logps,
    check_loss,
    check_rows,
    check_scaling,
    require,
)
from bpo_fast_kernels.linear_logps import (
    STORE_BYTES,
    hidden_gradient,
    linear_logps,
    linear_logps_reference,
    spread,
)
from bpo_fast_kernels.pair_loss import PairLoss, pair_loss, pair_loss_reference
from bpo_fast_kernels.rows import Backend, Head, LossSpec, Rows, WeightSums


@dataclass(frozen=True)
class LowRank:
    """A low-rank delta on the head, which becomes weight + scale * b @ a.

    Attributes:
        a: [r, H] like the hidden states.
        b: [V, r] like the hidden states.
        scale: alpha / r of LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def linear_pair_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logps: torch.Tensor | None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    num_pairs: int | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The naive twin of `linear_pair_loss`: (scalar, loss [P], margins [P])."""
    if low_rank is not None:
        weight = weight + low_rank.scale * low_rank.b @ low_rank.a
    logps = linear_logps_reference(
        hidden, weight, targets, cu_seqlens, temperature=temperature, logit_softcap=logit_softcap
    )
    ref = logps.detach() if ref_logps is None else ref_logps
    value, margins = pair_loss_reference(
        logps, ref, loss=loss, beta=beta, label_smoothing=label_smoothing, lengths=cu_seqlens.diff().clamp(min=1)
    )
    return value.sum() / (num_pairs or len(value)), value, margins


def linear_pair_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logps: torch.Tensor | None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    num_pairs: int | None = None,
    lengths: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    low_rank: LowRank | None = None,
    mode: str = "auto",
    budget_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, PairLoss]:
    """Preference loss of packed pairs straight from hidden states.

    Args:
        hidden, weight, targets, temperature, logit_softcap, backend: as in `linear_token_logps`.
        cu_seqlens: [2P + 1] int32. row offsets: all chosen sequences, then all rejected. A trained head and slic cut
            chunks by it on the host: on a GPU, pass it on the CPU to spare a host sync.
        ref_logps: [2P] float32. reference log-probs, nats; None means the reference is the policy itself (the first
            step of a phase): every margin is exactly 0.
        loss, beta, label_smoothing: as in `pair_loss`.
        num_pairs: pairs of the whole step, the divisor of the loss; P if None.
        lengths: [2P] int32, int64 or float32. divisors of ipo, 0 counts as 1; the sequence lengths if None.
        low_rank: a trained delta on a frozen head: 4T(H + r)V + 2TrV, no [V, H] gradient; modes "auto", "fused" and
            "forward". Its product is one with the head's, of width H + r, from a copy [V, H + r] made for the call.
        mode: "fused" (gradients formed in the forward pass, chunk by chunk of whole pairs), "store" and "recompute" (as
            in `linear_token_logps`), "forward" (no gradient), or "auto", which is "fused".
        budget_bytes: most bytes of E a chunk of pairs may take, the backend's own choice if None; pairs stay whole.
            What "native" keeps in a dW that holds no sum yet is not counted.

    Returns:
        (loss, PairLoss): the scalar sum of pair losses / num_pairs, differentiable in `hidden` and `weight`, and the
        parts. The parts carry no gradient. With `low_rank` it is differentiable in `hidden`, `a` and `b`.

    Raises:
        ValueError: as `linear_logps` and `pair_loss`; an odd number of sequences; num_pairs below 1; a delta that does
            not fit the head, or a trained head beside it.

    Promise: that of `linear_token_logps`. A factor on the loss multiplies the finished gradients of "fused". One that
    is no power of two rounds them again if they are bfloat16: errors are 2.6e-3 then, up to 4.4e-3 where few numbers
    make up a gradient. `num_pairs` is no such factor. Those of float16 are float32 until then.
    """
    check_rows(hidden, weight, targets)
    trained = weight
    if low_rank is not None:
        check_low_rank(low_rank, weight, mode)
        trained = low_rank.b
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = torch.cat([hidden, F.linear(hidden, low_rank.a) * low_rank.scale], dim=1)
        weight = torch.cat([weight, low_rank.b.detach()], dim=1)
    check_cu_seqlens(cu_seqlens, hidden, paired=True)
    check_loss(loss, beta, label_smoothing)
    pairs = cu_seqlens.numel() // 2
    divisor = max(pairs, 1) if num_pairs is None else num_pairs
    require(divisor >= 1, "num_pairs", divisor, "expected at least 1")
    row_counts = cu_seqlens.to(hidden.device, non_blocking=True).diff()
    if ref_logps is not None:
        check_logps("ref_logps", ref_logps, row_counts)
    if lengths is not None:
        check_lengths(lengths, row_counts)
    lengths = row_counts if lengths is None else lengths
    grad = torch.is_grad_enabled() and (hidden.requires_grad or trained.requires_grad)
    spec = LossSpec(loss, beta, label_smoothing)
    if grad and mode in ("auto", "fused") and (trained.requires_grad or loss == "slic"):
        check_scaling(temperature, logit_softcap)
        head = Head(weight, 1.0 / temperature, logit_softcap)
        engine = pick_backend(backend, hidden.device)
        chunk_bytes = engine.chunk_bytes if budget_bytes is None else budget_bytes
        call = _Call(targets, cu_seqlens, ref_logps, lengths, head, spec, divisor, chunk_bytes, engine)
        with torch.cuda.device_of(hidden):
            scalar, value, margins, logps = _LinearPairLoss.apply(hidden, trained, call)
        return scalar, PairLoss(value, margins, logps, logps if ref_logps is None else ref_logps)
    logps = linear_logps(
        hidden,
        weight,
        targets,
        cu_seqlens,
        temperature=temperature,
        logit_softcap=logit_softcap,
        mode=mode,
        budget_bytes=STORE_BYTES if budget_bytes is None else budget_bytes,
        backend=backend,
    )
    assert isinstance(logps, torch.Tensor)
    ref = logps.detach() if ref_logps is None else ref_logps
    parts = pair_loss(
        logps, ref, loss=loss, beta=beta, label_smoothing=label_smoothing, lengths=lengths, backend=backend
    )
    return parts.loss.sum() / divisor, PairLoss(parts.loss.detach(), parts.margins, parts.policy_logps, ref)


def check_low_rank(low_rank: LowRank, weight: torch.Tensor, mode: str) -> None:
    """Check [r, H] and [V, r] against a frozen head."""
    (vocab, width), rank = weight.shape, low_rank.a.shape[0] if low_rank.a.dim() else 0
    require(rank > 0, "low_rank.a.shape", list(low_rank.a.shape), f"expected [r, {width}], r at least 1")
    for name, tensor, shape in (("a", low_rank.a, [rank, width]), ("b", low_rank.b, [vocab, rank])):
        require(list(tensor.shape) == shape, f"low_rank.{name}.shape", list(tensor.shape), f"expected {shape}")
        require(tensor.dtype == weight.dtype, f"low_rank.{name}.dtype", tensor.dtype, f"expected {weight.dtype}")
        require(tensor.device == weight.device, f"low_rank.{name}.device", tensor.device, f"expected {weight.device}")
    require(not weight.requires_grad, "weight.requires_grad", True, "expected a frozen head under low_rank")
    require(mode in ("auto", "fused", "forward"), "mode", repr(mode), "expected auto, fused or forward with low_rank")


@dataclass(frozen=True)
class _Call:
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    ref_logps: torch.Tensor | None
    lengths: torch.Tensor
    head: Head
    spec: LossSpec
    divisor: int
    chunk_bytes: int
    engine: Backend


def pair_chunks(bounds: list[int], max_rows: int, free_rows: int = 0) -> list[tuple[int, int]]:
    """Cut pairs into runs of at most `max_rows` rows, `free_rows` more in the first, at least one pair each."""
    pairs = len(bounds) // 2
    chunks, first, rows, room = [], 0, 0, max_rows + free_rows
    for i in range(pairs):
        size = bounds[i + 1] - bounds[i] + bounds[pairs + i + 1] - bounds[pairs + i]
        if i > first and rows + size > room:
            chunks.append((first, i))
            first, rows, room = i, 0, max_rows
        rows += size
    return [*chunks, (first, pairs)] if pairs else chunks


@dataclass
class _Sums:
    """What the chunks fill in."""

    dx: torch.Tensor | None
    dw: WeightSums | None
    loss: torch.Tensor
    margins: torch.Tensor
    logps: torch.Tensor


def _run_chunk_(sums: _Sums, hidden: torch.Tensor, call: _Call, spans: tuple[slice, slice], pairs: slice) -> None:
    """Forward and backward of one run of pairs: `spans` are its chosen and its rejected rows."""
    num_pairs = len(call.lengths) // 2
    chosen = torch.arange(pairs.start, pairs.stop, device=hidden.device)
    both = torch.cat([chosen, chosen + num_pairs])
    chunk = Rows(
        hidden=torch.cat([hidden[span] for span in spans]),
        targets=torch.cat([call.targets[span] for span in spans]),
        head=call.head,
    )
    cu = offsets(call.cu_seqlens.to(hidden.device, non_blocking=True).diff()[both])
    zeros = call.spec.loss == "slic"  # pairs past the margin have coefficient 0: their rows need no gradient
    dx_now = sums.dx is not None and not zeros
    scored = call.engine.score(chunk, dx=dx_now, keep=True, sums=sums.dw)
    logps = call.engine.sequence_sums(scored.stats.token_logps, cu)
    ref = logps if call.ref_logps is None else call.ref_logps[both]
    loss, margins, slope = call.engine.pair_loss(logps, ref, call.lengths[both], call.spec)
    sums.loss[pairs], sums.margins[pairs], sums.logps[both] = loss, margins, logps
    coefs = spread(slope / call.divisor, cu, len(chunk.targets))
    if sums.dx is not None:
        dx = hidden_gradient(call.engine, scored, coefs, chunk, zeros=zeros).to(sums.dx.dtype)
        cut = spans[0].stop - spans[0].start
        sums.dx[spans[0]], sums.dx[spans[1]] = dx[:cut], dx[cut:]
    if sums.dw is not None:
        width = sums.dw.total.shape[1]
        trained = replace(chunk, hidden=chunk.hidden[:, -width:])  # all columns but those of a frozen head
        call.engine.kept_dw_(sums.dw, scored, coefs, trained, zeros=zeros)


def offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Lengths -> cu_seqlens int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


class _LinearPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, trained: torch.Tensor, call: _Call):
        pairs, device = len(call.lengths) // 2, hidden.device
        bounds = call.cu_seqlens.tolist()
        # over many rows: a backend may round E up to whole panels
        max_rows = call.chunk_bytes * 1024 // call.engine.kept_bytes(1024, call.head)
        free_rows = call.engine.free_rows(trained) if ctx.needs_input_grad[1] else 0
        chunks = pair_chunks(bounds, max_rows, free_rows)
        # float16 would lose what the factor of a scaled loss is there to lift
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        sums = _Sums(
            dx=torch.empty_like(hidden, dtype=kept) if ctx.needs_input_grad[0] else None,
            dw=call.engine.dw_sums(trained, len(chunks)) if ctx.needs_input_grad[1] else None,
            loss=torch.empty(pairs, device=device),
            margins=torch.empty(pairs, device=device),
            logps=torch.empty(2 * pairs, device=device),
        )
        for a, b in chunks:
            spans = (slice(bounds[a], bounds[b]), slice(bounds[pairs + a], bounds[pairs + b]))
            _run_chunk_(sums, hidden, call, spans, slice(a, b))
        ctx.grads = (sums.dx, None if sums.dw is None else sums.dw.result().to(kept))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(sums.loss, sums.margins, sums.logps)
        return sums.loss.sum() / call.divisor, sums.loss, sums.margins, sums.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_pair_loss: backward for the second time; its gradients were handed out")
        # Handed out and scaled in place: a second [V, H] would be the largest tensor of the step.
        grads, ctx.grads = ctx.grads, None
        # Two axes keep a factor on a GPU in float32: a tensor without axes would be rounded to the gradient's type.
        factor = grad.view(1, 1) if grad.is_cuda else float(grad)
        for one in grads:
            if one is not None and (grad.is_cuda or factor != 1.0):
                one.mul_(factor)
        return *(None if one is None else one.to(ctx.dtype) for one in grads), None  # copies of float16 alone
