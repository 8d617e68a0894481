"""`attention` with an additive bias, and causal."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import attention, attention_packed, dispatch
from fastssl.ops.attention_bias import (
    AttentionBias,
    AttentionCausal,
    AttentionPackedBias,
    _attention_bias_bwd,
    _attention_bias_fwd,
    _attention_causal_bwd,
    _attention_causal_fwd,
    _attention_packed_bias_bwd,
    _attention_packed_bias_fwd,
)
from tests.support.close import assert_as_exact_on_average, assert_exact, assert_same
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    refused,
    refuses_second_derivative,
    rejects,
    sparse,
    torch_threads,
)
from tests.support.products import EVERY_PRODUCT

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
@pytest.mark.parametrize("length", [21, 1025])
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


# B, (L, M), H, E
SIZES = [(1, (1, 1), 1, 1), (3, (50, 50), 2, 64), (2, (13, 197), 3, 20), (0, (5, 4), 2, 4), (9, (97, 33), 1, 32)]


def check_exact(q, k, v, bias, scale):
    """Output and gradients are compared with float64, and their errors with those of the formula in the same dtypes."""
    dout, results = torch.randn(q.shape).to(q.dtype), []
    for wide, function in ((True, formula), (False, formula), (False, AttentionBias.apply)):
        leaves = [(x.detach().double() if wide else x.detach()).requires_grad_() for x in (q, k, v, bias)]
        arguments = leaves if function is formula else leaves[:4]
        if function is formula:
            out = formula(*arguments[:3], arguments[3].to(leaves[0].dtype), scale)
        else:
            out = function(*arguments, scale)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for name, truth, plain, ours in zip(("out", "dq", "dk", "dv", "dbias"), *results):
        assert ours.is_contiguous() or name == "out"
        compared = assert_as_exact_on_average if q.dtype == torch.float32 else assert_exact
        compared(ours, truth, plain, name)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_op_errs_no_more_than_torch(size, dtype, shared):
    check_exact(*operands(*size, dtype, shared), size[3] ** -0.5)


@EVERY_PRODUCT
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each sample"])
@pytest.mark.parametrize("size", [*SIZES, (2, (129, 70), 2, 33)], ids=str)
def test_bfloat16_errs_no_more_than_torch(products, size, shared):
    check_exact(*operands(*size, torch.bfloat16, shared), size[3] ** -0.5)


@EVERY_PRODUCT
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=str)
def test_bias_of_another_dtype(products, bias_dtype):
    for dtype in DTYPES:
        q, k, v, bias = operands(2, (20, 35), 2, 8, dtype, bias_dtype=bias_dtype)
        out, lse = _attention_bias_fwd(q, k, v, bias, -0.3)
        with dispatch.reference():
            expected = _attention_bias_fwd(q, k, v, bias, -0.3)
            gradients = _attention_bias_bwd(out, q, k, v, bias, out, lse, -0.3, True)
        found = _attention_bias_bwd(out, q, k, v, bias, out, lse, -0.3, True)
        tolerance = {"rtol": 3e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 2e-5, "atol": 2e-5}
        for ours, theirs in zip((out, lse, *found), (*expected, *gradients), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, **tolerance)


@EVERY_PRODUCT
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_same_bits_from_any_strides_and_number_of_threads(products, dtype):
    """Also from one bias expanded over the samples, whose gradient is not summed."""
    q, k, v, bias = operands(70, (33, 20), 2, 17, dtype)
    dout = torch.randn(q.shape).to(dtype)
    biases = [bias, bias.permute(2, 1, 0).contiguous().permute(2, 1, 0), torch.stack([bias, bias], -1)[..., 0]]
    results = []
    for threads, given in ((1, bias), *((2, given) for given in biases), (2, bias.expand(70, -1, -1, -1))):
        with torch_threads(threads):
            out, lse = _attention_bias_fwd(q, k, v, given, 0.2)
            results.append((out, lse, *_attention_bias_bwd(dout, q, k, v, given, out, lse, 0.2, True)))
    *_, each = results.pop()
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert_same(ours, first)
    *_, dbias = results[0]
    torch.testing.assert_close(
        each.double().sum(0), dbias.double(), rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.05
    )


@EVERY_PRODUCT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_have_no_weight_and_no_gradient(products, dtype):
    q, k, v, bias = operands(2, (20, 37), 2, 16, dtype)
    mask = torch.rand(20, 37) < 0.5
    mask[:, 5] = False
    bias[:, mask] = float("-inf")
    bias[1, 3] = float("-inf")  # a query without keys
    out, lse = _attention_bias_fwd(q, k, v, bias, 0.25)
    dq, dk, _, dbias = _attention_bias_bwd(out.nan_to_num(), q, k, v, bias, out.nan_to_num(), lse, 0.25, True)
    assert out[:, 3, 1].isnan().all() and out[:, 3, 0].isfinite().all() and out[:, 4:].isfinite().all()
    assert dk[:, :, 1].isnan().any() and dk[:, :, 0].isfinite().all() and dq[:, 4:].isfinite().all()
    assert not dbias[0][mask].any()
    kept = formula(*(x.double()[:, :, :1] for x in (q, k, v)), bias[:1].double(), 0.25)
    torch.testing.assert_close(out[:, :, :1].double(), kept, rtol=0.02, atol=0.02)


def test_no_tensor_of_all_scores():
    """The gradient of a shared bias holds the sums of a few parts, not [B, H, L, M]."""
    q, k, v, bias = operands(512, (64, 64), 4, 4, torch.float32)
    scores = 4 * 512 * 4 * 64 * 64
    out, lse = _attention_bias_fwd(q, k, v, bias, 0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _attention_bias_bwd(out, q, k, v, bias, out, lse, 0.5, True)
    most = max(event.cpu_memory_usage for event in profile.events())
    assert most < scores / 2


def test_a_bias_without_gradient():
    q, k, v, bias = operands(2, (9, 7), 2, 8)
    *_, dbias = _attention_bias_bwd(q, q, k, v, bias, *_attention_bias_fwd(q, k, v, bias, 1.0), 1.0, False)
    assert dbias.shape == (0,)
    out = attention(q.requires_grad_(), k, v, bias=bias)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in (out, formula(q, k, v, bias, 8**-0.5))))


def test_autocast_leaves_the_bias():
    q, k, v, bias = operands(2, (9, 7), 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, bias=bias.requires_grad_())
        assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert bias.grad.dtype == torch.float32
    assert_same(out, attention(*(x.bfloat16() for x in (q, k, v)), bias=bias))


def test_offsets_beyond_32_bits():
    near = torch.randn(2, 5, 7)
    far = sparse((2, 5, 7), (2**31, 2**28, 1))
    far.copy_(near)
    q, k, v, _ = operands(1, (5, 7), 2, 8, torch.float32)
    for x, y in zip(_attention_bias_fwd(q, k, v, far, 0.3), _attention_bias_fwd(q, k, v, near, 0.3)):
        assert torch.equal(x, y)


def causal_formula(q, k, v, scale):
    mask = torch.full((q.shape[1], k.shape[1]), float("-inf"), dtype=q.dtype).triu(1)
    return formula(q, k, v, mask, scale)


@EVERY_PRODUCT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (2, 33, 2, 64), (1, 77, 2, 20), (1, 197, 2, 32), (2, 140, 1, 33)], ids=str
)
def test_causal_errs_no_more_than_torch(products, size, dtype):
    if dtype != torch.bfloat16 and products != "float32":
        pytest.skip("only bfloat16 has several products")
    q, k, v = torch.randn(size[0], size[1], 3, *size[2:]).to(dtype).unbind(2)
    dout, results = torch.randn(size).to(dtype), []
    for cast, function in ((torch.float64, causal_formula), (dtype, causal_formula), (dtype, AttentionCausal.apply)):
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, -0.2)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(cast))])
    for name, truth, plain, ours in zip(("out", "dq", "dk", "dv"), *results):
        assert_exact(ours, truth, plain, name)


def test_causal_is_torchs():
    q, k, v, _ = operands(2, (17, 17), 2, 8, torch.float32)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, 0.3, causal=True), theirs.transpose(1, 2))
    long = torch.randn(1, 2305, 3, 1, 4).unbind(2)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in long), is_causal=True)
    assert torch.equal(attention(*long, causal=True), expected.transpose(1, 2))
    zero = attention(q, k, v, 0.0, causal=True)
    torch.testing.assert_close(zero[:, 3], v[:, :4].mean(1))


@EVERY_PRODUCT
def test_no_key_after_a_query_reaches_it(products):
    """The same bits on one thread and two."""
    for dtype in DTYPES[1:3]:
        q, k, v, _ = operands(3, (150, 150), 2, 16, dtype)
        results = []
        for threads in (1, 2):
            with torch_threads(threads):
                out, lse = _attention_causal_fwd(q, k, v, 0.3)
                results.append((out, lse, *_attention_causal_bwd(v, q, k, v, out, lse, 0.3)))
        for ours, first in zip(*results):
            assert_same(ours, first)
        changed = k.clone()
        changed[:, 100:] = 50.0
        out, _ = _attention_causal_fwd(q, changed, v, 0.3)
        assert_same(out[:, :100], results[0][0][:, :100])


def test_causal_gradients_and_contract():
    q, k, v, _ = operands(1, (5, 5), 2, 3)
    gradcheck(lambda q, k, v: AttentionCausal.apply(q, k, v, 0.5), *(x.requires_grad_() for x in (q, k, v)))
    refuses_second_derivative(lambda q: AttentionCausal.apply(q, k, v, 0.5), q)
    q, k, v, _ = operands(2, (9, 9), 2, 8, torch.float32)
    opcheck(_attention_causal_fwd, q, k, v, 0.5)
    out, lse = _attention_causal_fwd(q, k, v, 0.5)
    opcheck(_attention_causal_bwd, torch.randn(out.shape), q, k, v, out, lse, 0.5)
    with dispatch.reference():
        expected = _attention_causal_fwd(q, k, v, 0.5)
    torch.testing.assert_close((out, lse), expected)
