"""Quantised checkpoints: dequantised once, as they are loaded; from then on the policy is an ordinary dense model.

An optimizer step needs dense weights, and so does a sampler that is to be the policy exactly: LoRA trains on the frozen
dequantised base, full fine-tuning trains it and saves dense weights.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

_AFTERWARDS = ("bitsandbytes",)  # loaded as they are, then dequantised by a call


def quantised_by(config: PreTrainedConfig) -> str | None:
    """The method by which a checkpoint is quantised, or None."""
    stored = _stored(config)
    return None if stored is None else str(stored.get("quant_method"))


def loading_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told, so that a quantised checkpoint can become dense; nothing for a dense one.

    Raises:
        ValueError: a method that transformers cannot undo.
    """
    stored, method = _stored(config), quantised_by(config)
    if stored is None or method in _AFTERWARDS:
        return {}
    try:
        found: Any = AutoQuantizationConfig.from_dict(dict(stored))
    except ValueError:
        found = None  # a method that transformers does not know
    if not hasattr(found, "dequantize"):
        raise ValueError(
            f"quantised by {method}, which transformers cannot turn back into dense weights; name the model that"
            " it was made from, or one quantised by compressed-tensors, fp8 or bitsandbytes"
        )
    found.dequantize = True
    return {"quantization_config": found}


def dense_(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Leaves a model that was loaded with `loading_options` as its class builds it, every parameter of type `dtype`.

    Buffers keep their types: the frequencies of rotary positions are float32 whatever the weights are. A quantiser may
    leave its scales as parameters, forwards that round what goes through them, and conversions that would quantise
    again what is saved.

    Raises:
        ValueError: parameters that are missing or of another shape.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype=dtype)
    with torch.device("meta"):
        plain = type(model)(model.config)
    wanted = {name: p.shape for name, p in plain.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        module.__dict__.pop("forward", None)
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and f"{path}.{leaf}".removeprefix(".") not in wanted:
                delattr(module, leaf)
    model.__dict__.pop("_weight_conversions", None)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(True)
    found = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    if found != wanted:
        name = min(wanted.items() ^ found.items())[0]
        raise ValueError(f"dequantised, its {name} is not as the model has it")
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Drops what quantisers say of their options and progress; what goes wrong is an exception."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stored(config: PreTrainedConfig) -> dict[str, Any] | None:
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
