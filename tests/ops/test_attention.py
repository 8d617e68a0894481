import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import attention
from fastssl.ops.attention import _Attention, _attention_bwd, _attention_fwd
from tests.close import assert_exact
from tests.ops.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative

SIZES = [(1, 1, 1, 1), (2, 13, 3, 8), (1, 63, 2, 80), (2, 197, 2, 32), (0, 5, 2, 4)]  # B, L, H, E


def packed(batch, length, heads, width, dtype=torch.float64):
    return torch.randn(batch, length, 3, heads, width).to(dtype).unbind(2)


def formula(q, k, v, scale):
    scores = torch.einsum("blhe,bmhe->bhlm", q, k) * scale
    return torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v)


def op(q, k, v, scale):
    return _Attention.apply(q, k, v, scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("function", [attention, op], ids=["public", "op"])
def test_attention_is_the_formula(size, function):
    q, k, v = (x.requires_grad_() for x in packed(*size))
    results = function(q, k, v, 0.3), formula(q, k, v, 0.3)
    assert results[0].is_contiguous()
    torch.testing.assert_close(*results)
    dout = torch.randn(size).double()
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in results)):
        torch.testing.assert_close(ours, theirs)


def test_keys_may_be_of_another_length():
    q, (_, k, v) = torch.randn(2, 5, 3, 8), packed(2, 9, 3, 8, torch.float32)
    torch.testing.assert_close(attention(q, k, v), formula(q, k, v, 8**-0.5))
    torch.testing.assert_close(op(q, k, v, 8**-0.5), formula(q, k, v, 8**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_op_errs_no_more_than_torch(dtype):
    qkv = packed(2, 50, 2, 32, dtype)
    dout = torch.randn(2, 50, 2, 32).to(dtype)
    results = []
    for cast, function in ((torch.float64, formula), (dtype, formula), (dtype, op)):
        q, k, v = (x.to(cast).requires_grad_() for x in qkv)
        out = function(q, k, v, 32**-0.5)
        results.append([out, *torch.autograd.grad(out, (q, k, v), dout.to(cast))])
    for name, truth, plain, ours in zip(("out", "dq", "dk", "dv"), *results):
        assert_exact(ours, truth, plain, name)


def test_large_scores_stay_finite():
    q, k, v = (1000 * x for x in packed(1, 20, 1, 8, torch.float32))
    assert op(q, k, v, 1.0).isfinite().all()


def test_gradients():
    q, k, v = (x.clone().requires_grad_() for x in packed(1, 5, 2, 3))
    gradcheck(lambda q, k, v: op(q, k, v, 0.5), q, k, v)
    gradcheck(attention, q, k, v)
    refuses_second_derivative(lambda q: op(q, k, v, 0.5), q)


def test_autocast_converts_like_torch():
    q, k, v = packed(2, 9, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(q, k, v)
        theirs = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_contract():
    q, k, v = (x.requires_grad_() for x in packed(2, 9, 2, 8, torch.float32))
    opcheck(_attention_fwd, q, k, v, 0.5)
    out, lse = _attention_fwd(q, k, v, 0.5)
    opcheck(_attention_bwd, torch.randn(2, 9, 2, 8), *(x.detach() for x in (q, k, v, out, lse)), 0.5)
    compiles(lambda q, k, v: op(q, k, v, 0.5), q, k, v)
    compiles(attention, q, k, v)


def test_error_sentences():
    q, k, v = packed(2, 9, 2, 8, torch.float32)
    refused("attention: q must have shape [B, L, H, E], got [9, 2, 8]", ValueError, attention, q[0], k, v)
    refused(
        "attention: k must have shape [B=2, L, H=2, E=8], got [2, 9, 1, 8]", ValueError, attention, q, k[:, :, :1], v
    )
    refused(
        "attention: v must have shape [B=2, L=9, H=2, E=8], got [2, 8, 2, 8]", ValueError, attention, q, k, v[:, 1:]
    )
    refused(
        "attention: q, k and v must have one dtype, got torch.float32, torch.float64, torch.float32",
        TypeError, attention, q, k.double(), v,
    )  # fmt: skip
