"""The queue of keys: the only work is memory traffic and the calls themselves."""

import pytest
import torch

from fastssl.ops import enqueue_

from .harness import Case, compare
from .machine import DEVICE


@pytest.mark.parametrize("batch, length", [(256, 65536), (32, 4096)])
def test_enqueue(benchmark, batch, length, width=128):
    start, keys = torch.randn(length, width, device=DEVICE), torch.randn(batch, width, device=DEVICE)

    def state(queue):
        return queue, torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def contestant(write, queue, ptr):
        def run():
            write(queue, ptr)
            return queue, ptr

        return run

    def official_write(queue_DK, ptr):
        """The reference code of MoCo: keys are columns, the host reads the pointer, the batch must divide K."""
        row = int(ptr)
        queue_DK[:, row : row + batch] = keys.T
        ptr[0] = (row + batch) % length

    def slice_write(queue, ptr):
        row = int(ptr)
        queue[row : row + batch] = keys
        ptr[0] = (row + batch) % length

    def index_write(queue, ptr):
        queue.index_copy_(0, (ptr + torch.arange(batch, device=DEVICE)) % length, keys)
        ptr.add_(batch).remainder_(length)

    case = Case(
        op="enqueue_",
        size=f"{batch} × {width} into K={length:,}, fp32",
        kernel="enqueue_",
        contestants={
            "ours": contestant(lambda queue, ptr: enqueue_(queue, ptr, keys), *state(start.clone())),
            "official": contestant(official_write, *state(start.T.contiguous())),
            "slice, no wrap": contestant(slice_write, *state(start.clone())),
            "index_copy_": contestant(index_write, *state(start.clone())),
        },
        adapt={"official": lambda result: (result[0].T, result[1])},
    )
    compare(benchmark, case)
