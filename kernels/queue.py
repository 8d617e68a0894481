"""The ring of keys of a momentum method: `enqueue_` writes new keys over the oldest rows, in place.

`enqueue_kernel` copies blocks of keys to the rows that follow the pointer, around the end of the ring; of more keys
than the ring holds it reads only the last. The pointer is read on the GPU, so the host does not wait for the GPU. A
second launch, `advance_pointer_kernel`, of one program moves the pointer: programs run in any order, and a pointer
moved in the first launch would be seen by the programs that start later.

    bytes        min(N, K)·D·(s_keys + s_queue), 8 for the pointer in the first launch, 16 in the second
    operations   none
    limit        the two launches: N = 256 keys of 128 float32 are 0.26 MB, less than a card moves in a microsecond

Tile sizes: so few bytes are moved fastest by many small programs. 2 kB on 4 warps are one word of 16 bytes for each
thread, and 64 programs at N = 256; columns as in masking.py. (`ema_update_` is CUDA C++: its list of tensors is a table
of pointers, which Triton has no type for.)
"""

import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, Launch, card, cast_via, contiguous_rows, move_tile

ENQUEUE = dict.fromkeys(ARCHITECTURES, Launch(4, 2048))  # {architecture: configuration of enqueue_kernel}


@triton.jit
def enqueue_kernel(
    queue_ptr,  # [K, D], rows contiguous
    ptr_ptr,  # [1] int64, the row that is overwritten next
    keys_ptr,  # [N, D], rows contiguous
    K,
    N,
    D,
    skipped,  # N − min(N, K): keys that would be overwritten in the same call
    stride_queue_k,
    stride_keys_n,
    CAST_VIA: tl.constexpr,  # see tile.cast_via
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes ROWS keys, of those numbered skipped … N − 1."""
    key = skipped + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start_row = (tl.load(ptr_ptr) + skipped) % K
    start_row = tl.where(start_row < 0, start_row + K, start_row)  # Triton's remainder has the sign of the pointer
    row = start_row + (key - skipped)
    row = tl.where(row < K, row, row - K)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = (key < N)[:, None] & (column < D)
        keys = tl.load(keys_ptr + key.to(tl.int64)[:, None] * stride_keys_n + column, mask=mask, other=0.0)
        if keys.dtype != queue_ptr.dtype.element_ty:
            keys = keys.to(CAST_VIA).to(queue_ptr.dtype.element_ty)
        tl.store(queue_ptr + row[:, None] * stride_queue_k + column, keys, mask=mask)


@triton.jit
def advance_pointer_kernel(
    ptr_ptr,  # [1] int64
    K,
    N,
):
    """ptr = (ptr + N) mod K."""
    moved = (tl.load(ptr_ptr) + N) % K
    tl.store(ptr_ptr, tl.where(moved < 0, moved + K, moved))


def enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    (K, D), N = queue.shape, keys.shape[0]
    written = min(N, K)
    if written and D:
        keys, launch = contiguous_rows(keys), ENQUEUE[card(queue).arch]
        rows, columns = move_tile(written, D, keys.element_size(), launch.bytes)
        enqueue_kernel[(triton.cdiv(written, rows),)](
            queue,
            ptr,
            keys,
            K,
            N,
            D,
            N - written,
            queue.stride(0),
            keys.stride(0),
            CAST_VIA=cast_via(queue.dtype),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    advance_pointer_kernel[(1,)](ptr, K, N, num_warps=1)
