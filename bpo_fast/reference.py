"""The reference axis: against whose log-probs a phase is trained.

behavior: the policy at the start of the phase (BPO); initial: the weights the run started from; ema: a moving average
of the policy, advanced once a phase; golden: another, finished model. All but golden are views of the policy's own
weights, and every reference scores a phase's pairs once, before its first step.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.packing import PairBatch
from bpo_fast.policy import Policy, load_policy


class Reference:
    """Scores pairs under the reference of the current phase.

    Args:
        policy: the policy in training.
        method: which reference.
        model: form of the policy, for loading a golden one.
        max_length: longest sequence, for the same.
    """

    def __init__(self, policy: Policy, method: MethodConfig, model: ModelConfig, *, max_length: int):
        self._policy, self._method = policy, method
        self.ema: dict[str, Tensor] | None = policy.dense_state() if method.ref == "ema" else None
        self._golden: Policy | None = None
        if method.ref == "golden":
            form = dataclasses.replace(model, path=method.golden, full=True, members=1, adapters=())
            try:
                self._golden = load_policy(
                    form,
                    device=policy.device,
                    seed=0,
                    temperature=policy.temperature,
                    max_length=max_length,
                    keeps_start=False,
                )
            except ValueError as error:
                raise ValueError(f"method.golden: {error}") from None
            same = self._golden.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
            if not same:
                raise ValueError(f"method.golden = {method.golden}: its tokenizer is not the policy's")

    @property
    def num_bytes(self) -> int:
        """Of its own weights, beside those of the policy."""
        golden = self._golden.model.parameters() if self._golden else ()
        return sum(t.numel() * t.element_size() for t in (*golden, *(self.ema or {}).values()))

    def is_policy(self, num_steps: int) -> bool:
        """True if a phase of `num_steps` steps needs no reference pass: one step of one member from the reference."""
        return self._method.ref == "behavior" and num_steps == 1 and self._policy.num_members == 1

    @torch.no_grad()
    def refresh(self, phase: int) -> None:
        """Advances the EMA at the start of a phase; the other references need nothing."""
        if self.ema is not None and phase > 0:
            for name, tensor in self._policy.dense_state().items():
                self.ema[name].lerp_(tensor.to(self.ema[name].device), self._method.ema_rate)

    def logps(self, batches: Sequence[PairBatch]) -> list[Tensor]:
        """[2P] float32 of every batch, in nats, on its device."""
        scorer = self._golden or self._policy
        with self._view():
            return [scorer.logps(batch) for batch in batches]

    def _view(self) -> AbstractContextManager[None]:
        if self._golden is not None:
            return self._golden.behavior()
        if self.ema is not None:
            return self._policy.dense(self.ema)
        return self._policy.initial() if self._method.ref == "initial" else self._policy.behavior()
