"""The memory ledger: what a training step will hold, by part, before the first one is taken.

Weights, gradients and moments are counted. Activations are measured, not modelled: a forward and a backward of two and
of four pairs of the greatest lengths run under a mode that follows every tensor from birth to death, and the tokens of
a whole micro-batch are on their straight line. So checkpointing, LoRA and any architecture count as they are. On a CPU
the holes of the arena between tensors come on top, a tenth or two; without it (allocator.py) they can be as much again.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.rows import Head
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpo_fast.batches import TokenBudget, microbatch_tokens
from bpo_fast.config import Config
from bpo_fast.engine import Engine, sampling_params
from bpo_fast.gradients import microbatches
from bpo_fast.loading import head_weight
from bpo_fast.optim import Optimizer
from bpo_fast.packing import PairBatch
from bpo_fast.policy import Policy
from bpo_fast.types import Completion, Pair, Prompt

GIB = 2**30
PROBES = (2, 4)  # pairs


@dataclass(frozen=True)
class Ledger:
    """Bytes of a training step of the greatest lengths.

    Attributes:
        weights: of the model and the adapters, and of a reference that has its own.
        gradients: of all that is trained.
        optimizer: moments and float32 masters where they are on the device.
        activations: of the largest micro-batch, at their peak.
        head_chunk: what the head's kernel keeps of a chunk, and its gradient if the head is trained.
        kv: the sampler's cache.
        kv_stays: True if the sampler keeps its cache through the steps.
        num_microbatches: of the step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head_chunk: int
    kv: int
    kv_stays: bool
    num_microbatches: int

    @property
    def training(self) -> int:
        """Peak of what a step holds beyond weights and KV cache.

        The first micro-batch meets no gradients: they appear as its activations go. Later ones meet all of them.
        """
        before = self.gradients if self.num_microbatches > 1 else 0
        return self.optimizer + max(before + self.activations + self.head_chunk, self.gradients)

    @property
    def peak(self) -> int:
        """Peak of a run: of a step or, without a cache that stays, of sampling."""
        if self.kv_stays:
            return self.weights + self.kv + self.training
        return self.weights + max(self.training, self.optimizer + self.kv)

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl says of it."""
        parts = ("weights", "kv", "optimizer", "activations")
        return {f"memory/{name}_gib": getattr(self, name) / GIB for name in parts}

    def words(self) -> str:
        """One line for people."""
        names = ("weights", "gradients", "optimizer", "activations", "head_chunk", "kv")
        parts = ", ".join(f"{n.replace('_', ' ')} {_size(getattr(self, n))}" for n in names)
        return f"memory: {parts}; peak about {_size(self.peak)}"


def longest_pairs(config: Config, policy: Policy, num_pairs: int) -> list[Pair]:
    """Pairs at the limits of prompt and completion."""
    token = policy.eos_ids[0]
    assert config.data.max_prompt_length, "resolve() has set it"
    assert config.sampling.max_new_tokens, "resolve() has set it"
    prompt = Prompt(0, "", (token,) * config.data.max_prompt_length)
    answer = Completion(0, 0, (token,) * config.sampling.max_new_tokens, "", True, 0, 0)
    return [Pair(prompt, answer, answer, 1.0, 0.0)] * num_pairs


def step_share(config: Config) -> int:
    """Pairs of a step that a device takes at most."""
    return -(-(config.method.batch_pairs or 1) // config.run.devices)


def longest_pair_tokens(config: Config, policy: Policy) -> int:
    """Tokens that a pair at the limits takes of a micro-batch, for all members."""
    (pair,) = longest_pairs(config, policy, 1)
    return policy.pair_tokens(pair) * policy.num_members


def token_budget(config: Config, policy: Policy) -> TokenBudget:
    """Tokens of a micro-batch of a run.

    Raises:
        ValueError: one pair at the limits, for all members at once, is over them.
    """
    longest = longest_pair_tokens(config, policy)
    tokens = microbatch_tokens(config.optim, policy.device, longest)
    if longest > tokens:
        raise ValueError(f"optim.microbatch_tokens = {tokens}: one pair at the limits of length needs {longest}")
    return TokenBudget(tokens, longest=longest)


def make_ledger(
    config: Config, policy: Policy, optimizer: Optimizer, engine: Engine, *, reference_bytes: int = 0
) -> Ledger:
    """Counts and measures; leaves no gradient behind.

    Args:
        config: resolved settings.
        policy, optimizer: as they will train.
        engine: the sampler, for its KV cache.
        reference_bytes: of a reference that has weights of its own.
    """
    assert config.data.max_prompt_length, "resolve() has set it"
    step_pairs = longest_pairs(config, policy, step_share(config))
    batches = microbatches(step_pairs, policy, token_budget(config, policy).tokens)
    largest = max(batches, key=lambda batch: len(batch.pairs))
    num_pairs = len(largest.pairs)
    few, more = (largest if n >= num_pairs else policy.pack(step_pairs[:n], filled=False) for n in PROBES)
    low, high = _activations(policy, few), _activations(policy, more)
    a_token = (high - low) / max(1, more.input_ids.numel() - few.input_ids.numel())
    return Ledger(
        weights=reference_bytes
        + _bytes([*policy.model.parameters(), *(policy.lora.parameters() if policy.lora else [])]),
        gradients=optimizer.gradient_bytes,
        optimizer=optimizer.num_bytes(policy.device),
        activations=int(high + a_token * (largest.input_ids.numel() - more.input_ids.numel())),
        head_chunk=_head_chunk(config, policy, num_pairs * policy.num_members),
        kv=engine.kv_bytes(config.data.max_prompt_length, sampling_params(config)),
        kv_stays=engine.kv_stays,
        num_microbatches=len(batches),
    )


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of tensors made inside, from birth to death, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _activations(policy: Policy, batch: PairBatch) -> int:
    """Peak bytes of a forward and a backward of the trunk, its parameters' gradients not counted."""
    repeated = batch.repeat(policy.num_members)
    policy.model.train()
    with policy.members(), _LiveBytes() as tensors:
        hidden = policy.hidden(repeated)
        saved = tensors.live
        hidden.backward(torch.zeros_like(hidden))
    # gradients come as activations go: the peak of a deep model is where the backward begins
    grads = _bytes(p.grad for p in policy.parameters() if p.grad is not None)
    for parameter in policy.parameters():
        parameter.grad = None
    policy.model.eval()
    return max(saved, tensors.peak - grads)


def _head_chunk(config: Config, policy: Policy, num_pairs: int) -> int:
    """Bytes of dW and of E beside it in a chunk of whole pairs; with a frozen head E lives in tiles and dX is kept."""
    assert config.sampling.max_new_tokens, "resolve() has set it"
    weight, rows_a_pair = head_weight(policy.model), 2 * config.sampling.max_new_tokens
    num_rows = num_pairs * rows_a_pair
    if not policy.head.fused:
        return 3 * num_rows * len(weight) * 4  # logits, their log-softmax and its gradient
    engine, head = pick_backend("auto", policy.device), Head(weight, 1.0, None)
    if not weight.requires_grad and config.method.loss != "slic":
        return engine.tile_bytes(num_rows, head) + num_rows * weight.shape[1] * 4
    budget = policy.chunk_bytes or engine.chunk_bytes
    beside_dw = max(num_rows - (engine.free_rows(weight) if weight.requires_grad else 0), 0)
    chunk = min(engine.kept_bytes(beside_dw, head), max(budget, engine.kept_bytes(rows_a_pair, head)))
    return chunk + (weight.numel() * 4 if weight.requires_grad else 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages: tied weights count once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
