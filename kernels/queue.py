"""The ring of keys of a momentum method: `enqueue_` writes new keys over the oldest rows, in place.

`_enqueue` copies blocks of keys to the rows that follow the pointer, around the end of the ring; of more keys than the
ring holds only the last are read. The pointer is read by the programs and never by the host, which need not wait for
it. It is moved by a second launch of one program: programs run in any order, so if one of the first launch moved it,
those that start later would see the new one.

    bytes        min(N, K)·D·(s_keys + s_queue), 8 for the pointer in the first launch, 16 in the second
    operations   none
    limit        the two launches: N = 256 keys of 128 float32 are 0.26 MB, less than a card moves in a microsecond

Why the tiles are as they are: so few bytes are moved soonest by many small programs. 2 kB on 4 warps are one word of 16
bytes for each thread, 64 programs at N = 256; columns as in masking.py. (`ema_update_` is CUDA C++: its list of tensors
is a table of pointers, which Triton has no type for.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, TRITON_DTYPES, Launch, card, move_tile, rows

# {architecture: warps of a program, bytes of the tile that it takes at a time}
ENQUEUE = dict.fromkeys(ARCHITECTURES, Launch(4, 2048))


@triton.jit
def _enqueue(
    queue_ptr,
    ptr_ptr,
    keys_ptr,
    K,
    N,
    D,
    skip,
    queue_k,
    keys_n,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keys skip..N−1. NARROW is the dtype through which torch converts to 16 bits: float32, from float64 too."""
    key = skip + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = (tl.load(ptr_ptr) + skip) % K
    first = tl.where(first < 0, first + K, first)  # the remainder has the sign of the pointer here, not torch's
    row = first + (key - skip)
    row = tl.where(row < K, row, row - K)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (key < N)[:, None] & (column < D)
        keys = tl.load(keys_ptr + key.to(tl.int64)[:, None] * keys_n + column, mask=inside, other=0.0)
        if keys.dtype != queue_ptr.dtype.element_ty:
            keys = keys.to(NARROW).to(queue_ptr.dtype.element_ty)
        tl.store(queue_ptr + row[:, None] * queue_k + column, keys, mask=inside)


@triton.jit
def _advance(ptr_ptr, K, N):
    moved = (tl.load(ptr_ptr) + N) % K
    tl.store(ptr_ptr, tl.where(moved < 0, moved + K, moved))


def enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    (K, D), N = queue.shape, keys.shape[0]
    kept = min(N, K)
    if kept and D:
        keys, launch = rows(keys), ENQUEUE[card(queue).arch]
        count, columns = move_tile(kept, D, keys.element_size(), launch.bytes)
        narrow = queue.dtype if queue.element_size() > 2 else torch.float32
        _enqueue[(triton.cdiv(kept, count),)](
            queue,
            ptr,
            keys,
            K,
            N,
            D,
            N - kept,
            queue.stride(0),
            keys.stride(0),
            NARROW=TRITON_DTYPES[narrow],
            ROWS=count,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    _advance[(1,)](ptr, K, N, num_warps=1)
