"""`attention` with an additive bias, and causal."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import attention, attention_packed
from fastssl.ops.attention_bias import (
    AttentionBias,
    AttentionPackedBias,
    _attention_bias_bwd,
    _attention_bias_fwd,
    _attention_packed_bias_bwd,
    _attention_packed_bias_fwd,
)
from tests.support.close import assert_same
from tests.support.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative, rejects

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def operands(batch, lengths, heads, width, dtype=torch.float64, shared=True, bias_dtype=None):
    """q, k, v, bias of `lengths` queries and keys."""
    queries, keys = lengths
    q = torch.randn(batch, queries, heads, width).to(dtype)
    k, v = (torch.randn(batch, keys, heads, width).to(dtype) for _ in range(2))
    bias = torch.randn(heads, queries, keys) if shared else torch.randn(batch, heads, queries, keys)
    return q, k, v, bias.to(bias_dtype or dtype)


def formula(q, k, v, bias, scale):
    scores = torch.einsum("blhe,bmhe->bhlm", q, k) * scale + bias
    return torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
@pytest.mark.parametrize("function", [attention, AttentionBias.apply], ids=["public", "op"])
def test_attention_is_the_formula(function, shared):
    operators = [x.requires_grad_() for x in operands(3, (13, 9), 2, 8, shared=shared)]
    arguments = (*operators[:3], 0.3, operators[3]) if function is attention else (*operators, 0.3)
    results = function(*arguments), formula(*operators, 0.3)
    torch.testing.assert_close(*results)
    dout = torch.randn(results[0].shape).double()
    for ours, theirs in zip(*(torch.autograd.grad(out, operators, dout) for out in results)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
@pytest.mark.parametrize("length", [21, 513])
def test_packed_is_attention(length, shared):
    qkv, dout = torch.randn(2, length, 3, 2, 4).requires_grad_(), torch.randn(2, length, 2, 4)
    bias = torch.randn(*(() if shared else (2,)), 2, length, length).requires_grad_()
    results = [attention_packed(qkv, 0.3, bias), attention(*qkv.unbind(2), 0.3, bias)]
    for ours, theirs in zip(*([out, *torch.autograd.grad(out, (qkv, bias), dout)] for out in results)):
        assert_same(ours, theirs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
def test_gradients(shared):
    q, k, v, bias = (x.requires_grad_() for x in operands(2, (4, 5), 2, 3, shared=shared))
    gradcheck(lambda q, k, v, bias: AttentionBias.apply(q, k, v, bias, 0.5), q, k, v, bias)
    refuses_second_derivative(lambda bias: AttentionBias.apply(q, k, v, bias, 0.5), bias)
    qkv = torch.randn(2, 4, 3, 2, 3).double().requires_grad_()
    bias = bias[..., :4].detach().requires_grad_()
    gradcheck(lambda qkv, bias: AttentionPackedBias.apply(qkv, bias, 0.5), qkv, bias)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
def test_contract(shared):
    q, k, v, bias = operands(2, (9, 7), 2, 8, torch.float32, shared)
    opcheck(_attention_bias_fwd, q, k, v, bias, 0.5)
    out, lse = _attention_bias_fwd(q, k, v, bias, 0.5)
    for with_dbias in (False, True):
        opcheck(_attention_bias_bwd, torch.randn(out.shape), q, k, v, bias, out, lse, 0.5, with_dbias)
    qkv, bias = torch.randn(2, 9, 3, 2, 8), torch.randn(*(() if shared else (2,)), 2, 9, 9)
    opcheck(_attention_packed_bias_fwd, qkv, bias, 0.5)
    out, lse = _attention_packed_bias_fwd(qkv, bias, 0.5)
    opcheck(_attention_packed_bias_bwd, torch.randn(out.shape), qkv, bias, out, lse, 0.5, True)
    compiles(
        lambda q, k, v, bias: attention(q, k, v, None, bias), *(x.requires_grad_() for x in (q, k, v)), bias[..., :7]
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_causal_is_torchs(dtype):
    q, k, v, _ = operands(2, (17, 17), 2, 8, dtype)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, 0.3, causal=True), theirs.transpose(1, 2))
    mask = torch.full((2, 17, 17), float("-inf"), dtype=dtype).triu(1)
    torch.testing.assert_close(attention(q, k, v, 0.3, causal=True), attention(q, k, v, 0.3, mask))


def test_error_sentences():
    q, k, v, bias = operands(2, (9, 7), 3, 8, torch.float32)
    call = lambda bias, **options: attention(q, k, v, bias=bias, **options)  # noqa: E731
    refused("attention: bias must have shape [H=3, L=9, M=7], got [9, 7]", ValueError, call, bias[0])
    refused("attention: bias must have shape [B=2, H=3, L=9, M=7], got [1, 3, 9, 7]", ValueError, call, bias[None])
    rejects("attention", "bias", "int64", TypeError, call, bias.long())
    rejects("attention", "bias", "list", TypeError, call, [bias])
    rejects("attention", "causal", "True", ValueError, lambda: attention(q, q, q, bias=bias, causal=True))
    rejects("attention", "causal", "7", ValueError, lambda: attention(q, k, v, causal=True))
    rejects(
        "attention_packed", "bias", "[3, 9, 7]", ValueError, attention_packed, torch.randn(2, 9, 3, 3, 8), None, bias
    )
