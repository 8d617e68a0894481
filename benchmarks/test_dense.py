"""Linear layers of MAE's ViT-B and its decoder, forward and backward: single layers, and an MLP with its GELU.

As in the trainer's step, weights are rounded once a call, by `RoundedWeights`.
"""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import linear
from fastssl.ops.products import RoundedWeights

from .harness import DTYPES, Case, compare, forward_backward
from .machine import DEVICE

LAYERS = [(800, 768, 2304), (800, 768, 768), (3152, 512, 1536), (3152, 512, 512)]  # tokens, inputs, outputs
MLPS = [(800, 768), (3152, 512)]  # tokens, width


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5) for shape in shapes]


def rounding(run):
    """`run` with weights rounded once, as in a step."""
    rounded = RoundedWeights()

    def step():
        rounded.refresh()
        with rounded:
            return run()

    return step


def measure(benchmark, op, size, dtype, ours, official, inputs, operations, **baselines):
    """Compares the contestants, under autocast for bf16, in that dtype."""
    dtype_name, dtype = dtype, DTYPES[dtype]
    upstream = torch.randn(inputs[0].shape[0], official().shape[1], device=DEVICE).to(dtype)

    def contestant(forward):
        def run():
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                result = forward()
            return [t.to(dtype) for t in (result, *torch.autograd.grad(result, inputs, upstream))]

        return run

    compare(
        benchmark,
        Case(
            op=op,
            size=f"{size}, {dtype_name}{' autocast' if dtype == torch.bfloat16 else ''}, forward + backward",
            kernel="gelu_fwd" if "GELU" in op else "product",
            contestants={"ours": rounding(contestant(ours))}
            | {name: contestant(forward) for name, forward in {"official": official, **baselines}.items()},
            expected=forward_backward(official, *inputs, upstream=upstream.float()),
            operations=operations,
            dtype=dtype,
        ),
    )


@pytest.mark.parametrize("tokens, depth, columns", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(benchmark, tokens, depth, columns, dtype):
    x = torch.randn(tokens, depth, device=DEVICE).to(DTYPES[dtype]).float().requires_grad_()
    weight, bias = weights((columns, depth), (columns,))
    inputs = x, weight, bias
    measure(
        benchmark,
        "linear",
        f"{tokens:,} × {depth:,} → {columns:,}",
        dtype,
        lambda: linear(*inputs),
        lambda: F.linear(*inputs),
        inputs,
        6 * tokens * depth * columns,
        **{"torch.compile": torch.compile(lambda: F.linear(*inputs), dynamic=False)},
    )


@pytest.mark.parametrize("tokens, width", MLPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(benchmark, tokens, width, dtype):
    x = torch.randn(tokens, width, device=DEVICE).to(DTYPES[dtype]).float().requires_grad_()
    inputs = x, *weights((4 * width, width), (4 * width,), (width, 4 * width), (width,))

    def official():
        _, weight1, bias1, weight2, bias2 = inputs
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    def ours():
        _, weight1, bias1, weight2, bias2 = inputs
        return linear(linear(x, weight1, bias1), weight2, bias2, gelu=True)

    measure(
        benchmark,
        "linear, GELU, linear",
        f"{tokens:,} × {width} → {4 * width:,} → {width}",
        dtype,
        ours,
        official,
        inputs,
        48 * tokens * width**2,
        **{"torch.compile": torch.compile(official, dynamic=False)},
    )
