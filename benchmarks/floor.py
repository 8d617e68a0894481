"""The matrix products and convolutions of a step, alone: what would be left of it if all else were free.

They are recorded as torch's dispatcher sees them, forward and backward, in the dtypes and layouts that autocast left,
and then each is called on tensors of its own. Attention and losses count only where they are products of torch, and our
linear layers as a whole, with bias and GELU: what another fused kernel multiplies inside is not seen. A processor finds
operands of one product, repeated, in its caches, so this is a floor and not an estimate.
"""

import collections
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl.ops  # noqa: F401 — defines the ops

from .machine import DEVICE, wait

aten, ours = torch.ops.aten, torch.ops.fastssl
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, *CONVOLUTIONS}
LINEAR = {ours.linear_fwd.default, ours.linear_dx.default, ours.linear_dweight.default}
REPEATS = 3


class Recorder(TorchDispatchMode):
    """Counts the products of each kind, shape, layout and dtype."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS | LINEAR:
            self.calls[func, _described(args)] += 1
        return func(*args, **(kwargs or {}))


def floor(step: Callable[[], Any]) -> float:
    """Seconds of all products that one call of `step` makes, each as fast as it was in the better of a few calls;
    convolutions in the faster of torch's two layouts, whichever the step uses."""
    with Recorder() as recorder:
        step()
    return sum(count * _fastest(func, described) for (func, described), count in recorder.calls.items())


def _fastest(func, described: tuple) -> float:
    layouts = [None]
    if func in CONVOLUTIONS:
        layouts = [torch.contiguous_format, torch.channels_last]
    return min(_seconds(func, [_made(one, layout) for one in described]) for layout in layouts)


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


def _described(args: tuple) -> tuple:
    """Hashable: a tensor by its shape, layout and dtype, anything else as it is."""
    return tuple(
        (Tensor, tuple(x.shape), x.stride(), x.dtype)
        if isinstance(x, Tensor)
        else tuple(x)
        if isinstance(x, list)
        else x
        for x in args
    )


def _made(described, layout: torch.memory_format | None):
    if not (isinstance(described, tuple) and described[:1] == (Tensor,)):
        return list(described) if isinstance(described, tuple) else described
    _, shape, stride, dtype = described
    reach = 1 + sum((length - 1) * step for length, step in zip(shape, stride)) if 0 not in shape else 0
    x = torch.randn(reach, device=DEVICE).to(dtype).as_strided(shape, stride)
    return x.contiguous(memory_format=layout) if layout and x.ndim == 4 else x
