"""GELU in a step of MAE, ViT-B, 224²: with the product and bias before it on a GPU (B=256), alone on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import bias_gelu
from fastssl.ops.gelu import gelu_bwd_, gelu_fwd

from .harness import DTYPES, Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE

SIZES = [(256 * 50, 768), (256 * 197, 512)]  # the encoder's tokens and the decoder's, and their width


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on CPUs `linear` computes the GELU: test_gelu")
@pytest.mark.parametrize("rows, width", SIZES)
def test_bias_gelu(benchmark, rows, width):
    """Forward and backward: the bias in the product and its gradient by a sum, or both in the GELU."""
    x, upstream = (torch.randn(rows, n, device=DEVICE, dtype=torch.bfloat16) for n in (width, 4 * width))
    weight = (torch.randn(4 * width, width, device=DEVICE) / width**0.5).bfloat16()
    bias = torch.randn(4 * width, device=DEVICE).bfloat16()
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))

    def official():
        return F.gelu(F.linear(x, weight, bias))

    case = Case(
        op="bias_gelu",
        size=f"{rows:,} rows, {width} to {4 * width:,}, bf16, with the product, forward + backward",
        kernel="bias_gelu_bwd",
        contestants={
            "ours": forward_backward(lambda: bias_gelu(F.linear(x, weight), bias), *leaves, upstream=upstream),
            "official": forward_backward(official, *leaves, upstream=upstream),
        },
        rivals=compiled_on_gpu(official, *leaves, upstream=upstream),
        operations=6 * rows * width * 4 * width,
        dtype=torch.bfloat16,
    )
    compare(benchmark, case)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the ops of `linear` on CPUs")
@pytest.mark.parametrize("rows, width", [(800, 3072), (3152, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(benchmark, rows, width, dtype):
    """GELU as `linear` computes it: forward, then again with the gradient. The formula would keep it instead."""
    x, upstream = (torch.randn(rows, width).to(DTYPES[dtype]) for _ in range(2))
    gradient = torch.empty_like(upstream)

    def ours():
        y = gelu_fwd(x)
        gelu_bwd_(gradient.copy_(upstream), x)
        return y, gradient

    def official():
        return F.gelu(x), torch.ops.aten.gelu_backward(upstream, x)

    case = Case(
        op="GELU",
        size=f"{rows:,} × {width:,}, {dtype}, forward + backward",
        kernel="gelu_fwd",
        contestants={"ours": ours, "official": official, "torch.compile": torch.compile(official, dynamic=False)},
        bytes_moved=5 * x.nbytes,
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
