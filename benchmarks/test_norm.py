"""Residual addition and layer norm, at the sizes of a step of MAE: ViT-B, 224², B=16, on a GPU 256."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import residual_norm

from .harness import DTYPES, Case, compare
from .machine import DEVICE

BATCH = 256 if DEVICE.type == "cuda" else 16
SIZES = [(BATCH, 197, 512), (BATCH, 50, 768)]  # the decoder's tokens and the encoder's


def official(x, delta, weight, bias, dtype):
    """Operations under autocast: sum and norm in float32, then the cast for the next linear layer."""
    total = x + delta
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, 1e-6).to(dtype)


def inputs(size, dtype):
    x, delta = torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE).to(dtype)
    return x, delta, torch.randn(size[-1], device=DEVICE), torch.randn(size[-1], device=DEVICE)


def label(size, dtype, direction):
    rows = f"{size[0] * size[1]:,} rows, D={size[2]}"
    return f"{rows}, fp32, {'' if dtype == 'fp32' else f'delta and result {dtype}, '}{direction}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_norm(benchmark, size, dtype):
    args = (*inputs(size, DTYPES[dtype]), DTYPES[dtype])
    fused = torch.compile(official, dynamic=False)
    case = Case(
        op="residual_norm",
        size=label(size, dtype, "forward"),
        kernel="residual_norm_fwd",
        contestants={
            "ours": lambda: residual_norm(*args[:4], dtype=args[4]),
            "official": lambda: official(*args),
            "torch.compile": lambda: fused(*args),
        },
        bytes_moved=2 * args[0].nbytes + 2 * args[1].nbytes,
    )
    compare(benchmark, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_norm_with_gradient(benchmark, size, dtype):
    leaves = [t.requires_grad_() for t in inputs(size, DTYPES[dtype])]
    upstream = torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE).to(DTYPES[dtype])

    def forward_and_backward(forward):
        def run():
            results = forward(*leaves, DTYPES[dtype])
            return *(t.detach() for t in results), *torch.autograd.grad(results, leaves, upstream)

        return run

    case = Case(
        op="residual_norm",
        size=label(size, dtype, "forward + backward"),
        kernel="residual_norm_bwd",
        contestants={
            "ours": forward_and_backward(lambda *args: residual_norm(*args[:4], dtype=args[4])),
            "official": forward_and_backward(official),
            "torch.compile": forward_and_backward(torch.compile(official, dynamic=False)),
        },
        bytes_moved=5 * leaves[0].nbytes + 4 * leaves[1].nbytes,
    )
    compare(benchmark, case)
