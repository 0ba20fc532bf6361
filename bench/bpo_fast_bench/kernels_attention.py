"""Attention in `bench kernels`: P pairs of a prompt and two completions, heads of 64, forward and backward.

Ours take one packed row of S tokens, each prompt once: "native" and "torch" are `packed_attention` and its twin,
"varlen" (on a GPU) and "masked" the ways of bpo_fast.attention through kernels of others. "eager" is what other
trainers do: causal SDPA of 2P rows of L tokens, a prompt in both of its rows. Lengths are equal, which spares those
rows all padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from bpo_fast_kernels import packed_attention
from bpo_fast_kernels.checks import NATIVE_FLOATS
from bpo_fast_kernels.packed_attention import packed_attention_reference

from bpo_fast.attention import SharedPrompts, attend_sdpa, lay_out
from bpo_fast.varlen import attend_varlen, pick_varlen
from bpo_fast_bench.kernels_impls import Implementation, Outcome, both_ways

WIDTH = 64
SCALE = WIDTH**-0.5
GRADS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class AttentionProblem:
    """One question for every implementation: P pairs of a prompt and two completions of so many tokens."""

    prompt_tokens: int
    completion_tokens: int
    heads: int
    pairs: int
    op: str = "attention"

    def min_flop(self) -> float:
        """Two products forward and four backward, of what each token sees."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        seen = prompt * (prompt + 1) / 2 + 2 * (completion * prompt + completion * (completion + 1) / 2)
        return 6 * 2.0 * WIDTH * self.heads * self.pairs * seen

    def label(self) -> str:
        """A short name for tables and plots."""
        return f"attention {self.prompt_tokens}/{self.completion_tokens} heads={self.heads} P={self.pairs}"


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys, values and the gradient of the output, in both forms.

    Attributes:
        packed: [1, heads, S, D] each, laid out as projections do.
        padded: [2P, heads, L, D] each, all chosen first. Halves of a prompt's gradient come from its two copies.
        layout: of the packed row.
    """

    packed: tuple[torch.Tensor, ...]
    padded: tuple[torch.Tensor, ...]
    layout: SharedPrompts

    def shared(self, outcome: Outcome) -> Outcome:
        """What padded rows gave, as the packed row has it: outputs of a prompt's copies averaged, gradients added."""
        prompt, completion, _ = self.layout.lengths[0]

        def share(x: torch.Tensor, of_each: float = 1.0) -> torch.Tensor:
            sides = (side.split([prompt, completion], 1) for side in x.double().transpose(1, 2).chunk(2))
            (one, chosen), (other, rejected) = sides
            return torch.cat([of_each * (one + other), chosen, rejected], 1).flatten(0, 1).transpose(0, 1)[None]

        grads = {name: share(x) for name, x in outcome.grads.items()}
        return replace(outcome, values=share(outcome.values, 0.5), **grads)


def attention_inputs(
    problem: AttentionProblem, device: torch.device, dtype: torch.dtype, sets: int
) -> list[AttentionInputs]:
    """Input sets with fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    prompt, completion = problem.prompt_tokens, problem.completion_tokens
    layout, positions = lay_out([(prompt, completion, completion)] * problem.pairs, device)
    out = []
    for _ in range(sets):
        packed = torch.randn(4, 1, len(positions), problem.heads, WIDTH, generator=generator).to(device, dtype)
        parts = packed.unflatten(2, (problem.pairs, -1)).squeeze(1).split([prompt, completion, completion], 2)
        padded = torch.cat([torch.cat([parts[0], side], 2) for side in parts[1:]], 1)
        padded[3, :, :prompt] /= 2
        forms = [form.transpose(2, 3).unbind() for form in (packed, padded)]
        for *qkv, _ in forms:
            for x in qkv:
                x.requires_grad_()
        out.append(AttentionInputs(*forms, layout=layout))
    return out


def attention_answer(inputs: AttentionInputs) -> Outcome:
    """float64 on the very same inputs, all scores of a pair at once."""
    lengths, parts = inputs.layout.lengths[0], []
    bounds = lay_out([lengths], torch.device("cpu"))[0].bounds

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention_reference(q, k, v, *bounds, scale=SCALE)

    for *qkv, weights in zip(*(x.detach().double().cpu().split(sum(lengths), 2) for x in inputs.packed), strict=True):
        leaves = [x.requires_grad_() for x in qkv]
        part = both_ways(reference, leaves, weights, GRADS)
        parts.append((part.values, *part.grads.values()))
    values, *grads = (torch.cat(part, 2).to(inputs.packed[0].device) for part in zip(*parts, strict=True))
    return Outcome(values, **dict(zip(GRADS, grads, strict=True)))


def attention_implementations(inputs: AttentionInputs) -> dict[str, Implementation]:
    """SDPA on padded rows, and the ways of packed rows that take such inputs."""
    q, _, v, _ = inputs.packed
    packed = {}
    if not q.is_cuda and q.dtype in NATIVE_FLOATS:
        packed["native"] = lambda q, k, v, layout: packed_attention(q, k, v, *layout.bounds, scale=SCALE)
    if not q.is_cuda and q.dtype == torch.float32:  # in 16 bits it rounds more than any of them
        packed["torch"] = lambda q, k, v, layout: packed_attention_reference(q, k, v, *layout.bounds, scale=SCALE)
    options = {"scale": SCALE, "window": None, "softcap": None}
    if varlen := pick_varlen(q, v, None):
        packed["varlen"] = lambda q, k, v, layout: attend_varlen(q, k, v, layout.varlen(1), varlen, **options)
    packed["masked"] = lambda q, k, v, layout: attend_sdpa(q, k, v, layout, **options)

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: SharedPrompts) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    return {"eager": _both_ways(padded, "padded")} | {name: _both_ways(way) for name, way in packed.items()}


def _both_ways(attend: Callable[..., torch.Tensor], form: str = "packed") -> Implementation:
    """Forward and backward."""

    def call(inputs: AttentionInputs) -> Outcome:
        *qkv, weights = getattr(inputs, form)
        return both_ways(lambda *qkv: attend(*qkv, inputs.layout), qkv, weights, GRADS)

    return call
