"""Tile sizes of the attention kernels for each card, and the plan of a launch.

Tile sizes, forward: 256 queries by 32 keys on 8 warps hold all of a 197-token head, so that keys and values pass once;
scores are 32 registers per thread, the result 64 at E = 64, which leaves room for two programs per multiprocessor at E
= 32. 257 tokens take three programs of 128, not two of 256 that would idle half the time. On an H200 many small
programs are faster: 219 µs with 64 queries and 64 keys, 331 µs with 256 and 32 (measured at B = 256, L = 197, H = 12, E
= 64); what other blocks read again comes from the L2 cache. Backward, two tiles of scores and the gradient of the
queries must be held at once: 256 queries of width 32 fit everywhere, of width 64 only where products read their
operands from 148 kB of shared memory (Hopper, Blackwell). float32 is multiplied in three parts and float64 takes twice
the registers: smaller tiles, and heads of up to 64.
"""

from typing import NamedTuple

import triton

from .tile import choose, power_of_2

# {architecture: {bytes of an element: {widest head: (longest BLOCK_L, BLOCK_M, warps at that length, stages)}}}
FWD = {"sm_80": {2: {64: (256, 32, 8, 2), 128: (128, 32, 8, 2)}, 4: {64: (64, 32, 8, 1)}, 8: {64: (32, 32, 4, 1)}}}
FWD |= {arch: FWD["sm_80"] for arch in ("sm_100", "gfx942")}
FWD["sm_90"] = FWD["sm_80"] | {2: {64: (64, 64, 4, 3), 128: (128, 32, 8, 2)}}  # measured, on an H200
FWD["sm_120"] = FWD["sm_80"] | {8: {64: (16, 16, 8, 1)}}  # no tensor cores for float64

# {architecture: {bytes of an element: {(BLOCK_L, BLOCK_E): (BLOCK_M, warps)}}}: where a program owns a head
BWD_PER_HEAD = {
    "sm_80": {2: {(64, 32): (32, 4), (128, 32): (32, 4), (256, 32): (32, 8), (64, 64): (32, 4), (128, 64): (32, 8)}}
}
BWD_PER_HEAD["sm_90"] = {  # measured, on an H200
    2: {
        (64, 32): (32, 4),
        (128, 32): (32, 4),
        (256, 32): (64, 8),
        (64, 64): (64, 4),
        (128, 64): (64, 8),
        (256, 64): (32, 8),
    }
}
BWD_PER_HEAD["sm_100"] = {2: BWD_PER_HEAD["sm_80"][2] | {(128, 64): (64, 8), (256, 64): (16, 8)}}
BWD_PER_HEAD["sm_120"] = {2: BWD_PER_HEAD["sm_80"][2] | {(128, 64): (64, 8)}}
BWD_PER_HEAD["gfx942"] = {2: BWD_PER_HEAD["sm_80"][2] | {(256, 32): (16, 8)}}

# {architecture: {bytes of an element: {widest head: (BLOCK, warps, stages)}}}
BWD_PER_BLOCK = {"sm_80": {2: {64: (64, 4, 1), 128: (32, 4, 1)}, 4: {64: (16, 4, 1)}, 8: {64: (16, 4, 1)}}}
BWD_PER_BLOCK |= {arch: BWD_PER_BLOCK["sm_80"] for arch in ("sm_90", "sm_100")}
BWD_PER_BLOCK["sm_120"] = BWD_PER_BLOCK["sm_80"] | {2: {64: (32, 4, 2), 128: (32, 4, 1)}, 8: {64: (16, 8, 1)}}
BWD_PER_BLOCK["gfx942"] = BWD_PER_BLOCK["sm_80"] | {2: {64: (32, 4, 1), 128: (32, 8, 1)}}


SUM_PROGRAMS = 512  # of the gradient of a bias, where there are enough samples
LEAST_SAMPLES = 16  # of a program of it


class Plan(NamedTuple):
    """How a launch is cut into programs."""

    per_head: bool  # in a backward pass, whether a program owns a whole head
    block_l: int
    block_m: int
    block_e: int
    warps: int
    stages: int


def _block_of_queries(L: int, longest: int) -> int:
    """Queries of a program: all L up to `longest`, fewer where the last of several programs would be mostly idle."""
    block, shortest = min(longest, power_of_2(L, 64)), min(longest, 64)
    while block > shortest and triton.cdiv(L, block) * block > 4 / 3 * triton.cdiv(L, shortest) * shortest:
        block //= 2
    return block


def forward_plan(L: int, E: int, size: int, arch: str, bias: bool = False) -> Plan:
    """The forward pass over L queries of width E, `size` bytes an element."""
    block_e = power_of_2(E, 32)
    longest, block_m, warps, stages = choose(FWD[arch][size], block_e)
    if bias:  # its tile takes the registers of as many scores
        longest = min(longest, 128 if size == 2 and block_e < 128 else 64 if size == 2 else 32)
        block_m = 16 if size == 8 and block_e == 64 else block_m
    block_l = _block_of_queries(L, longest)
    return Plan(False, block_l, block_m, block_e, max(4, warps * block_l // longest), stages)


def backward_plan(L: int, M: int, E: int, size: int, arch: str, bias: bool = False) -> Plan:
    """The backward pass of L queries and M keys of width E, `size` bytes an element."""
    block_e, block_l = power_of_2(E, 32), power_of_2(L, 64)
    per_head = BWD_PER_HEAD[arch].get(size, {}).get((block_l, block_e))
    if per_head and not (bias and block_l * block_e >= 2**13):  # with a bias they would not fit the registers
        block_m, warps = per_head
        return Plan(True, block_l, max(16, block_m // 2) if bias else block_m, block_e, warps, 1)
    block, warps, stages = choose(BWD_PER_BLOCK[arch][size], block_e)
    block = min(block, 16 if block_e == 128 else 32) if bias else block
    return Plan(False, block, block, block_e, warps, stages)


class SumPlan(NamedTuple):
    """How the gradient of a bias is cut into programs."""

    block: int  # queries and keys of a tile
    block_e: int
    samples: int  # of a program
    warps: int


def bias_gradient_plan(B: int, L: int, M: int, H: int, E: int, size: int, shared: bool) -> SumPlan:
    """The gradient of a bias, shared by the B samples or not, `size` bytes an element of q.

    A program adds the samples one after the other. Where heads and tiles are too few programs to fill a card, the
    samples are cut into parts; what depends on the card would change the result's last bits from card to card.
    """
    block_e = power_of_2(E, 32)
    block = min({32: 64, 64: 32}.get(block_e, 16) if size == 2 else 16, power_of_2(max(L, M), 16))
    programs = H * triton.cdiv(L, block) * triton.cdiv(M, block)
    parts = max(1, min(SUM_PROGRAMS // programs, triton.cdiv(B, LEAST_SAMPLES)))
    return SumPlan(block, block_e, triton.cdiv(B, parts) if shared else 1, 8 if block == 64 or size > 2 else 4)
