"""One copy of the weights: the trainer's parameters become views of vLLM's storages, found by name.

vLLM fuses q, k, v and gate, up into one parameter each; a trainer's parameter is then some rows of it. It pads the
vocabulary; the trainer has the first rows. Everything else is one to one, and tied embeddings exist once.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

Views = dict[str, Tensor]


class NotShareableError(ValueError):
    """A layout in which some parameter has no counterpart of the same shape and type."""


def find_views(vllm_model: nn.Module, parameters: Mapping[str, Tensor]) -> Views:
    """Finds where every parameter of a transformers model lies in vLLM's module.

    Args:
        vllm_model: the live module, its weights as loaded (not repacked).
        parameters: `dict(model.named_parameters())`, tied ones once.

    Returns:
        name to a view of vLLM's storage with the shape of the parameter.

    Raises:
        NotShareableError: a parameter of either side without a counterpart; its name and why.
    """
    views: Views = {}
    used: set[int] = set()
    for name, parameter in parameters.items():
        whole, view = _locate(vllm_model, name)
        if view.shape[:1] > parameter.shape[:1] and view.shape[1:] == parameter.shape[1:]:
            view = view[: parameter.shape[0]]  # padded vocabulary
        if view.shape != parameter.shape or not view.is_contiguous():
            raise NotShareableError(f"{name}: {tuple(parameter.shape)} here, {tuple(view.shape)} in vLLM")
        if view.dtype != parameter.dtype:
            raise NotShareableError(f"{name}: {parameter.dtype} here, {view.dtype} in vLLM")
        views[name] = view
        used.add(whole.data_ptr())
    for name, parameter in vllm_model.named_parameters():
        if parameter.data_ptr() not in used:
            raise NotShareableError(f"{name}: only vLLM has it")
    return views


def locate_linear(vllm_model: nn.Module, name: str) -> tuple[Any, slice]:
    """The vLLM layer that computes the transformers layer `name`, and which of its output rows are that layer's."""
    parent, _, leaf = name.rpartition(".")
    packed_modules = getattr(vllm_model, "packed_modules_mapping", None) or {}
    for packed, parts in packed_modules.items():
        if leaf in parts and packed != leaf:
            layer = _submodule(vllm_model, f"{parent}.{packed}".removeprefix("."), name)
            sizes = layer.output_sizes
            if len(sizes) != len(parts):
                raise NotShareableError(f"{name}: {packed} has {len(sizes)} parts in vLLM, not {len(parts)}")
            start = sum(sizes[: parts.index(leaf)])
            return layer, slice(start, start + sizes[parts.index(leaf)])
    return _submodule(vllm_model, name, name), slice(None)


@torch.no_grad()
def adopt_(model: nn.Module, views: Views, names: Iterable[str]) -> None:
    """Makes the parameters called `names` views of vLLM's storages, and frees the ones that the model came with.

    Raises:
        NotShareableError: vLLM holds other values; nothing is changed then.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in set(names)}
    for name, parameter in parameters.items():
        if not torch.equal(parameter, views[name].to(parameter.device)):
            raise NotShareableError(f"{name}: vLLM holds other values there")
    for name, parameter in parameters.items():
        parameter.data = views[name].detach()


def strays(model: nn.Module, views: Views, names: Iterable[str]) -> list[str]:
    """Names of the shared parameters that no longer lie in vLLM's storage."""
    wanted = set(names)
    return [n for n, p in model.named_parameters() if n in wanted and p.data_ptr() != views[n].data_ptr()]


def _locate(vllm_model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    path, _, leaf = name.rpartition(".")
    layer, rows = locate_linear(vllm_model, path)
    whole = getattr(layer, leaf, None)
    if whole is None or not whole.dim():
        raise NotShareableError(f"{name}: not in vLLM's {type(vllm_model).__name__}")
    return whole, whole.data[rows]


def _submodule(vllm_model: nn.Module, path: str, name: str) -> Any:
    mapper = getattr(vllm_model, "hf_to_vllm_mapper", None)  # of names in a checkpoint: gpt_neox.layers is model.layers
    for known in (path, *(mapper.apply_list([path]) if mapper else [])):
        with suppress(AttributeError):
            return vllm_model.get_submodule(known)
    raise NotShareableError(f"{name}: not in vLLM's {type(vllm_model).__name__}")
