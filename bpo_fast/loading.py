"""What every place that loads a model needs: the device, the folder, the vocabulary checked, layers checkpointed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeGuard

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from bpo_fast.allocator import open_arena


def pick_device(what: str, name: str, *, main: bool = True) -> torch.device:
    """The device called auto (the GPU if there is one), cpu, cuda or cuda:N; ValueError `what = name` otherwise.

    If it is the CPU, its tensors come from the arena of allocator.py from now on, where that is wanted. The `main` one
    of several GPUs is the current device from now on: memory is measured there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{what} = {name}: not a device; auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} = {name}: not supported; auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{what} = {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cpu":
        open_arena()
    elif main and device.index is not None:
        torch.cuda.set_device(device)
    return device


def working_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of weights in training: the type called so, or for auto float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


# what is said of a path to nothing that could not be a name on the Hub either
NO_NAMES = ("Repo id must", "Incorrect path_or_model_id")


@contextmanager
def named_load_errors(what: str, kind: str = "model") -> Iterator[None]:
    """Turns the many ways in which transformers refuses a folder into one ValueError that names it."""
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if any(words in lines[0] for words in NO_NAMES):
            raise ValueError(f"{what}: no such folder") from error
        raise ValueError(f"{what}: cannot be loaded as a {kind}: {lines[0]}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers logs nothing below errors."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def check_vocabulary(what: str, model: Any, tokenizer: Any) -> None:
    """ValueError if the tokenizer can produce ids that the model has no embedding for."""
    if len(tokenizer) > num_embeddings(model):
        raise ValueError(f"{what}: {num_embeddings(model)} embeddings for a tokenizer of {len(tokenizer)} tokens")


def settle_generation_config_(model: Any) -> None:
    """Makes the model's generation config one that transformers writes, which refuses some of what it reads.

    A temperature without `do_sample` becomes one that is sampled with; of what is not valid even then, the ids stay.
    """
    own = model.generation_config
    sampled = copy.deepcopy(own)
    sampled.do_sample = True
    for config in (own, sampled):
        with suppress(ValueError):
            config.validate(strict=True)
            model.generation_config = config
            return
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = transformers.GenerationConfig(**{name: getattr(own, name) for name in ids})


def generation_eos_ids(model: Any) -> list[int]:
    """The ids that end a completion by the model's generation config, which names one, several or none."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    return [ids] if isinstance(ids, int) else list(ids or [])


def position_limit(model: Any) -> tuple[int | None, str]:
    """(tokens up to which a model can take a sequence, or None without a limit; what ends there).

    Where frequencies of its RoPE begin to depend on the batch a sequence's log-probs depend on its neighbours, and the
    sampler's cache holds keys of both kinds.
    """
    limit, what = getattr(model.config.get_text_config(), "max_position_embeddings", None), "positions"
    for rope in batch_ropes(model):
        original = rope.get("original_max_position_embeddings") or limit
        if original and (limit is None or original <= limit):
            kind = rope["rope_type"]
            limit, what = original, f"positions before the frequencies of its rope ({kind}) depend on the batch"
    return limit, what


def batch_ropes(model: Any) -> list[dict[str, Any]]:
    """Parameters of the forms of RoPE whose frequencies change, for all rows of a batch, with its longest one."""
    ropes = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [(rope, rope.get("rope_type") or "") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
    return [rope for rope, kind in kinds if kind == "longrope" or "dynamic" in kind]


def trunk_of(model: Any) -> Any:
    """The part of a causal LM whose output is hidden rows; ValueError if it cannot be found."""
    trunk = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if trunk is None:
        raise ValueError(f"{type(model).__name__}: its trunk cannot be found")
    return trunk


def move_(model: Any, device: torch.device) -> None:
    """Puts a model on a device; the types of transformers' own `to` fit no call of it."""
    model.to(device)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer whose class has no forward of its own, such as a quantised one's."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def head_weight(model: Any) -> torch.Tensor:
    """[V, H] of the output embeddings of a causal LM."""
    return model.get_output_embeddings().weight


def num_embeddings(model: Any) -> int:
    """How many token ids a model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def checkpoint_layers_(model: Any, **options: Any) -> None:
    """Lets the backward pass recompute the layers of a model; `options` go on to torch.utils.checkpoint."""
    # transformers warns of its older name where it has the newer one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})
