"""Engine `hf`: a transformers model and its KV cache, on the trainer's own modules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self

import torch
from bpo_fast_kernels import rowwise_linear
from torch import Tensor, nn

from bpo_fast.attention import has_native
from bpo_fast.engine import OnDone, Request, SamplingParams, in_order, make_requests
from bpo_fast.engine.choose import Chooser, draws_natively
from bpo_fast.engine.decode import cache_argument, decode, row_bytes, rows_together, shares_rows, takes_cache
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.head import Head
from bpo_fast.loading import head_weight, is_plain_linear, trunk_of
from bpo_fast.policy import Policy
from bpo_fast.types import Completion, Prompt


class HfEngine:
    """Samples from a transformers model in this process.

    Args:
        model: the policy's model.
        tokenizer: its tokenizer.
        view: context manager under which `model` has the dense weights of a member, or, for None, of the average of the
            members.
        num_members: of the ensemble.
        eos_ids: ids that end a completion.
        pad_id: id that fills batches.
        batch_size: sequences decoded together; None: as many as `rows_together` says.
        head: of the model; None: of a form that is not known.
        shares_prompts: whether the model has the attention of attention.py.

    Raises:
        ValueError: a model without a KV cache of transformers' own kind.
    """

    name = "hf"
    kv_stays = False
    num_retried = 0

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        view: Callable[[int | None], AbstractContextManager],
        num_members: int = 1,
        eos_ids: tuple[int, ...],
        pad_id: int,
        batch_size: int | None = None,
        head: Head | None = None,
        shares_prompts: bool = False,
    ):
        self._model, self._tokenizer, self._view, self._num_members = model, tokenizer, view, num_members
        cache_argument(model)  # or there is none, and this says so
        self._eos_ids, self._pad_id, self._batch_size = eos_ids, pad_id, batch_size
        self._head = head if head is not None and head.fused and takes_cache(trunk_of(model)) else None
        self._shares_rows = shares_prompts and draws_natively(self._head_now()) and shares_rows(model)

    @classmethod
    def of(cls, policy: Policy, batch_size: int | None) -> Self:
        """The engine of a policy as it trains."""
        return cls(
            policy.model,
            policy.tokenizer,
            view=policy.merged,
            num_members=policy.num_members,
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            batch_size=batch_size,
            head=policy.head,
            shares_prompts=policy.shares_prompts,
        )

    def refresh(self, policy_version: int) -> dict[str, float]:
        """Nothing to do: the engine reads the trainer's weights at every call."""
        return {}

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
        longest = max((len(p.ids) for p in prompts), default=0)
        num_rows, _ = self._batch(longest, params)
        was_training = self._model.training
        self._model.eval()
        try:
            for member in sorted({r.member for r in requests}, key=lambda m: -1 if m is None else m):
                mine = [i for i, r in enumerate(requests) if r.member == member]
                with torch.inference_mode(), self._view(member):
                    for start in range(0, len(mine), num_rows):
                        batch = mine[start : start + num_rows]
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
        finally:
            self._model.train(was_training)
        return in_order(prompts, params.n, [done[i] for i in range(len(requests))])

    def kv_bytes(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Of one batch: it goes with it."""
        num_rows, bytes_a_row = self._batch(prompt_tokens, params)
        return num_rows * bytes_a_row

    def _batch(self, prompt_tokens: int, params: SamplingParams) -> tuple[int, int]:
        """(sequences decoded together; bytes of the KV cache of one at most)"""
        draws = draws_natively(self._head_now(), top_p=params.top_p, top_k=params.top_k)
        shared = self._shares_rows and not params.single_members  # whose members share no prompts
        sharing = min(params.n, self._batch_size or params.n) if shared else 1
        a_row = row_bytes(self._model, prompt_tokens, params.max_new_tokens, sharing=sharing)
        return self._batch_size or rows_together(self._model, a_row, logits=not draws), a_row

    def _head_now(self) -> tuple[Head, Tensor] | None:
        """The head with the weights of the view in force."""
        return self._head and (self._head, head_weight(self._model))

    def _decode(
        self, requests: Sequence[Request], params: SamplingParams, stop: StopStrings
    ) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
        choose = Chooser([r.seed for r in requests], params, self._model.device, self._head_now())
        with rowwise_linears(self._model):
            sampled = decode(
                self._model,
                [r.prompt.ids for r in requests],
                choose,
                ended=lambda ids: ids[-1] in self._eos_ids or stop.found(ids),
                max_new_tokens=params.max_new_tokens,
                pad_id=self._pad_id,
                shared=self._shares_rows,
            )
        if not choose.finite:
            raise RuntimeError("the policy's logits are NaN or infinite: nothing can be sampled from it")
        return [(tuple(ids), tuple(logps) if params.logps else None) for ids, logps in sampled]


@contextmanager
def rowwise_linears(model: Any) -> Iterator[None]:
    """Inside, the linear layers of a float32 trunk on a CPU are `rowwise_linear`; their adapters have been merged."""
    kept: dict[nn.Linear, Any] = {}
    if model.device.type == "cpu" and model.dtype == torch.float32 and has_native():
        for linear in filter(is_plain_linear, trunk_of(model).modules()):
            if all(p.dtype == torch.float32 for p in linear.parameters()):
                kept[linear] = vars(linear).get("forward")
    for linear in kept:
        linear.forward = partial(_by_rows, linear)
    try:
        yield
    finally:
        for linear, forward in kept.items():
            del linear.forward
            if forward is not None:
                linear.forward = forward


def _by_rows(linear: nn.Linear, input: Tensor) -> Tensor:
    return rowwise_linear(input, linear.weight, linear.bias)
