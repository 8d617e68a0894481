"""Tile sizes of the contrastive kernels for each card, and the plan of a launch."""

from typing import NamedTuple

import torch
import triton

from .tile import TRITON_DTYPES, Card, choose, dot_precision, power_of_2, split_loop

Tiles = dict[str, dict[int, dict[int, tuple[int, int, int, int, int, int]]]]

# {architecture: {bytes of an operand: {widest D: (BLOCK_B, BLOCK_K, CHUNK, warps, stages, programs)}}}
# with the number of programs per multiprocessor. A wider D is cut into parts as wide as the last row; each part has its
# own program, and all of these compute the same logits. CHUNK is how much of D a product of logits takes at a time, 0
# for all of D: then the queries stay in registers from the first tile to the last.
TILES: Tiles = {
    "sm_80": {
        2: {
            64: (128, 64, 0, 8, 3, 2),
            128: (128, 32, 0, 8, 3, 1),
            256: (64, 64, 0, 8, 2, 1),
            512: (32, 32, 0, 8, 2, 1),
        },
        4: {128: (64, 32, 16, 8, 2, 1), 256: (32, 32, 32, 8, 2, 1)},
        8: {64: (32, 32, 0, 4, 1, 2), 128: (32, 16, 0, 8, 1, 1)},
    },
    "sm_90": {
        2: {
            64: (128, 64, 0, 8, 3, 2),
            128: (128, 64, 0, 8, 3, 1),
            256: (64, 64, 0, 8, 2, 1),
            512: (64, 32, 128, 8, 2, 1),
        },
        4: {64: (64, 32, 32, 8, 2, 1), 128: (64, 32, 16, 8, 2, 1), 256: (32, 32, 32, 8, 2, 1)},
        8: {64: (32, 32, 0, 4, 1, 2), 128: (32, 16, 0, 8, 1, 1)},
    },
}
TILES["sm_100"] = TILES["sm_90"] | {2: TILES["sm_90"][2] | {512: (64, 32, 256, 8, 2, 1)}}
TILES["sm_120"] = TILES["sm_80"] | {
    2: TILES["sm_80"][2] | {64: (128, 32, 0, 8, 3, 2)},
    4: {128: (32, 32, 32, 8, 2, 2), 256: (32, 32, 32, 8, 2, 1)},
    8: {128: (16, 16, 32, 8, 1, 2)},  # no tensor cores for float64
}
TILES["gfx942"] = TILES["sm_80"] | {
    2: {32: (128, 32, 32, 8, 2, 1), 128: (128, 64, 32, 8, 2, 1), 256: (64, 32, 32, 4, 2, 1), 512: (64, 32, 64, 8, 2, 1)}
}
# Those of `pairwise_sigmoid`, whose logarithm is a polynomial and takes more registers.
PAIR_TILES: Tiles = TILES | {
    "sm_100": TILES["sm_100"]
    | {4: TILES["sm_100"][4] | {256: (32, 32, 16, 8, 2, 1)}, 8: TILES["sm_100"][8] | {128: (32, 16, 64, 8, 1, 1)}},
    "sm_120": TILES["sm_120"] | {4: TILES["sm_120"][4] | {256: (32, 16, 32, 8, 2, 1)}},
}


class Plan(NamedTuple):
    """How a launch of a kernel that passes keys along blocks of rows is cut into programs."""

    grid: tuple[int, int, int]  # blocks of rows, parts of the keys, blocks of columns
    tiles_per_part: int
    block_b: int
    block_k: int
    chunk: int
    block_d: int
    warps: int
    stages: int

    def options(self, operand: torch.dtype, sum_dtype: torch.dtype) -> dict:
        """Constants of the kernel for operands and sums of these dtypes."""
        return {
            "OPERAND": TRITON_DTYPES[operand],
            "ACC_DTYPE": TRITON_DTYPES[sum_dtype],
            "PRECISION": dot_precision(operand),
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.block_k,
            "BLOCK_D": self.block_d,
            "CHUNK": self.chunk,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def plan(B: int, K: int, D: int, size: int, gpu: Card, tiles: Tiles | None = None) -> Plan:
    """The plan for B rows against K keys of D values, with operands of `size` bytes; `tiles` is a table like TILES."""
    table = (tiles or TILES)[gpu.arch][size]
    block_d = min(power_of_2(D, 32), max(table))
    block_b, block_k, chunk, warps, stages, programs = choose(table, block_d)
    chunk = min(chunk or block_d, block_d) if chunk or block_d < D else 0
    blocks, columns = triton.cdiv(B, block_b), max(1, triton.cdiv(D, block_d))
    parts, tiles_per_part = split_loop(blocks * columns, triton.cdiv(K, block_k), programs * gpu.multiprocessors)
    return Plan((blocks, parts, columns), tiles_per_part, block_b, block_k, chunk, block_d, warps, stages)
