"""The first linear layer of an MLP with its GELU, at the sizes of a step of MAE on a GPU: ViT-B, 224², B=256."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import bias_gelu

from .harness import Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE

SIZES = [(256 * 50, 768), (256 * 197, 512)]  # the encoder's tokens and the decoder's, and their width


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on CPUs `linear` computes the GELU")
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
