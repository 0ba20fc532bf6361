"""How vLLM holds the policy's weights: shared with the trainer, or copied from it at every refresh."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpo_fast.engine import loader
from bpo_fast.engine.handover import handed_over
from bpo_fast.engine.host_state import Interrupts
from bpo_fast.engine.shared_weights import NotShareableError, Views, adopt_, find_views, strays
from bpo_fast.policy import Policy


@dataclass(frozen=True)
class Held:
    """vLLM's side of the weights.

    Attributes:
        module: vLLM's live model; None where the processes of its workers have it.
        load: gives vLLM weights by their names in a checkpoint.
        views: where each parameter of the trainer lies in `module`; empty if there is no such place.
        shared: names of the trainer's parameters that are those views.
        copied: names of the parameters whose values a refresh copies.
        why_copied: in words, where sharing was not possible.
        live_lora: vLLM's layers read the members' own tensors.
    """

    module: nn.Module | None
    load: Callable[[Iterable[tuple[str, Tensor]]], Any]
    views: Views
    shared: tuple[str, ...]
    copied: tuple[str, ...]
    why_copied: str | None
    live_lora: bool

    def attach(self, policy: Policy) -> None:
        """Moves the members of a live ensemble into vLLM's storages."""
        for _, parameter, storage in self._live_pairs(policy):
            parameter.data = storage.copy_(parameter.data)

    def strays(self, policy: Policy) -> list[str]:
        """Names of the trainer's tensors that no longer lie in the storage that vLLM reads."""
        lost = strays(policy.model, self.views, self.shared)
        members = [name for name, p, storage in self._live_pairs(policy) if p.data_ptr() != storage.data_ptr()]
        return lost + [f"the members of {name}" for name in dict.fromkeys(members)]

    @torch.no_grad()
    def copy(self, policy: Policy) -> int:
        """Brings the copied weights up to date; returns the bytes that took."""
        if not self.copied:
            return 0
        copied = set(self.copied)
        with policy.merged():
            parameters = {n: p for n, p in policy.model.named_parameters() if n in copied}
            if self.views:
                torch._foreach_copy_([self.views[n] for n in parameters], [p.data for p in parameters.values()])
            else:
                self.load(loader.checkpoint_weights(policy.model))
        return sum(p.numel() * p.element_size() for p in parameters.values())

    def in_words(self) -> str:
        """For the log."""
        if self.why_copied:
            return f"weights copied at every refresh ({self.why_copied})"
        if self.live_lora:
            return "base and members shared, nothing is copied"
        if self.copied:
            return "base shared, members merged into a second copy of its linear layers"
        return "weights shared, nothing is copied"

    def _live_pairs(self, policy: Policy) -> Iterable[tuple[str, nn.Parameter, Tensor]]:
        """(layer, A or B of its members, where vLLM reads it) of a live ensemble."""
        if not self.live_lora:
            return
        assert policy.lora is not None, "only an ensemble is live"
        assert self.module is not None, "only what is in this process is live"
        for name, *pair in zip(policy.lora.names, policy.lora.a, policy.lora.b, strict=True):
            for parameter, storage in zip(pair, loader.live_lora_storage(self.module, name), strict=True):
                yield name, parameter, storage


def held_here(module: Any, model: PreTrainedModel, lora_names: Iterable[str], *, live_lora: bool) -> Held:
    """Puts the trainer's weights, but for those that members are merged into, into vLLM's storages, where that can be.

    Args:
        module: vLLM's live model.
        model: the trainer's.
        lora_names: its linear layers that have members.
        live_lora: vLLM's layers were made to read them, and not a copy that they are merged into.
    """
    live = live_lora and loader.reads_live_lora(module, lora_names)
    merged = set() if live else {f"{name}.weight" for name in lora_names}
    names = tuple(n for n, _ in model.named_parameters())
    shared = tuple(n for n in names if n not in merged)
    try:
        views = find_views(module, dict(model.named_parameters()))
        adopt_(model, views, shared)
    except NotShareableError as error:
        # which rows of a layer are whose is not known, and so no members are read in place
        return Held(module, module.load_weights, {}, (), names, str(error), live_lora=False)
    return Held(module, module.load_weights, views, shared, tuple(n for n in names if n in merged), None, live)


def held_by_workers(llm: Any, model: PreTrainedModel, num_workers: int) -> Held:
    """All weights are copied to the processes of vLLM's workers, each of which takes its part of them."""

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        # an answer that nobody waits for would be taken for that of the next call
        with handed_over(weights) as handover, Interrupts():
            llm.collective_rpc("take_weights", args=(handover,))

    names = tuple(n for n, _ in model.named_parameters())
    why = f"vLLM's {num_workers} workers are processes of their own"
    return Held(None, load, {}, (), names, why, live_lora=False)
