"""Engine `hf`: transformers' generate with its KV cache, on the trainer's own modules.

Sampling is by inverse transform: every request owns a stream of uniform numbers drawn from its seed, one a token, so a
completion does not depend on which other requests share its batch (up to rounding of the logits).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bpo_fast.engine import OnDone, Request, SamplingParams, in_order, make_requests
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.types import Completion, Prompt


class HfEngine:
    """Samples from a transformers model in this process.

    Args:
        model: the policy's model, one that can generate.
        tokenizer: its tokenizer.
        view: context manager under which a forward of `model` is a member, or, for None, the average of the members.
        num_members: of the ensemble.
        eos_ids: ids that end a completion.
        pad_id: id that fills batches.
        batch_size: sequences decoded together.
    """

    name = "hf"
    kv_bytes: int | None = None
    kv_stays = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        view: Callable[[int | None], AbstractContextManager],
        num_members: int = 1,
        eos_ids: tuple[int, ...],
        pad_id: int,
        batch_size: int,
    ):
        self._model, self._tokenizer, self._view, self._num_members = model, tokenizer, view, num_members
        self._eos_ids, self._pad_id, self._batch_size = eos_ids, pad_id, batch_size

    def refresh(self, policy_version: int) -> None:
        """Nothing to do: the engine reads the trainer's weights at every call."""

    def close(self) -> None:
        """Nothing is held beyond a call."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        run_seed: int,
        policy_version: int,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`; prompts of like length share a batch, and so do completions of one member."""
        requests = make_requests(
            prompts, params, run_seed=run_seed, policy_version=policy_version, num_members=self._num_members
        )
        stop = StopStrings(self._tokenizer, params.stop)
        done: dict[int, Completion] = {}
        was_training = self._model.training
        self._model.eval()
        for member in sorted({r.member for r in requests}, key=lambda m: -1 if m is None else m):
            mine = [i for i, r in enumerate(requests) if r.member == member]
            with torch.inference_mode(), self._view(member):
                for start in range(0, len(mine), self._batch_size):
                    batch = mine[start : start + self._batch_size]
                    sampled = self._decode([requests[i] for i in batch], params, stop)
                    for i, (ids, logps) in zip(batch, sampled, strict=True):
                        done[i] = requests[i].completion(
                            ids,
                            logps,
                            tokenizer=self._tokenizer,
                            eos_ids=self._eos_ids,
                            stop=stop,
                            policy_version=policy_version,
                        )
                    if on_done:
                        on_done([done[i] for i in batch])
        self._model.train(was_training)
        return in_order(prompts, params.n, [done[i] for i in range(len(requests))])

    def _decode(
        self, requests: Sequence[Request], params: SamplingParams, stop: StopStrings
    ) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
        device = self._model.device
        width = max(len(r.prompt.ids) for r in requests)
        input_ids = torch.full((len(requests), width), self._pad_id, dtype=torch.int64)
        mask = torch.zeros((len(requests), width), dtype=torch.int64)
        for row, request in enumerate(requests):
            ids = request.prompt.ids
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        chooser = _Chooser([r.seed for r in requests], params, device)
        # generate() fills whatever a call leaves open from the model's own generation config (repetition penalties
        # and the like), which would bend the distribution that is trained: for the call, the model has none
        own = self._model.generation_config
        self._model.generation_config = GenerationConfig()
        try:
            out = self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=params.max_new_tokens,
                do_sample=False,
                eos_token_id=list(self._eos_ids),
                pad_token_id=self._pad_id,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([_AtStopString(stop, width)] if stop else []),
            )
        finally:
            self._model.generation_config = own
        if not chooser.finite:
            raise RuntimeError("the policy's logits are NaN or infinite: nothing can be sampled from it")
        tokens = out[:, width:].tolist()
        logps = torch.stack(chooser.logps, 1).tolist() if params.logps else [None] * len(tokens)
        return [self._cut(row, row_logps) for row, row_logps in zip(tokens, logps, strict=True)]

    def _cut(self, tokens: list[int], logps: list[float] | None):
        end = next((i + 1 for i, t in enumerate(tokens) if t in self._eos_ids), len(tokens))
        return tuple(tokens[:end]), None if logps is None else tuple(logps[:end])


class _AtStopString(StoppingCriteria):
    """Ends the rows whose newest token completes a stop string."""

    def __init__(self, stop: StopStrings, prompt_width: int):
        self._stop, self._prompt_width = stop, prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **options: Any) -> Any:
        found = [self._stop.found(row) for row in input_ids[:, self._prompt_width :].tolist()]
        return torch.tensor(found, device=input_ids.device)


class _Chooser(LogitsProcessor):
    """Picks each row's next token itself and leaves generate nothing but to take it."""

    def __init__(self, seeds: list[int], params: SamplingParams, device: torch.device):
        self._params = params
        self._step = 0
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.logps: list[torch.Tensor] = []
        streams = [
            torch.rand(params.max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in (seeds if params.temperature > 0 else [])
        ]
        self._uniforms = torch.stack(streams, 1).to(device) if streams else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        self.finite &= scores.amax(-1).isfinite().all()
        if self._uniforms is None:
            token = scores.argmax(-1, keepdim=True)
        else:
            scores = scores / self._params.temperature
            token = self._draw(scores, self._uniforms[self._step])
        if self._params.logps:
            self.logps.append((scores.gather(1, token) - scores.logsumexp(-1, keepdim=True)).squeeze(1))
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _draw(self, scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        params = self._params
        if params.top_k:
            kth = scores.topk(min(params.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        probs = scores.softmax(-1)
        if params.top_p < 1:
            ranked, index = probs.sort(dim=-1, descending=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= params.top_p, 0.0)
            probs = torch.zeros_like(probs).scatter_(1, index, ranked)
        cumulative = probs.double().cumsum(-1)
        total = cumulative[:, -1:]
        # strictly below the total, so that right=True always lands on a token of positive mass
        target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(cumulative, target, right=True).clamp_max(scores.shape[-1] - 1)  # NaN is past the end
