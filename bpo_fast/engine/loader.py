"""How vLLM loads the policy: plain weights that stay where they are, and layers that read the trainer's LoRA members.

On a CPU vLLM repacks linear weights for its kernels once they are loaded, which would detach them from the trainer's.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bpo_fast_kernels import rowwise_linear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.config import LoadConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from bpo_fast.attention import has_native
from bpo_fast.engine.handover import Handover
from bpo_fast.engine.kv_budget import MAX_NUM_SEQS
from bpo_fast.engine.member_rows import MemberRows
from bpo_fast.engine.shared_weights import NotShareableError, locate_linear
from bpo_fast.head import unrounded_logits

LOAD_FORMAT = "bpo_fast"
HANDOVER = "handover"  # of the loader's configuration, where it is in another process than the trainer
WORTH_READING = 2**18  # weights; below it there is no difference in time


@dataclass(frozen=True)
class LiveLora:
    """The members of a LoRA ensemble that vLLM's layers read in place.

    Attributes:
        names: transformers names of the linear layers.
        num_members: M.
        r: rank of one member.
        scale: what multiplies the sum of the members' B A x, alpha / (r M).
        rows: who each row of a batch comes from; None: the average everywhere.
    """

    names: tuple[str, ...]
    num_members: int
    r: int
    scale: float
    rows: MemberRows | None = None


class PlainLinear(UnquantizedLinearMethod):
    """A linear layer on weights that are never repacked, plus the average of the members where it has any."""

    def __init__(self, scale: float = 0.0, rows: MemberRows | None = None) -> None:
        self._scale, self._rows = scale, rows

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the trainer shares the weight."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias + scale * sum_m w_m B_m A_m x, for the rows of W that have members; w is of the row of x."""
        out = linear(x, layer.weight, bias)
        for rows, a, b in getattr(layer, "lora_parts", ()):
            # one adapter of rank M r, scaled here: where it becomes an addmm, inductor loses the alpha of an add
            inner = F.linear(x, (self._scale * a.flatten(0, 1)).to(x.dtype))
            if self._rows is not None:
                weights = self._rows.weights[: inner.shape[0], :, None].to(inner.dtype)
                inner = (inner.unflatten(-1, (len(a), -1)) * weights).flatten(-2)
            side_by_side = b.permute(1, 0, 2).flatten(1, 2).to(x.dtype)
            out[..., rows].add_(F.linear(inner, side_by_side))
        return out


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """Embedding and head on weights that are never repacked."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the trainer shares the weight."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias in float32."""
        if x.dtype == torch.float32:
            return linear(x, layer.weight, bias)
        return unrounded_logits(x, layer.weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. A decoding step in float32 on a CPU reads W where it stands; libraries pack it for each product."""
    # the number of rows is asked for last: a graph that is compiled for any number may not depend on it
    native = not torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32 and has_native()
    if native and weight.numel() >= WORTH_READING and x.shape[:-1].numel() <= MAX_NUM_SEQS:
        return rowwise_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class PolicyLoader(DefaultModelLoader):
    """Loads the trainer's weights, keeps them plain and makes room for the members of a live LoRA ensemble."""

    # of the engine that is being built in this process
    policy: PreTrainedModel | None = None
    live_lora: LiveLora | None = None

    def __init__(self, load_config: LoadConfig):
        extra: Any = load_config.model_loader_extra_config or {}
        self._handover: Handover | None = extra.get(HANDOVER)
        plain = LoadConfig(load_format="safetensors", download_dir=load_config.download_dir)
        plain.device, plain.use_tqdm_on_load = load_config.device, False
        super().__init__(plain)

    def get_all_weights(self, model_config, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The trainer's weights, not the file's: those may be quantised, and are read already."""
        if self._handover is not None:
            return self._handover.weights()
        assert self.policy is not None, "the engine's start has set it"
        return checkpoint_weights(self.policy)

    def load_weights(self, model: Any, model_config) -> None:
        """Loads, then swaps the methods that would repack."""
        super().load_weights(model, model_config)
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if type(method) is UnquantizedLinearMethod:
                layer.quant_method = PlainLinear()
            elif type(method) is UnquantizedEmbeddingMethod:
                layer.quant_method = PlainEmbedding()
        if self.live_lora is not None:
            with suppress(NotShareableError):  # reads_live_lora() tells
                add_live_lora_(model, self.live_lora)


def checkpoint_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The trainer's weights and buffers under the names and in the layout of a checkpoint, tied ones once."""
    seen: set[int] = set()
    once = {}
    for name, tensor in policy.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            once[name] = tensor
    yield from revert_weight_conversion(policy, once).items()


def add_live_lora_(model: nn.Module, lora: LiveLora) -> None:
    """Gives vLLM's layers storages for A [M, r, in] and B [M, out, r], float32, zero until the trainer fills them.

    Raises:
        NotShareableError: a layer that vLLM does not have or has in a form of its own.
    """
    for name in lora.names:
        layer, rows = locate_linear(model, name)
        if not isinstance(getattr(layer, "quant_method", None), PlainLinear):
            raise NotShareableError(f"{name}: no plain linear layer in vLLM")
        num_out, num_in = layer.weight[rows].shape
        device = layer.weight.device
        a = torch.zeros(lora.num_members, lora.r, num_in, dtype=torch.float32, device=device)
        b = torch.zeros(lora.num_members, num_out, lora.r, dtype=torch.float32, device=device)
        layer.lora_parts = (*getattr(layer, "lora_parts", ()), (rows, a, b))
        layer.quant_method = PlainLinear(lora.scale, lora.rows)


def live_lora_storage(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """(A, B) of the transformers layer `name` as vLLM reads them."""
    layer, rows = locate_linear(model, name)
    return next((a, b) for part, a, b in layer.lora_parts if part == rows)


def reads_live_lora(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether the loader could give every one of these transformers layers its members."""
    try:
        return all(hasattr(locate_linear(model, name)[0], "lora_parts") for name in names)
    except NotShareableError:
        return False


def graph_key(lora: LiveLora | None) -> list[object]:
    """What vLLM must know a compiled graph by, beside the model: the layers that read members, how many, at what scale.

    Without it a second run on the same folder would load the graph of the first from vLLM's cache.
    """
    return [] if lora is None else [lora.names, lora.num_members, lora.r, lora.scale, lora.rows is not None]


def register() -> None:
    """Makes the loader known to vLLM."""
    register_model_loader(LOAD_FORMAT)(PolicyLoader)
