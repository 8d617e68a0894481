"""Attention of short ViT sequences: forward and backward of a packed qkv."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import attention_packed

from .harness import DTYPES, Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE, GPU_SIZE
from .rivals import attentions


def ours(qkv: Tensor) -> Tensor:
    return attention_packed(qkv)


def official(qkv: Tensor) -> Tensor:
    """The paper's formula: a batched matrix product, a softmax, a batched matrix product."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def fused(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


RECIPES = [(256, 50, 12, 64, "bf16"), (256, 197, 16, 32, "bf16"), (256, 197, 12, 64, "bf16")]  # MAE ViT-B, and ViT-B
SIZES = [
    *(pytest.param(*size, marks=pytest.mark.skipif(**GPU_SIZE)) for size in RECIPES),
    (64, 50, 12, 64, "fp32"),
    (64, 197, 16, 32, "fp32"),
    (16, 50, 12, 64, "bf16"),
    (16, 197, 16, 32, "bf16"),
    (1, 50, 3, 64, "fp32"),
    (2, 16, 3, 64, "fp32"),
    (2, 16, 3, 64, "bf16"),
    *((3200 // length, length, 12, 64, "fp32") for length in (16, 128, 256, 512)),
]


@pytest.mark.parametrize("batch, length, heads, width, dtype", SIZES)
def test_attention(benchmark, batch, length, heads, width, dtype):
    qkv = torch.randn(batch, length, 3, heads, width, device=DEVICE).to(DTYPES[dtype]).requires_grad_()
    upstream = torch.randn(batch, length, heads, width, device=DEVICE).to(DTYPES[dtype])
    wide, wide_upstream = qkv.detach().float().requires_grad_(), upstream.float()

    def contestant(function):
        return forward_backward(lambda: function(qkv).contiguous(), qkv, upstream=upstream)

    functions = {"ours": ours, "official": official, "SDPA": fused}
    case = Case(
        op="attention_packed",
        size=f"B={batch}, H={heads}, L={length}, E={width}, {dtype}, forward + backward",
        kernel="attention_packed_fwd",
        contestants={name: contestant(function) for name, function in functions.items()},
        rivals={name: contestant(function) for name, function in attentions().items()}
        | compiled_on_gpu(lambda: official(qkv), qkv, upstream=upstream),
        expected=forward_backward(lambda: official(wide), wide, upstream=wide_upstream),
        operations=12 * batch * heads * length**2 * width,  # two products forward, four backward
        dtype=DTYPES[dtype],
        points={"tokens L": length} if batch * length in range(3000, 3201) and dtype == "fp32" else {},
    )
    compare(benchmark, case)
