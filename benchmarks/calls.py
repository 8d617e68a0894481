"""What a call costs beside its kernel: the smallest op of each way to register one, and ours on tiny inputs.

    python -m benchmarks.calls

Processor time of one thread, the least of many short runs that alternate, so that other programs disturb it little.
"""

import gc
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, custom_op

from fastssl.ops import batch_info_nce, check, contrastive, keep_tokens, masking, nt_xent

from .harness import forward_backward
from .table import markdown_table

CALLS, ROUNDS = 300, 60

_library = Library("fastssl_calls", "FRAGMENT")
_library.define("empty(Tensor x) -> Tensor")
_library.impl("empty", torch.empty_like, "CompositeExplicitAutograd")


@custom_op("fastssl_calls::custom", mutates_args=())
def custom(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("fastssl_calls::registered", mutates_args=())
def registered(x: Tensor) -> Tensor:
    return torch.empty_like(x)


registered.register_autograd(lambda ctx, upstream: torch.empty_like(upstream))


class Smallest(torch.autograd.Function):
    """The least that a gradient in Python can be."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, upstream):
        return torch.empty_like(upstream)


class OpsAlone(torch.autograd.Function):
    """`keep_tokens` without checks, options and the choice of what is computed."""

    @staticmethod
    def forward(ctx, x, ids):
        ctx.ids, ctx.length = ids, x.shape[1]
        return masking._keep_tokens_fwd(x, ids, None)

    @staticmethod
    def backward(ctx, upstream):
        return masking._keep_tokens_bwd(upstream, ctx.ids, ctx.length), None


class LossAlone(torch.autograd.Function):
    """`batch_info_nce` without checks, a temperature given as a number, and the choice of what is computed."""

    @staticmethod
    def forward(ctx, q, keys, tau):
        loss, _, dq, lse = contrastive._batch_info_nce_fwd(q, keys, tau, 0, True)
        ctx.save_for_backward(q, keys, tau, dq, lse)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        q, keys, tau, dq, lse = ctx.saved_tensors
        dkeys = contrastive._batch_info_nce_dkeys(q, keys, tau, 0, lse, dloss)
        return dq * dloss.unsqueeze(1), dkeys, None


def losses() -> dict[str, Callable[[], object]]:
    """Losses of 8 vectors of 256 values."""
    (q, keys), tau, upstream = torch.randn(2, 8, 256), torch.full((), 0.2), torch.ones(16)
    labels = torch.arange(16)
    loss, _, dq, lse = contrastive._batch_info_nce_fwd(q, keys, tau, 0, True)
    leaves = [x.clone().requires_grad_() for x in (q, keys)]

    def both_ways(forward: Callable[[], Tensor], rows: int = 8) -> Callable:
        return forward_backward(forward, *leaves, upstream=upstream[:rows])

    def formula():
        return F.cross_entropy(leaves[0] @ leaves[1].T / 0.2, labels[:8], reduction="none")

    def nt_xent_formula():
        z = torch.cat(leaves)
        logits = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, (labels + 8) % 16, reduction="none")

    return {
        "batch_info_nce: the op of the forward pass alone": lambda: contrastive._batch_info_nce_fwd(
            q, keys, tau, 0, True
        ),
        "batch_info_nce: the op of the gradient of keys alone": lambda: contrastive._batch_info_nce_dkeys(
            q, keys, tau, 0, lse, loss
        ),
        "batch_info_nce: the gradient of q, a product, alone": lambda: dq * loss.unsqueeze(1),
        "batch_info_nce: forward + backward, these alone": both_ways(lambda: LossAlone.apply(*leaves, tau)),
        "batch_info_nce: forward + backward": both_ways(lambda: batch_info_nce(*leaves, 0.2).loss),
        "batch_info_nce: forward + backward by torch": both_ways(formula),
        "nt_xent: forward + backward": both_ways(lambda: nt_xent(*leaves, 0.2), 16),
        "nt_xent: forward + backward by torch": both_ways(nt_xent_formula, 16),
    }


def contestants() -> dict[str, Callable[[], object]]:
    x, ids = torch.randn(2, 16, 64), torch.arange(8).view(2, 4)
    leaf, upstream, same = torch.randn(2, 16, 64, requires_grad=True), torch.randn(2, 4, 64), torch.randn(2, 16, 64)

    def gather(tokens):
        return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, 64))

    return {
        "`torch.empty_like`": lambda: torch.empty_like(x),
        "`torch.ops.aten.empty_like.default`, as our ops are called": lambda: torch.ops.aten.empty_like.default(x),
        "a kernel in Python, by `Library.impl`": lambda: torch.ops.fastssl_calls.empty.default(x),
        "`custom_op`": lambda: custom(x),
        "checks of `keep_tokens`, first call of a signature": lambda: masking._check_keep.__wrapped__(x, ids, None),
        "checks of `keep_tokens`, later calls": lambda: masking._check_keep(x, ids, None),
        "`x.to(x.dtype)`": lambda: x.to(torch.float32),
        "a temperature as a tensor": lambda: check.temperature("calls", 0.2, x),
        "keep_tokens: the op `keep_tokens_fwd` alone": lambda: masking._keep_tokens_fwd(x, ids, None),
        "keep_tokens: forward": lambda: keep_tokens(x, ids),
        "keep_tokens: forward by torch, gather and expand": lambda: gather(x),
        "forward + backward: torch's clone": forward_backward(leaf.clone, leaf, upstream=same),
        "forward + backward: the smallest `autograd.Function`": forward_backward(
            lambda: Smallest.apply(leaf), leaf, upstream=same
        ),
        "forward + backward: `custom_op` with `register_autograd`": forward_backward(
            lambda: registered(leaf), leaf, upstream=same
        ),
        "keep_tokens: forward + backward, the two ops alone": forward_backward(
            lambda: OpsAlone.apply(leaf, ids), leaf, upstream=upstream
        ),
        "keep_tokens: forward + backward": forward_backward(lambda: keep_tokens(leaf, ids), leaf, upstream=upstream),
        "keep_tokens: forward + backward by torch": forward_backward(lambda: gather(leaf), leaf, upstream=upstream),
    }


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor time of each call, the least over the rounds."""
    least = dict.fromkeys(calls, float("inf"))
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.thread_time_ns()
                for _ in range(CALLS):
                    call()
                least[name] = min(least[name], (time.thread_time_ns() - start) / CALLS / 1e3)
    finally:
        gc.enable()
    return least


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [[name, f"{value:.1f}"] for name, value in microseconds(contestants() | losses()).items()]
    print(markdown_table(("call", "µs"), rows, text_columns=1))
