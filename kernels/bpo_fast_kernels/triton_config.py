"""Fixed launch configurations by compute capability: a written rule, no autotuning.

Shared memory a block may take: 166,912 bytes (8.0), 101,376 (8.6, 8.9), 232,448 (9.0, 10.0). With 8
warps a tile of 128 x 256 x 64 keeps its accumulator in registers on Hopper without spills.
"""

import math
import re
from dataclasses import dataclass, replace

from bpo_fast_kernels.checks import require

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
BARRIER_BYTES = 2048  # at most, of a pipeline, and of what aligns its tiles


@dataclass(frozen=True)
class GemmConfig:
    """Tile, pipeline and load path of the exp-store GEMM.

    Attributes:
        persistent: as many programs as multiprocessors make all tiles, the next one's loads begun before the last is
            written.
        halves: half a tile is written at a time, for want of shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool
    persistent: bool = False
    halves: bool = False

    def constexprs(self) -> dict[str, int | bool]:
        """The kernel's compile-time tile arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "TMA": self.tma,
            "PERSISTENT": self.persistent,
            "HALVES": self.halves,
        }

    def descriptor_blocks(self, stores_e: bool) -> dict[str, list[int]]:
        """The blocks of what is read and written through descriptors, by argument of the kernel."""
        if not self.tma:
            return {}
        blocks = {"x": [self.block_m, self.block_k], "w": [self.block_n, self.block_k]}
        if stores_e and self.persistent:
            blocks["e"] = [self.block_m, self.block_n // 2 if self.halves else self.block_n]
        return blocks


def with_tile(config: GemmConfig, tile: str, shared_bytes: float = math.inf) -> GemmConfig:
    """The configuration with a tile such as "128x256x64x4": rows, vocabulary, depth and stages; its own if empty.

    "w4" behind it takes 4 warps, and "p" makes it persistent where there are descriptors ("128x256x64x4p").

    Args:
        config: for the device.
        tile: as above.
        shared_bytes: of a block: where a whole tile of E does not fit beside the pipeline, halves of one are written.

    Raises:
        ValueError: another form, or a side that is not a power of two of at least 16.
    """
    if not tile:
        return config
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x([1-9])(?:w([48]))?(p?)", tile)
    sides = [int(side) for side in found.groups()[:4]] if found else []
    good = bool(sides) and all(side >= 16 and side & (side - 1) == 0 for side in sides[:3])
    expected = (
        "expected rows x vocabulary x depth x stages after the colon, such as 128x256x64x4, then w4, w8, p or none"
    )
    require(good, "backend", repr(f"triton-gemm:{tile}"), expected)
    assert found is not None
    m, n, k, stages = sides
    persistent = bool(found[6]) and config.tma
    pipeline = 2 * (m + n) * k * stages + BARRIER_BYTES
    return replace(
        config,
        block_m=m,
        block_n=n,
        block_k=k,
        num_stages=stages,
        num_warps=int(found[5] or config.num_warps),
        persistent=persistent,
        halves=persistent and pipeline + 2 * m * n > shared_bytes,
    )


def gemm_config(capability: int, *, tma: bool, softcap: bool) -> GemmConfig:
    """The configuration for a compute capability such as 90.

    Args:
        tma: whether rows start on 16 bytes and there is one head, so that descriptors could be used.
        softcap: whether the epilogue holds the cap's slope beside the logits: a full tile would spill 50 to 170 words.

    `group_m` row blocks of the same vocabulary tile run together: 16 blocks of 128 rows read W once a 2,048 rows.
    """
    if 90 <= capability < 120:
        block_n = 256 if tma and not softcap else 128
        return GemmConfig(128, block_n, 64, 16, num_warps=8, num_stages=3, tma=tma)
    if capability == 80:
        return GemmConfig(128, 128 if softcap else 256, 32, 16, num_warps=8, num_stages=3, tma=False)
    return GemmConfig(128, 128, 32, 16, num_warps=8 if softcap else 4, num_stages=3, tma=False)


INTERPRETED = GemmConfig(16, 32, 16, 4, num_warps=4, num_stages=1, tma=False)
