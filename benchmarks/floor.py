"""Lower bound of a step's time: the time of its matrix products and convolutions alone.

They are recorded in torch's dispatcher, forward and backward, with the dtypes and layouts under autocast, and each is
then timed on separate tensors. Products of attention and losses are counted only where they are torch's, and our linear
layers as a whole, with bias and GELU; products inside other fused kernels are not counted. A product that is repeated
finds its operands in the caches, so this is a lower bound, not an estimate.
"""

import collections
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastssl.ops  # noqa: F401 — registers the ops

from .machine import DEVICE, wait

aten, ours = torch.ops.aten, torch.ops.fastssl
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, *CONVOLUTIONS}
LINEAR = {ours.product.default}
REPEATS = 3


class Recorder(TorchDispatchMode):
    """Count products by kind, shape, layout and dtype."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS | LINEAR:
            self.calls[func, _descriptions(args)] += 1
        return func(*args, **(kwargs or {}))


def floor(step: Callable[[], Any]) -> float:
    """Seconds of all products in one call of `step`: for each the best of a few calls, for convolutions in the faster
    of torch's two memory layouts, whichever the step uses."""
    with Recorder() as recorder:
        step()
    return sum(count * _fastest(func, descriptions) for (func, descriptions), count in recorder.calls.items())


def operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of torch's matrix products, convolutions and fused attention in one call of `step`,
    forward and backward. Ops of other libraries are not counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _fastest(func, descriptions: tuple) -> float:
    layouts = [None]
    if func in CONVOLUTIONS:
        layouts = [torch.contiguous_format, torch.channels_last]
    return min(_seconds(func, [_argument(x, layout) for x in descriptions]) for layout in layouts)


@torch.no_grad()
def _seconds(func, arguments: list) -> float:
    best = float("inf")
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        func(*arguments)
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _descriptions(args: tuple) -> tuple:
    """Hashable arguments: for a tensor its shape, layout and dtype."""
    return tuple(
        (Tensor, tuple(x.shape), x.stride(), x.dtype)
        if isinstance(x, Tensor)
        else tuple(x)
        if isinstance(x, list)
        else x
        for x in args
    )


def _argument(descriptions, layout: torch.memory_format | None):
    if not (isinstance(descriptions, tuple) and descriptions[:1] == (Tensor,)):
        return list(descriptions) if isinstance(descriptions, tuple) else descriptions
    _, shape, stride, dtype = descriptions
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride)) if 0 not in shape else 0
    x = torch.randn(size, device=DEVICE).to(dtype).as_strided(shape, stride)
    return x.contiguous(memory_format=layout) if layout and x.ndim == 4 else x
