"""Picks the backend that runs an operator."""

import functools

import torch

from bpo_fast_kernels.checks import require
from bpo_fast_kernels.rows import Backend
from bpo_fast_kernels.torch_backend import TorchBackend

BACKENDS = ("auto", "native", "torch", "triton")


@functools.cache
def _make(name: str) -> Backend:
    return TorchBackend()


def pick_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name`; "auto" goes by the device."""
    require(name in BACKENDS, "backend", repr(name), f"expected one of {', '.join(BACKENDS)}")
    return _make("torch")
