"""Next tokens from logits or, where none are cut off, from hidden states: by inverse transform.

Every request owns a stream of uniform numbers drawn from its seed, one a token, so that a completion does not depend on
which other requests share its batch (up to rounding of the logits).
"""

from collections.abc import Sequence

import torch
from bpo_fast_kernels import linear_draw
from bpo_fast_kernels.checks import NATIVE_FLOATS
from bpo_fast_kernels.inverse import cuts, draw
from torch import Tensor

from bpo_fast.attention import has_native
from bpo_fast.engine import SamplingParams
from bpo_fast.head import Head


def draws_natively(head: tuple[Head, Tensor] | None, *, top_p: float = 1.0, top_k: int = 0) -> bool:
    """Whether tokens are drawn from hidden states without logits: on a CPU, and where no tail is cut off."""
    if head is None or top_k or top_p < 1:
        return False
    _, weight = head
    return weight.is_cpu and weight.dtype in NATIVE_FLOATS and has_native()


class Chooser:
    """Chooses the next tokens of a batch of requests.

    Args:
        seeds: of the requests.
        params: temperature, cuts of the tail, whether log-probs are wanted.
        device: of what is chosen from.
        head: of the model, with its weights, where hidden states are to be had; None: choose from the model's logits.

    Attributes:
        reads_hidden: whether a call takes hidden states and not logits.
        finite: [] bool. whether every row so far had finite logits.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        params: SamplingParams,
        device: torch.device,
        head: tuple[Head, Tensor] | None = None,
    ):
        self._params, self._head = params, head
        self.reads_hidden = head is not None
        self._draws = draws_natively(head, top_p=params.top_p, top_k=params.top_k)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        streams = [
            torch.rand(params.max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in (seeds if params.temperature > 0 else [])
        ]
        self._uniforms = torch.stack(streams, 1).to(device) if streams else None

    def __call__(self, rows: Tensor, requests: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The tokens of one step.

        Args:
            rows: [B, H] hidden states if `reads_hidden`, else [B, V] logits.
            requests: [B] int64. whose rows these are, positions in `seeds`.
            step: position in the completions, 0-based.

        Returns:
            ([B] int64 tokens; [B] float32 log-probs at the temperature and before any cut, if they are wanted)
        """
        uniforms = None if self._uniforms is None else self._uniforms[step].index_select(0, requests)
        if self._draws:
            return self._draw(rows, uniforms)
        vocab = len(self._head[1]) if self._head else rows.shape[-1]
        parts = [
            self._choose(self._logits(rows[cut]), None if uniforms is None else uniforms[cut])
            for cut in cuts(len(rows), vocab, rows.device)
        ]
        tokens = torch.cat([tokens for tokens, _ in parts])
        logps = [logps for _, logps in parts if logps is not None]
        return tokens, torch.cat(logps) if logps else None

    def _logits(self, rows: Tensor) -> Tensor:
        """[B, V] float32."""
        if self._head is None:
            return rows.float()
        head, weight = self._head
        return head.logits(rows, weight)

    def _draw(self, hidden: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self._head, "it draws"
        head, weight = self._head
        options = head.options(1.0 if uniforms is None else self._params.temperature)
        tokens, logps = linear_draw(hidden, weight, uniforms, **options)
        self.finite &= logps.isfinite().all()
        return tokens, logps if self._params.logps else None

    def _choose(self, scores: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        highest = scores.amax(-1, keepdim=True)
        self.finite &= highest.isfinite().all()
        if uniforms is None:
            tokens = scores.argmax(-1)
        else:
            if self._params.temperature != 1.0:
                scores, highest = scores / self._params.temperature, highest / self._params.temperature
            tokens = draw(self._masses(scores, highest), uniforms)
        if not self._params.logps:
            return tokens, None
        return tokens, scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(-1)

    def _masses(self, scores: Tensor, highest: Tensor) -> Tensor:
        """[B, V] what a token's chance is proportional to, 0 for those that are cut."""
        params = self._params
        if params.top_k:
            kth = scores.topk(min(params.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        masses = (scores - highest).exp_()
        if params.top_p < 1:
            ranked, index = masses.sort(dim=-1, descending=True)
            limit = params.top_p * ranked.sum(-1, keepdim=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= limit, 0.0)
            masses = torch.zeros_like(masses).scatter_(1, index, ranked)
        return masses
