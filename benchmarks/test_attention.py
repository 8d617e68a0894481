"""Attention of short ViT sequences, with and without a bias, and causal: forward and backward of a packed qkv."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import attention, attention_packed

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


BIASED = [  # BEiT ViT-B, and windows of Swin-T's first and third stages
    (16, 197, 12, 64, "fp32"),
    (16, 197, 12, 64, "bf16"),
    (512, 49, 3, 32, "fp32"),
    (512, 49, 3, 32, "bf16"),
    (64, 49, 12, 32, "bf16"),
]


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("batch, length, heads, width, dtype", BIASED)
def test_attention_with_a_bias(benchmark, batch, length, heads, width, dtype, direction):
    """A relative position bias [H, L, L], as BEiT has it, with its gradient."""
    training = direction != "forward"
    qkv = torch.randn(batch, length, 3, heads, width, device=DEVICE).to(DTYPES[dtype]).requires_grad_(training)
    bias = torch.randn(heads, length, length, device=DEVICE).to(DTYPES[dtype]).requires_grad_(training)
    upstream = torch.randn(batch, length, heads, width, device=DEVICE).to(DTYPES[dtype])
    wide, wide_upstream = qkv.detach().float().requires_grad_(training), upstream.float()

    def with_ours(qkv):
        return attention_packed(qkv, None, bias)

    def with_formula(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1) * width**-0.5 + bias.to(q.dtype)).softmax(-1)
        return (weights @ v).transpose(1, 2)

    def with_sdpa(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None]).transpose(1, 2)

    compare(
        benchmark,
        Case(
            op="attention_packed",
            size=f"B={batch}, H={heads}, L={length}, E={width}, bias [H, L, L], {dtype}, {direction}",
            kernel="attention_packed_bias_fwd",
            contestants={
                name: _contestant(function, qkv, upstream, bias)
                for name, function in {"ours": with_ours, "official": with_formula, "SDPA": with_sdpa}.items()
            },
            rivals=compiled_on_gpu(lambda: with_formula(qkv), qkv, bias, upstream=upstream) if training else {},
            expected=_contestant(with_formula, wide, wide_upstream, bias),
            operations=(12 if training else 4) * batch * heads * length**2 * width,
            dtype=DTYPES[dtype],
        ),
    )


CAUSAL = [  # texts of CLIP, and images of iGPT, 32²
    (64, 77, 8, 64, "fp32"),
    (64, 77, 8, 64, "bf16"),
    (4, 1024, 8, 64, "fp32"),
    (4, 1024, 8, 64, "bf16"),
]


@pytest.mark.parametrize("batch, length, heads, width, dtype", CAUSAL)
def test_causal_attention(benchmark, batch, length, heads, width, dtype):
    qkv = torch.randn(batch, length, 3, heads, width, device=DEVICE).to(DTYPES[dtype]).requires_grad_()
    upstream = torch.randn(batch, length, heads, width, device=DEVICE).to(DTYPES[dtype])
    wide, wide_upstream = qkv.detach().float().requires_grad_(), upstream.float()
    mask = torch.full((length, length), float("-inf"), device=DEVICE).triu(1)

    def with_ours(qkv):
        return attention(*qkv.unbind(2), causal=True)

    def with_formula(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1) * width**-0.5 + mask.to(q.dtype)).softmax(-1)
        return (weights @ v).transpose(1, 2)

    def with_sdpa(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    functions = {"ours": with_ours, "official": with_formula, "SDPA": with_sdpa}
    compare(
        benchmark,
        Case(
            op="attention",
            size=f"B={batch}, H={heads}, L={length}, E={width}, causal, {dtype}, forward + backward",
            kernel="attention_causal_fwd",
            contestants={name: _contestant(function, qkv, upstream) for name, function in functions.items()},
            rivals=compiled_on_gpu(lambda: with_formula(qkv), qkv, upstream=upstream),
            expected=_contestant(with_formula, wide, wide_upstream),
            operations=6 * batch * heads * length**2 * width,  # half of those without a mask
            dtype=DTYPES[dtype],
        ),
    )


def _contestant(function, qkv, upstream, *parameters):
    """The function of qkv: its forward pass, and its backward pass where qkv requires a gradient."""
    if not qkv.requires_grad:
        return lambda: function(qkv).contiguous()
    return forward_backward(lambda: function(qkv).contiguous(), qkv, *parameters, upstream=upstream)
