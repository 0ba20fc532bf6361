"""What every place that loads a model checks: the device, the folder, the vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError


def pick_device(what: str, name: str) -> torch.device:
    """The device called auto (the GPU if there is one), cpu, cuda or cuda:N; ValueError `what = name` otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{what} = {name}: not a device; auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} = {name}: not supported; auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{what} = {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def named_load_errors(what: str, kind: str = "model") -> Iterator[None]:
    """Turns the many ways in which transformers refuses a folder into one ValueError that names it."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"{what}: cannot be loaded as a {kind}: {lines[0] if lines else type(error).__name__}"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def check_vocabulary(what: str, model: Any, tokenizer: Any) -> None:
    """ValueError if the tokenizer can produce ids that the model has no embedding for."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise ValueError(f"{what}: {num_embeddings} embeddings for a tokenizer of {len(tokenizer)} tokens")
