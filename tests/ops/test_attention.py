import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.ops import attention, attention_packed, dispatch
from fastssl.ops.attention import (
    _Attention,
    _attention_bwd,
    _attention_fwd,
    _attention_packed_bwd,
    _attention_packed_fwd,
    cudnn_is_faster,
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

# B, L, H, E
SIZES = [(1, 1, 1, 1), (2, 13, 3, 8), (1, 63, 2, 80), (2, 197, 2, 32), (0, 5, 2, 4), (3, 50, 2, 64), (1, 512, 1, 17)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


def test_keys_may_have_another_length():
    q, (_, k, v) = torch.randn(2, 5, 3, 8), packed(2, 9, 3, 8, torch.float32)
    torch.testing.assert_close(attention(q, k, v), formula(q, k, v, 8**-0.5))
    torch.testing.assert_close(op(q, k, v, 8**-0.5), formula(q, k, v, 8**-0.5))
    for dtype in DTYPES:
        q, k = torch.empty(2, 0, 3, 8, dtype=dtype), torch.randn(2, 4, 3, 8).to(dtype)
        dq, dk, dv = _attention_bwd(q, q, k, k, *_attention_fwd(q, k, k, 1.0), 1.0)
        assert dq.shape == q.shape and not dk.any() and not dv.any()  # no query attends to them


def check_exact(q, k, v, dout, scale):
    """Compares output and gradients with float64, and their errors with those of the formula in the inputs' dtype."""
    results = []
    for cast, function in ((torch.float64, formula), (q.dtype, formula), (q.dtype, op)):
        leaves = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
        views = [
            leaf.as_strided(x.shape, x.stride()) if 0 in x.stride() else leaf for leaf, x in zip(leaves, (q, k, v))
        ]
        out = function(*views, scale)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(cast))])
    for name, truth, plain, ours in zip(("out", "dq", "dk", "dv"), *results):
        assert_exact(ours, truth, plain, name)


def check_rounding(q, k, v, dout, scale, rounding=2.0**-9):
    """Output and gradients in bfloat16 differ from float64's by at most three roundings of the terms of their sums: of
    weights or gradients of scores, of the output in the row sum of the softmax's gradient, and of the result."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = formula(*leaves, scale)
    truth = [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]
    sizes = [x.detach().double().abs() for x in (q, k, v, dout, out)]
    weights = (torch.einsum("blhe,bmhe->bhlm", q.double(), k.double()) * scale).softmax(-1)
    row_dot = torch.einsum("blhe,blhe->bhl", sizes[3], sizes[4]).unsqueeze(-1)
    dscores = weights * (torch.einsum("blhe,bmhe->bhlm", sizes[3], sizes[2]) + row_dot) * abs(scale)
    terms = [
        torch.einsum("bhlm,bmhe->blhe", weights, sizes[2]),
        torch.einsum("bhlm,bmhe->blhe", dscores, sizes[1]),
        torch.einsum("bhlm,blhe->bmhe", dscores, sizes[0]),
        torch.einsum("bhlm,blhe->bmhe", weights, sizes[3]),
    ]
    found, lse = _attention_fwd(q, k, v, scale)
    results = (found, *_attention_bwd(dout, q, k, v, found, lse, scale))
    for name, ours, exact, term in zip(("out", "dq", "dk", "dv"), results, truth, terms):
        assert ours.dtype == q.dtype and ours.is_contiguous()
        excess = ((ours.double() - exact).abs() - 3.01 * rounding * term).amax() if ours.numel() else 0
        assert excess <= 1e-30, f"{name}: {excess:.3e} beyond the bound of rounding"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_op_errs_no_more_than_torch(dtype, size):
    check_exact(*packed(*size, dtype), torch.randn(size).to(dtype), size[3] ** -0.5)


@EVERY_PRODUCT
@pytest.mark.parametrize("size", [*SIZES, (2, 50, 2, 32), (1, 33, 1, 70), (1, 129, 2, 64)], ids=str)
def test_bfloat16_errs_no_more_than_torch(products, size):
    """On tiles too, in plain C++ where the processor has none, with padding along every dimension."""
    check_exact(*packed(*size, torch.bfloat16), torch.randn(size).bfloat16(), size[3] ** -0.5)


@EVERY_PRODUCT
@pytest.mark.parametrize("lengths", [(5, 50), (50, 5), (1, 197), (197, 3)], ids=str)
def test_bfloat16_with_keys_of_another_length(products, lengths):
    q, dout = (torch.randn(2, lengths[0], 2, 64).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, lengths[1], 2, 64).bfloat16() for _ in range(2))
    check_exact(q, k, v, dout, 0.125)


@EVERY_PRODUCT
@given(
    batch=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.1, 1.0, 0.0, -0.5]),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture is constant
def test_any_shape_in_bfloat16(products, batch, lengths, width, scale):
    torch.manual_seed(0)
    q, dout = (torch.randn(batch, lengths[0], 2, width).bfloat16() for _ in range(2))
    k, v = (torch.randn(batch, lengths[1], 2, width).bfloat16() for _ in range(2))
    check_rounding(q, k, v, dout, scale, 2.0**-8)  # the most that one rounding to 8 bits can change


@EVERY_PRODUCT
def test_bfloat16_packed_strided_and_on_two_threads(products):
    """Equal bits from one packed tensor, from copies with the width first, and on one thread and two."""
    qkv, dout = joint(3, 70, 5, 33, torch.bfloat16), torch.randn(3, 70, 5, 33).bfloat16()
    strided = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (*qkv.unbind(2), dout)]
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            out, lse = _attention_packed_fwd(qkv, 0.2)
            results.append((out, lse, *_attention_packed_bwd(dout, qkv, out, lse, 0.2).unbind(2)))
            found, lse = _attention_fwd(*strided[:3], 0.2)
            results.append((found, lse, *_attention_bwd(strided[3], *strided[:3], found, lse, 0.2)))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert_same(ours, first)


@EVERY_PRODUCT
@pytest.mark.parametrize("scale", [1e9, -1e9])
def test_bfloat16_with_huge_scores(products, scale):
    check_huge_scores(torch.bfloat16, scale)


@EVERY_PRODUCT
def test_bfloat16_nan_propagates_within_its_query_and_key(products):
    q, k, v = (x.clone() for x in packed(1, 20, 1, 8, torch.bfloat16))
    q[0, 3] = float("nan")
    out, lse = _attention_fwd(q, k, v, 1.0)
    others = [i for i in range(20) if i != 3]
    assert out[0, 3].isnan().all() and out[0, others].isfinite().all()
    dq, dk, dv = _attention_bwd(v, q, k, v, out, lse, 1.0)
    assert dq[0, 3].isnan().all() and dq[0, others].isfinite().all() and dk.isnan().all() and dv.isnan().all()
    v[0, 19, 0, 2] = float("inf")  # the last key, beside zeros of the padding
    out, _ = _attention_fwd(q, k, v, 1.0)
    columns = [i for i in range(8) if i != 2]
    assert (out[0, others, :, 2] == float("inf")).all() and out[0, others][..., columns].isfinite().all()


@given(
    batch=st.integers(0, 3),
    lengths=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    heads=st.integers(1, 3),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 0.0, -0.5]),
)
@settings(max_examples=60)
def test_any_shape(batch, lengths, heads, width, dtype, scale):
    torch.manual_seed(0)
    q, dout = (torch.randn(batch, lengths[0], heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, lengths[1], heads, width).to(dtype) for _ in range(2))
    if dtype == torch.bfloat16:  # with a bf16 dot product weights are rounded before they are multiplied
        return check_rounding(q, k, v, dout, scale)
    with dispatch.reference():
        expected = _attention_fwd(q, k, v, scale)
        gradients = _attention_bwd(dout, q, k, v, *expected, scale)
    found = _attention_fwd(q, k, v, scale)
    tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else {}
    for ours, theirs in zip(
        (*found, *_attention_bwd(dout, q, k, v, *expected, scale)), (*expected, *gradients), strict=True
    ):
        assert ours.dtype == theirs.dtype and ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:, :, :1].expand(x.shape),
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["heads before tokens", "width first", "every other value", "one head expanded", "one sample expanded"],
)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_any_strides(view, dtype):
    q, k, v = (view(x) for x in packed(2, 20, 3, 32, dtype))
    dout = view(torch.randn(2, 20, 3, 32).to(dtype))
    dense = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    ours, same = _attention_fwd(q, k, v, 0.2), _attention_fwd(*dense, 0.2)
    ours, same = (
        (*found, *_attention_bwd(upstream, *inputs, *same, 0.2))
        for found, upstream, inputs in ((ours, dout, (q, k, v)), (same, dout.contiguous(), dense))
    )
    for strided, contiguous in zip(ours, same):
        assert_same(strided, contiguous)


def test_offsets_beyond_32_bits():
    """Heads 2³⁰ values apart, in memory that is mapped and never touched between them."""
    distance = 2**30 + 8
    far = sparse((1, 5, 3, 8), (0, 8, distance, 1))
    near = torch.randn(1, 5, 3, 8)
    far.copy_(near)
    for x, y in zip(_attention_fwd(far, far, far, 0.3), _attention_fwd(near, near, near, 0.3)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_same_bits_on_one_thread_and_on_two(dtype):
    q, k, v = packed(3, 70, 5, 32, dtype)
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            out = _attention_fwd(q, k, v, 0.2)
            results.append((*out, *_attention_bwd(v, q, k, v, *out, 0.2)))
    for one, two in zip(*results):
        assert_same(two, one)


def test_nan_propagates_within_its_query():
    q, k, v = packed(1, 20, 1, 8, torch.float32)
    q = q.clone()
    q[0, 3] = float("nan")
    out = op(q, k, v, 1.0)
    assert out[0, 3].isnan().all() and out[0, [i for i in range(20) if i != 3]].isfinite().all()


def test_one_large_score_at_any_position():
    """Scores of thousands, whose exponentials overflow unless the maximum is subtracted."""
    q, k, v = (1000 * x for x in packed(1, 20, 1, 8, torch.float32))
    torch.testing.assert_close(op(q, k, v, 1.0), formula(q.double(), k.double(), v.double(), 1.0).float())
    for place in range(len(k[0])):
        k = torch.zeros(1, 20, 1, 8)
        k[0, place] = 1e4
        torch.testing.assert_close(op(k.new_ones(1, 3, 1, 8), k, v, 1.0), v[:, place : place + 1].expand(1, 3, 1, 8))


def test_long_sequences_run_in_torch():
    q, k, v = packed(1, 513, 1, 4, torch.float32)
    theirs = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(attention(q, k, v), theirs.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_where_torch_has_no_fused_kernel(dtype, monkeypatch):
    """ATEN_CPU_CAPABILITY below AVX-512 on a processor with AMX: torch's fused kernel would raise."""
    monkeypatch.setattr(sys.modules["fastssl.ops.attention"], "FUSED_16_BIT", False)
    q, k, v = (x.requires_grad_() for x in packed(1, 513, 2, 8, dtype))
    dout = torch.randn(1, 513, 2, 8).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert not [event.key for event in profile.key_averages() if "flash_attention" in event.key]
    results = []
    for cast in (torch.float64, dtype):
        leaves = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
        expected = formula(*leaves, 8**-0.5)
        results.append([expected, *torch.autograd.grad(expected, leaves, dout.to(cast))])
    for ours, truth, plain in zip((out, *gradients), *results):
        assert_as_exact_on_average(ours, truth, plain)
    compiles(attention, *(x[:, :, :1] for x in (q, k, v)))


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
    truth = formula(*(x.bfloat16().double() for x in (q, k, v)), 8**-0.5)
    assert_exact(ours, truth, theirs.transpose(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_contract():
    q, k, v = (x.requires_grad_() for x in packed(2, 9, 2, 8, torch.float32))
    opcheck(_attention_fwd, q, k, v, 0.5)
    out, lse = _attention_fwd(q, k, v, 0.5)
    opcheck(_attention_bwd, torch.randn(2, 9, 2, 8), *(x.detach() for x in (q, k, v, out, lse)), 0.5)
    compiles(lambda q, k, v: op(q, k, v, 0.5), q, k, v)
    compiles(attention, q, k, v)


def joint(batch, length, heads, width, dtype):
    return torch.randn(batch, length, 3, heads, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (1, 513, 1, 3)], ids=str)
def test_packed_is_attention(dtype, size):
    qkv, dout = joint(*size, dtype).requires_grad_(), torch.randn(size).to(dtype)
    results = [attention_packed(qkv, 0.3), attention(*qkv.unbind(2), 0.3)]
    for ours, theirs in zip(*([out, *torch.autograd.grad(out, qkv, dout)] for out in results)):
        assert_same(ours, theirs)
        assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_packed_takes_any_strides(dtype):
    dense, dout = joint(2, 21, 3, 17, dtype), torch.randn(2, 21, 3, 17).to(dtype)
    out, lse = _attention_packed_fwd(dense, 0.2)
    expected = (out, lse, _attention_packed_bwd(dout, dense, out, lse, 0.2))
    for order in ((2, 0, 3, 1, 4), (4, 3, 2, 1, 0)):
        back = [order.index(d) for d in range(5)]
        qkv = dense.permute(order).contiguous().permute(back)
        for ours, theirs in zip(
            (*_attention_packed_fwd(qkv, 0.2), _attention_packed_bwd(dout, qkv, out, lse, 0.2)), expected
        ):
            assert_same(ours, theirs)


def test_packed_gradients_and_contract():
    qkv = joint(2, 5, 2, 3, torch.float64).requires_grad_()
    gradcheck(lambda qkv: attention_packed(qkv, 0.5), qkv)
    refuses_second_derivative(attention_packed, qkv)
    qkv = joint(2, 9, 2, 8, torch.float32).requires_grad_()
    opcheck(_attention_packed_fwd, qkv, 0.5)
    out, lse = _attention_packed_fwd(qkv.detach(), 0.5)
    opcheck(_attention_packed_bwd, torch.randn(2, 9, 2, 8), qkv, out, lse, 0.5)
    compiles(attention_packed, qkv)
    for served, plain in zip((out, lse), reference_packed(qkv.detach(), 0.5), strict=True):
        torch.testing.assert_close(served, plain)


def reference_packed(qkv, scale):
    with dispatch.reference():
        out, lse = _attention_packed_fwd(qkv, scale)
        gradient = _attention_packed_bwd(out, qkv, out, lse, scale)
    torch.testing.assert_close(_attention_packed_bwd(out, qkv, out, lse, scale), gradient, rtol=2e-5, atol=2e-5)
    return out, lse


def test_packed_under_autocast():
    qkv = joint(2, 9, 2, 8, torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_packed(qkv)
        assert_same(out, attention(*qkv.unbind(2)))
        assert attention_packed(qkv.double()).dtype == torch.float64
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e9, -1e9])
def test_huge_scores_choose_one_key(dtype, scale):
    check_huge_scores(dtype, scale)


def check_huge_scores(dtype, scale):
    """Weights are 0 or 1: the result is a row of v, and its gradient the sum over the queries that chose it."""
    q, k, v = (torch.randn(2, length, 3, 16).to(dtype) for length in (40, 37, 37))
    v.requires_grad_()
    chosen = (torch.einsum("blhe,bmhe->blhm", q.double(), k.double()) * scale).argmax(-1)
    expected = v.double().gather(1, chosen[..., None].expand(-1, -1, -1, 16))
    out = attention(q, k, v, scale)
    assert torch.equal(out.double(), expected)
    dout = torch.randn(out.shape).to(dtype)
    (ours,), (wanted,) = torch.autograd.grad(out, v, dout), torch.autograd.grad(expected, v, dout.double())
    torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.05)


def test_error_sentences():
    qkv = joint(2, 9, 2, 8, torch.float32)
    refused(
        "attention_packed: qkv must have shape [B, L, 3, H, E], got [2, 9, 2, 2, 8]",
        ValueError,
        attention_packed,
        qkv[:, :, :2],
    )
    rejects("attention_packed", "qkv", "[2, 0, 3, 2, 8]", ValueError, attention_packed, qkv[:, :0])
    rejects("attention_packed", "qkv", "int64", TypeError, attention_packed, qkv.long())
    q, k, v = packed(2, 9, 2, 8, torch.float32)
    rejects("attention", "k", "[2, 0, 2, 8]", ValueError, attention, q, k[:, :0], v[:, :0])
    rejects("attention", "q", "[9, 2, 8]", ValueError, attention, q[0], k, v)
    rejects("attention", "k", "[2, 9, 1, 8]", ValueError, attention, q, k[:, :, :1], v)
    rejects("attention", "v", "[2, 8, 2, 8]", ValueError, attention, q, k, v[:, 1:])
    refused(
        "attention: q, k and v must have one dtype, got torch.float32, torch.float64, torch.float32",
        TypeError,
        attention,
        q,
        k.double(),
        v,
    )


def test_where_cudnn_is_faster():
    """The sizes at which it was measured to be."""

    def faster(length, width, dtype=torch.bfloat16):
        q = torch.empty(1, length, 1, width, dtype=dtype)
        return cudnn_is_faster(q, q)

    assert faster(197, 64) and faster(257, 64, torch.float16)
    assert not faster(50, 64) and not faster(197, 32) and not faster(197, 64, torch.float32)
