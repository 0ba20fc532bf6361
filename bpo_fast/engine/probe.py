"""The proof that the sampler is the policy: a fixed batch scored by both engines after every refresh.

The sampler draws a few tokens after fixed prompts, through its own KV and prefix caches, and gives their log-probs; the
trainer scores the same tokens. A sampler that is not the policy stops the run, and the message names the first module
that differs. (A run whose sampler silently was the base model for months: huggingface/trl issue 5312.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bpo_fast_kernels import linear_token_logps

from bpo_fast.loading import head_weight, trunk_of
from bpo_fast.policy import Policy
from bpo_fast.types import Prompt

NUM_NEW_TOKENS = 16
NUM_PROMPTS = 3

# Mean |difference| of a token's log-prob between the engines, in nats. Seen between healthy ones: float32 1e-6 to 1e-5,
# bfloat16 2e-3 (trained) to 2e-2 (near uniform); a stale sampler differs by what training changed, 0.2 in trl's case.
# (never below the first, never above the second; between them SLACK times the difference at the first probe)
LIMITS = {torch.float32: (1e-4, 5e-3), torch.bfloat16: (2e-2, 0.1), torch.float16: (5e-3, 0.03)}
SLACK = 8.0

Sampler = Callable[[Sequence[Prompt], Sequence[int | None], int], tuple[list[tuple[int, ...]], list[tuple[float, ...]]]]


@dataclass(frozen=True)
class ProbeResult:
    """Mean (of the worst view) and maximum |difference| of a token's log-prob, in nats, and the mean that fails."""

    mean: float
    max: float
    limit: float


class Probe:
    """Scores the same tokens with the sampler and with the trainer.

    Args:
        policy: the trainer's side.
        sample: draws tokens at temperature 1 after prompts, each from a member (None: the average); gives log-probs.
        max_length: of prompt plus completion, in tokens.
        block_size: tokens of a block of the prefix cache; prompts are longer, so that a stale block is noticed.
        members: those that are sampled from alone, and so compared alone, beside the average.
    """

    def __init__(
        self, policy: Policy, sample: Sampler, *, max_length: int, block_size: int, members: Sequence[int] = ()
    ):
        self._policy, self._sample = policy, sample
        self._views: tuple[int | None, ...] = (None, *members)
        self._limit: float | None = None
        self._num_new = min(NUM_NEW_TOKENS, max(1, max_length // 2))
        width = max(1, min(2 * block_size + 3, max_length - self._num_new))
        num_tokens = len(policy.tokenizer)
        self._prompts = [
            Prompt(i, "", tuple((7919 * (i + 1) + 104729 * j) % num_tokens for j in range(width)))
            for i in range(NUM_PROMPTS)
        ]

    def prompt_ids(self) -> torch.Tensor:
        """[num_prompts, width] int64."""
        return torch.tensor([p.ids for p in self._prompts], device=self._policy.device)

    def run(self) -> ProbeResult:
        """Compares the engines once; the first call sets the limit of this model on this machine."""
        prompts = [p for _ in self._views for p in self._prompts]
        owners = [m for m in self._views for _ in self._prompts]
        drawn, sampler_logps = self._sample(prompts, owners, self._num_new)
        ours = self._trainer_logps(drawn)
        difference = (torch.tensor(sampler_logps) - ours.cpu()).abs()
        mean = float(difference.unflatten(0, (len(self._views), -1)).mean((1, 2)).max())
        floor, ceiling = LIMITS[self._policy.model.dtype]
        if self._limit is None:
            self._limit = min(ceiling, max(floor, SLACK * mean))
        return ProbeResult(mean, float(difference.max()), self._limit)

    @torch.no_grad()
    def _trainer_logps(self, drawn: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """[num_views num_prompts, num_new] float32."""
        model, found = self._policy.model, []
        for i, member in enumerate(self._views):
            part = drawn[i * len(self._prompts) : (i + 1) * len(self._prompts)]
            ids = torch.tensor([p.ids + d for p, d in zip(self._prompts, part, strict=True)], device=model.device)
            with self._policy.behavior() if member is None else self._policy.member(member):
                found.append(self._token_logps(ids))
        return torch.cat(found)

    def _token_logps(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, num_new] float32 of the last tokens, as training has them."""
        model, head, targets = self._policy.model, self._policy.head, ids[:, -self._num_new :]
        if not head.fused:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=self._num_new + 1).logits
            return logits[:, :-1].float().log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2)
        hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, -self._num_new - 1 : -1]
        logps = linear_token_logps(hidden.flatten(0, 1), head_weight(model), targets.flatten(), **head.options())
        return logps.view_as(targets)
