"""What `bench kernels` compares: input sets, float64 answers, and the implementations of every operation.

Operations on T rows, H hidden, V vocabulary, P pairs: "forward" (sequence log-probs), "step" (pair loss from hidden
states with gradients, head frozen or trained), "behavior" (the same with reference log-probs that are computed, too,
from the behavior's hidden states), "draw" (next tokens by inverse transform, with their log-probs), "pair_loss" (losses
and coefficients from sequence log-probs).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bpo_fast_kernels import linear_draw, linear_logps, linear_pair_loss, pair_loss
from bpo_fast_kernels.pair_loss import pair_loss_reference
from bpo_fast_kernels.torch_backend import mm_f32

BETA = 0.1
GRADS = ("dx", "dw", "dq", "dk", "dv", "dgate", "dup")


@dataclass(frozen=True)
class Problem:
    """One question for every implementation.

    Attributes:
        op: "forward", "step", "behavior", "draw" or "pair_loss".
        head: "frozen" or "trained"; matters to "step" and "behavior".
        rows, width, vocab, pairs: T, H, V, P.
        data: "peaked" (logit std 3, mean log-prob -0.4) or "gauss" (logit std 1, random targets).
    """

    op: str
    head: str
    rows: int
    width: int
    vocab: int
    pairs: int
    data: str

    def min_flop(self) -> float:
        """The least any implementation must compute."""
        step = 3 if self.head == "trained" else 2
        gemms = {"forward": 1, "step": step, "behavior": step + 1, "draw": 1, "pair_loss": 0}[self.op]
        return gemms * 2.0 * self.rows * self.width * self.vocab

    def label(self) -> str:
        """A short name for tables and plots."""
        if self.op == "pair_loss":
            return f"pair_loss P={self.pairs}"
        head = f" {self.head}" if self.op in ("step", "behavior") else ""
        return f"{self.op}{head} T={self.rows} H={self.width} V={self.vocab}"


@dataclass(frozen=True)
class Inputs:
    """One input set; sets of a problem share the head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    ref_logps: torch.Tensor
    behavior_hidden: torch.Tensor
    uniforms: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """What an implementation returns.

    Attributes:
        values: sequence log-probs, pair losses, log-probs of drawn tokens, or what attention, norms or gates put out.
        dx, dw, dq, dk, dv, dgate, dup: gradients where the operation has them.
        tokens: [T] int64. drawn ones.
        gaps: [T] float64. of an answer: how far a row's uniform number lies from the shares beside its token's.
    """

    values: torch.Tensor
    dx: torch.Tensor | None = None
    dw: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dgate: torch.Tensor | None = None
    dup: torch.Tensor | None = None

    @property
    def grads(self) -> dict[str, torch.Tensor]:
        """The gradients it has, by name."""
        found = {name: getattr(self, name) for name in GRADS}
        return {name: x for name, x in found.items() if x is not None}


Implementation = Callable[[Any], Outcome]  # of an input set


def make_inputs(problem: Problem, device: torch.device, dtype: torch.dtype, sets: int) -> list[Inputs]:
    """Input sets with fixed seeds; sequences of unequal length, chosen first."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = problem.rows, problem.width, problem.vocab
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype)
    weight.requires_grad_(problem.head == "trained")
    cuts = torch.linspace(0, rows, 2 * problem.pairs + 1).round().int()
    cuts[1:-1] += torch.randint(-3, 4, cuts[1:-1].shape, generator=generator, dtype=torch.int32)
    cuts = cuts.clamp(0, rows).sort().values
    out = []
    for _ in range(sets):
        targets = torch.randint(0, vocab, (rows,), generator=generator)
        hidden = torch.randn(rows, width, generator=generator)
        if problem.data == "peaked":
            own = weight.detach()[targets.to(device)].float().cpu()
            own_norm = own.square().sum(1, keepdim=True)
            level = math.log(vocab) + 4.5 + 0.71  # log sum exp of N(0, 9) logits, and 0.71 above it: p = 0.67
            hidden = 3 * hidden - (3 * hidden * own).sum(1, keepdim=True) / own_norm * own + level * own / own_norm
        ref = -0.4 * cuts.diff().float() + torch.randn(2 * problem.pairs, generator=generator)
        behavior = (hidden + 0.1 * torch.randn(hidden.shape, generator=generator)).to(device, dtype)
        moved = (hidden.to(device, dtype).requires_grad_(), weight, targets.to(device), cuts.to(device), ref.to(device))
        uniforms = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
        out.append(Inputs(*moved, behavior, uniforms))
    return out


def _logps64(hidden: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[2P] float64 sequence log-probs, 128 rows of logits at a time."""
    x, weight, logps = hidden.detach().double(), inputs.weight.detach().double(), []
    for start in range(0, len(x), 128):
        z = x[start : start + 128] @ weight.T
        logps.append(z.gather(1, inputs.targets[start : start + 128, None]).squeeze(1) - z.logsumexp(1))
    return torch.segment_reduce(torch.cat(logps), "sum", lengths=inputs.cu_seqlens.diff().long())


def _drawn64(inputs: Inputs) -> Outcome:
    """The tokens on which the uniform numbers fall, 128 rows at a time."""
    x, weight, parts = inputs.hidden.detach().double(), inputs.weight.detach().double(), []
    for start in range(0, len(x), 128):
        logps = (x[start : start + 128] @ weight.T).log_softmax(1)
        ends, numbers = logps.exp().cumsum(1), inputs.uniforms[start : start + 128, None]
        tokens = torch.searchsorted(ends, numbers, right=True).clamp_max_(len(weight) - 1)
        own, end = logps.gather(1, tokens), ends.gather(1, tokens)
        gaps = torch.minimum(end - numbers, numbers - (end - own.exp()))
        parts.append([part.squeeze(1) for part in (own, tokens, gaps)])
    values, tokens, gaps = (torch.cat(part) for part in zip(*parts, strict=True))
    return Outcome(values, tokens=tokens, gaps=gaps)


def answer(problem: Problem, inputs: Inputs) -> Outcome:
    """float64 on the very same inputs."""
    if problem.op == "draw":
        return _drawn64(inputs)
    if problem.op == "pair_loss":
        return Outcome(pair_loss_reference(inputs.ref_logps.double(), torch.zeros_like(inputs.ref_logps).double())[0])
    sums = _logps64(inputs.hidden, inputs)
    if problem.op == "forward":
        return Outcome(sums)
    ref = _logps64(inputs.behavior_hidden, inputs) if problem.op == "behavior" else inputs.ref_logps.double()
    x, weight, lengths = (
        inputs.hidden.detach().double(),
        inputs.weight.detach().double(),
        inputs.cu_seqlens.diff().long(),
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    leaf = sums.requires_grad_()
    loss, _ = pair_loss_reference(leaf, ref, beta=BETA)
    (slopes,) = torch.autograd.grad(loss.sum() / len(loss), leaf)
    dx = torch.empty_like(x)
    dw = torch.zeros_like(weight) if problem.head == "trained" else None
    for start in range(0, len(x), 128):
        cut = slice(start, start + 128)
        g = torch.softmax(x[cut] @ weight.T, 1).neg_()
        g[torch.arange(len(g), device=x.device), inputs.targets[cut]] += 1
        g *= slopes[owner[cut], None]
        dx[cut] = g @ weight
        if dw is not None:
            dw += g.T @ x[cut]
    return Outcome(loss.detach(), dx, dw)


def errors(got: Outcome, want: Outcome, lengths: torch.Tensor | None) -> dict[str, float]:
    """Largest error of a value a token, and relative Frobenius errors of the gradients.

    Without lengths, of a value, and of its size where that is above 1.
    Of drawn tokens: the largest error of a log-prob, and how far a number lies from all shares but the answer's where
    another token was drawn.
    """
    off = (got.values.double() - want.values).abs()
    if want.tokens is not None and want.gaps is not None:
        same = got.tokens == want.tokens
        return {"logp": float(off.where(same, 0.0).max()), "token": float(want.gaps.where(~same, 0.0).max())}
    summed = lengths is not None and len(lengths) == len(want.values)
    sizes = want.values.abs() if lengths is None else lengths.double() if summed else torch.ones(())
    out = {"value": float((off / sizes.clamp(min=1)).max())}
    for name, right in want.grads.items():
        out[name] = float((getattr(got, name).double() - right).norm() / right.norm())
    return out


def gradients(inputs: Inputs, loss: torch.Tensor, values: torch.Tensor) -> Outcome:
    wanted = [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]
    grads = torch.autograd.grad(loss, wanted)
    return Outcome(values.detach(), grads[0], grads[1] if len(grads) == 2 else None)


def both_ways(
    function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], weights: torch.Tensor, names: Sequence[str]
) -> Outcome:
    """What a function of tensors puts out, and its gradients for that of the output, by these names."""
    out = function(*leaves)
    grads = (grad.detach() for grad in torch.autograd.grad(out, leaves, weights))
    return Outcome(out.detach(), **dict(zip(names, grads, strict=True)))


def ours(problem: Problem, backend: str) -> Implementation:
    """An operator of bpo_fast_kernels on one backend."""

    def forward(inputs: Inputs) -> Outcome:
        args = (inputs.hidden, inputs.weight, inputs.targets, inputs.cu_seqlens)
        logps = linear_logps(*args, mode="forward", backend=backend)
        assert isinstance(logps, torch.Tensor)
        return Outcome(logps)

    def step(inputs: Inputs) -> Outcome:
        args = (inputs.hidden, inputs.weight, inputs.targets, inputs.cu_seqlens, inputs.ref_logps)
        scalar, parts = linear_pair_loss(*args, beta=BETA, backend=backend)
        return gradients(inputs, scalar, parts.loss)

    def behavior(inputs: Inputs) -> Outcome:
        args = (inputs.weight, inputs.targets, inputs.cu_seqlens)
        if problem.head == "frozen":
            logps, ref = linear_logps(inputs.hidden, *args, behavior_hidden=inputs.behavior_hidden, backend=backend)
            parts = pair_loss(logps, ref, beta=BETA, backend=backend)
            return gradients(inputs, parts.loss.sum() / len(parts.loss), parts.loss)
        with torch.no_grad():
            ref = linear_logps(inputs.behavior_hidden, *args, backend=backend)
        assert isinstance(ref, torch.Tensor)
        scalar, parts = linear_pair_loss(inputs.hidden, *args, ref, beta=BETA, backend=backend)
        return gradients(inputs, scalar, parts.loss)

    def draw(inputs: Inputs) -> Outcome:
        tokens, logps = linear_draw(inputs.hidden, inputs.weight, inputs.uniforms, backend=backend)
        return Outcome(logps, tokens=tokens)

    def pairs(inputs: Inputs) -> Outcome:
        parts = pair_loss(inputs.ref_logps, torch.zeros_like(inputs.ref_logps), backend=backend)
        return Outcome(parts.loss)

    return {"forward": forward, "step": step, "behavior": behavior, "draw": draw, "pair_loss": pairs}[problem.op]


def eager(problem: Problem, compiled: bool = False) -> Implementation:
    """F.linear + log_softmax + gather, sums, loss and autograd; softmax + cumsum + searchsorted for a draw."""

    def logps(hidden, weight, targets, owner, count: int) -> torch.Tensor:
        tokens = F.log_softmax(F.linear(hidden, weight).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
        return tokens.new_zeros(count).index_add(0, owner, tokens)

    def drawn(hidden, weight, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
        probs = F.linear(hidden, weight).float().softmax(-1)
        ends = probs.cumsum(-1)
        numbers = uniforms[:, None].float() * ends[:, -1:]
        tokens = torch.searchsorted(ends, numbers, right=True).clamp_max(len(weight) - 1)
        return tokens.squeeze(1), probs.gather(1, tokens).log().squeeze(1)

    scores, draws = (torch.compile(logps), torch.compile(drawn)) if compiled else (logps, drawn)

    def call(inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        lengths = inputs.cu_seqlens.diff().long()
        ids = torch.arange(len(lengths), device=lengths.device)
        owner = torch.repeat_interleave(ids, lengths, output_size=len(hidden))
        return scores(hidden, inputs.weight, inputs.targets, owner, len(lengths))

    def forward(inputs: Inputs) -> Outcome:
        with torch.no_grad():
            return Outcome(call(inputs, inputs.hidden))

    def step(inputs: Inputs) -> Outcome:
        values, _ = pair_loss_reference(call(inputs, inputs.hidden), inputs.ref_logps, beta=BETA)
        return gradients(inputs, values.sum() / len(values), values)

    def behavior(inputs: Inputs) -> Outcome:
        with torch.no_grad():
            ref = call(inputs, inputs.behavior_hidden)
        values, _ = pair_loss_reference(call(inputs, inputs.hidden), ref, beta=BETA)
        return gradients(inputs, values.sum() / len(values), values)

    def draw(inputs: Inputs) -> Outcome:
        with torch.no_grad():
            tokens, values = draws(inputs.hidden, inputs.weight, inputs.uniforms)
        return Outcome(values, tokens=tokens)

    def pairs(inputs: Inputs) -> Outcome:
        return Outcome(pair_loss_reference(inputs.ref_logps, torch.zeros_like(inputs.ref_logps))[0])

    return {"forward": forward, "step": step, "behavior": behavior, "draw": draw, "pair_loss": pairs}[problem.op]


def wide_ceiling(inputs: Inputs) -> Outcome:
    """The product that makes the logits with float32 output: what Plan B pays before its pass."""
    mm_f32(inputs.hidden.detach(), inputs.weight.detach().T)
    return Outcome(inputs.hidden)


def ceiling(problem: Problem) -> Implementation:
    """The bare matrix products of the minimum FLOP, in the inputs' type."""

    def call(inputs: Inputs) -> Outcome:
        x, w = inputs.hidden.detach(), inputs.weight.detach()
        z = torch.mm(x, w.T)
        if problem.op == "behavior":
            torch.mm(inputs.behavior_hidden, w.T)
        if problem.op in ("step", "behavior"):
            torch.mm(z, w)
            if problem.head == "trained":
                torch.mm(z.T, x)
        return Outcome(x)

    return call
