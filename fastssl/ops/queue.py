"""Queue of keys: a ring of rows, in which new keys overwrite the oldest."""

import torch
from torch import Tensor

from . import check
from .dispatch import call_in_place, fake, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import queue

    return queue


def enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """Writes keys over the oldest rows of the queue, in place, first in, first out.

    Equals ``queue[(ptr + arange(N)) % K] = keys; ptr = (ptr + N) % K`` for any N: the queue may wrap in the middle of a
    batch, and of more than K keys the last K stay.

    Args:
        queue: [K, D], rows contiguous, any floating dtype, changed in place; keys are converted to its dtype.
        ptr: [1] int64 on the queue's device, changed in place; the row that is overwritten next. The host never
            reads it, so a step on a GPU does not wait for it.
        keys: [N, D] any floating dtype and strides, N ≥ 0.

    Raises:
        ValueError: a shape or device does not fit, the rows of the queue are not contiguous, or two of the arguments,
            or two rows of the queue, share memory.
        TypeError: ptr is not int64, or queue or keys are not floating.

    Memory: none beyond the arguments.

    Source: He et al., 2020 (MoCo), section 3.2, "Dictionary as a queue"; the reference code requires that N divides K.
    """
    _check(queue, ptr, keys)
    if queue.stride(1) != 1 and queue.shape[1] > 1:
        check.fail("enqueue_", f"queue must have contiguous rows [K, D], got strides {list(queue.stride())}")
    check.separate("enqueue_", {"queue": queue, "ptr": ptr}, {"keys": keys})
    call_in_place(_enqueue_, (queue, ptr), queue, ptr, keys)


@check.once_a_signature
def _check(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    check.tensor("enqueue_", "queue", queue, "K D")
    check.tensor("enqueue_", "ptr", ptr, "1")
    if ptr.shape != (1,):
        check.fail("enqueue_", f"ptr must have shape [1], got {list(ptr.shape)}")
    check.tensor("enqueue_", "keys", keys, "N D", D=queue.shape[1])
    check.floating("enqueue_", queue=queue, keys=keys)
    check.index("enqueue_", ptr=ptr)
    check.same_device("enqueue_", queue=queue, ptr=ptr, keys=keys)
    if queue.shape[0] == 0:
        check.fail("enqueue_", "queue must have at least one row, got shape " + str(list(queue.shape)))


@op("enqueue_", mutates_args=("queue", "ptr"))
def _enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    K, N = queue.shape[0], keys.shape[0]
    skipped = max(0, N - K)  # keys that would be overwritten in the same call
    steps = torch.arange(skipped, N, device=ptr.device)
    queue.index_copy_(0, (ptr + steps) % K, keys[skipped:].to(queue.dtype))
    ptr.add_(N).remainder_(K)


@fake(_enqueue_)
def _(queue, ptr, keys):
    pass


register_triton(_enqueue_, lambda: _kernels().enqueue_)
