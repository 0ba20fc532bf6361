"""Plan B on the GPU with the tile pass of csrc/exp_tile.cu in place of Triton's."""

import torch

from bpo_fast_kernels.build import load_library, nvcc_command
from bpo_fast_kernels.rows import Head
from bpo_fast_kernels.torch_backend import SHIFT_SLACK, Sweep
from bpo_fast_kernels.triton_backend import TritonBackend


class NativeCudaBackend(TritonBackend):
    """Implements `rows.Backend` for one compute capability."""

    name = "native"

    def __init__(self, capability: tuple[int, int]) -> None:
        arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")
        load_library("exp_tile.cu", tuple(nvcc_command(arch)), ("torch_cuda", "torch_cpu", "torch"))
        self.ops = torch.ops.bpo_fast_cuda

    def exp_tile_(
        self, z: torch.Tensor, e: torch.Tensor, sweep: Sweep, first: int, head: Head, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One block of threads a row."""
        new_shift, factor = torch.empty_like(sweep.shift), torch.empty_like(sweep.shift)
        state = (sweep.targets, sweep.shift, new_shift, sweep.miss_sum, factor)
        self.ops.exp_tile(z, e, *state, gain, first, head.scale, head.softcap or 0.0, SHIFT_SLACK)
        sweep.shift = new_shift
        return factor
