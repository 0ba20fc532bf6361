"""Next tokens from logits, by inverse transform.

Every request owns a stream of uniform numbers drawn from its seed, one a token, so that a completion does not depend on
which other requests share its batch (up to rounding of the logits).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_fast.engine import SamplingParams

# ids whose masses are summed first: a draw finds the block, then the id in it, and never sums a vocabulary in float64
BLOCK = 128
# scores looked at together. On a CPU 4 MiB: temporaries of that size stay in the allocator and near the cores; those of
# a whole batch are mapped and given back at every step, which takes ten times as long as what is done on them
CPU_CHUNK, GPU_CHUNK = 2**20, 2**26


class Chooser:
    """Chooses the next tokens of a batch of requests.

    Args:
        seeds: of the requests.
        params: temperature, cuts of the tail, whether log-probs are wanted.
        device: of the logits.

    Attributes:
        finite: [] bool. whether every row of logits so far had a finite maximum.
    """

    def __init__(self, seeds: Sequence[int], params: SamplingParams, device: torch.device):
        self._params = params
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        streams = [
            torch.rand(params.max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in (seeds if params.temperature > 0 else [])
        ]
        self._uniforms = torch.stack(streams, 1).to(device) if streams else None

    def __call__(self, logits: Tensor, requests: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The tokens of one step.

        Args:
            logits: [B, V].
            requests: [B] int64. whose logits these are, positions in `seeds`.
            step: position in the completions, 0-based.

        Returns:
            ([B] int64 tokens; [B] float32 log-probs at the temperature and before any cut, if they are wanted)
        """
        uniforms = None if self._uniforms is None else self._uniforms[step].index_select(0, requests)
        rows = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // logits.shape[-1])
        parts = [
            self._choose(logits[start : start + rows], None if uniforms is None else uniforms[start : start + rows])
            for start in range(0, len(logits), rows)
        ]
        tokens = torch.cat([tokens for tokens, _ in parts])
        logps = [logps for _, logps in parts if logps is not None]
        return tokens, torch.cat(logps) if logps else None

    def _choose(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scores = logits.float()
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


def draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Draws an index for each row by inverse transform.

    Args:
        masses: [B, V] float32. what the chance of an index is proportional to, not negative and not all 0.
        uniforms: [B] float64. in [0, 1).

    Returns:
        [B] int64. indices of positive mass; any index where a mass is NaN.
    """
    missing = -masses.shape[1] % BLOCK
    blocks = (F.pad(masses, (0, missing)) if missing else masses).unflatten(1, (-1, BLOCK))
    block, rest = _invert(blocks.sum(-1), uniforms)
    inside, _ = _invert(blocks[torch.arange(len(masses), device=masses.device), block], rest)
    return (block * BLOCK + inside).clamp_max(masses.shape[1] - 1)


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """([B] index that a number in [0, 1) falls on; [B] float64. where in that index's share it does, about [0, 1])."""
    cumulative = masses.double().cumsum(-1)
    total = cumulative[:, -1:]
    # at least 0 and strictly below the total, so that right=True always lands on a positive mass
    target = torch.minimum(uniforms[:, None].clamp_min(0.0) * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp_max(masses.shape[1] - 1)  # NaN is past the end
    mass = masses.gather(1, index).double()
    below = cumulative.gather(1, index) - mass
    return index.squeeze(1), ((target - below) / mass).squeeze(1)
