"""Picks the backend that runs an operator."""

import functools
import logging
import os
from typing import Any

import torch

from bpo_fast_kernels.build import NativeUnavailable
from bpo_fast_kernels.checks import require
from bpo_fast_kernels.native_backend import NativeBackend
from bpo_fast_kernels.rows import Backend
from bpo_fast_kernels.torch_backend import TorchBackend

# The backends that need triton are imported on first use: the import is slow, and triton does not exist everywhere.
BACKENDS = ("auto", "native", "torch", "triton", "triton-gemm")
log = logging.getLogger("bpo_fast_kernels")


class BackendUnavailable(ValueError):
    """A backend that cannot run on this device or machine."""


@functools.cache
def _torch() -> Backend:
    return TorchBackend()


@functools.cache
def _native_cpu() -> Backend:
    return NativeBackend()


@functools.cache
def _triton(name: str) -> Backend:
    from bpo_fast_kernels.triton_backend import TritonBackend, TritonGemmBackend

    return TritonBackend() if name == "triton" else TritonGemmBackend(name.partition(":")[2])


@functools.cache
def _native_cuda(capability: tuple[int, int]) -> Backend:
    from bpo_fast_kernels.native_cuda_backend import NativeCudaBackend

    return NativeCudaBackend(capability)


@functools.cache
def _auto_cpu() -> Backend:
    try:
        return _native_cpu()
    except NativeUnavailable as reason:
        log.warning("native kernels are off, plain PyTorch runs instead: %s", reason)
        return _torch()


def pick_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name`; "triton-gemm:128x256x64x4" is Plan A with this tile and so many stages.

    "auto" is "triton" on a CUDA device, "native" on the CPU or, said once, "torch" where that cannot be built, and
    "torch" elsewhere.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: one that cannot run on this device or machine.
    """
    known = name in BACKENDS or name.startswith("triton-gemm:")
    require(known, "backend", repr(name), f"expected one of {', '.join(BACKENDS)}")
    on_cpu = device.type == "cpu"
    if name == "auto" and on_cpu:
        return _auto_cpu()
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return _torch()
    if name == "auto":
        return _triton("triton")
    if name.startswith("triton"):
        if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailable(f"backend = {name!r}: on CPU tensors it needs TRITON_INTERPRET=1")
        return _triton(name)
    try:
        return _native_cpu() if on_cpu else _native_cuda(torch.cuda.get_device_capability(device))
    except NativeUnavailable as reason:
        raise BackendUnavailable(f"backend = 'native': {reason}") from reason


def native_ops(device: torch.device) -> Any:
    """The operators of the backend "native"; raises as `pick_backend` does."""
    native: Any = pick_backend("native", device)
    return native.ops
