"""Weights on their way to other processes: written once to anonymous host memory, which every one of them maps.

The memory has no name in a file system: it goes with the last process that holds it, however that ends.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 64  # bytes; of the start of a tensor


@dataclass(frozen=True)
class Handover:
    """Where the weights lie.

    Attributes:
        path: of the memory, while `handed_over` is open.
        num_bytes: of all of it.
        entries: name, dtype, shape and first byte of every tensor.
    """

    path: str
    num_bytes: int
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

    def weights(self, *, shared: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, in the memory itself; what is written to them is seen by others if `shared`."""
        if not self.num_bytes:
            return
        memory = torch.from_file(self.path, shared=shared, size=self.num_bytes, dtype=torch.uint8)
        for name, dtype, shape, start in self.entries:
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            yield name, memory[start : start + num_bytes].view(dtype).view(shape)


@contextmanager
def handed_over(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Handover]:
    """Writes the weights to host memory that other processes of this user can read until the end of the block."""
    entries, num_bytes, tensors = [], 0, []
    for name, tensor in weights:
        entries.append((name, tensor.dtype, tuple(tensor.shape), num_bytes))
        tensors.append(tensor)
        num_bytes += -(-tensor.nbytes // ALIGN) * ALIGN
    file = os.memfd_create("bpo_fast_weights")
    try:
        os.truncate(file, num_bytes)
        handover = Handover(f"/proc/{os.getpid()}/fd/{file}", num_bytes, tuple(entries))
        for (_, place), tensor in zip(handover.weights(shared=True), tensors, strict=True):
            place.copy_(tensor)
        yield handover
    finally:
        os.close(file)
