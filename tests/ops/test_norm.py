import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.ops import dispatch, norm, residual_norm
from tests.support.close import assert_as_exact_on_average, assert_exact
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    plain,
    refused,
    refuses_second_derivative,
    sparse,
    torch_threads,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-6


def formula(x, delta, weight, bias, dtype=None):
    total = x if delta is None else (x + delta).to(x.dtype)
    normed = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), EPS)
    return total, normed.to(dtype or x.dtype)


def made(*shape, dtype=torch.float32, delta=torch.float32, affine=torch.float32):
    x = torch.randn(shape).mul(2).add(0.5).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(affine), torch.randn(shape[-1]).to(affine)
    return x, None if delta is None else torch.randn(shape).to(delta), weight, bias


def with_gradients(function, inputs, upstream):
    """(results, gradients of the inputs that are not None); `upstream` holds the gradients of the results, or None."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    results = function(*leaves)
    pairs = [(r, g) for r, g in zip(results, upstream) if g is not None]
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad([r for r, _ in pairs], wanted, [g.to(r.dtype) for r, g in pairs])
    return [r.detach() for r in results], gradients


@pytest.mark.parametrize("delta", [torch.float64, None], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 1), (33,), (2, 3, 4, 17), (0, 5, 8), (4, 0, 8)], ids=str)
def test_residual_norm_is_the_formula(shape, delta):
    inputs = made(*shape, dtype=torch.float64, delta=delta, affine=torch.float64)
    upstream = torch.randn(shape).double(), torch.randn(shape).double()
    ours, theirs = (
        with_gradients(function, inputs, upstream)
        for function in (lambda x, d, w, b: residual_norm(x, d, w, b, EPS), formula)
    )
    for result, expected in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_sum_without_delta_is_x_itself():
    for shape in ((2, 3, 8), (2, 8)):
        x, _, weight, bias = made(*shape)
        assert residual_norm(x, None, weight, bias)[0] is x


def test_gradients():
    x, delta, weight, bias = (t.double().requires_grad_() for t in made(2, 3, 5))
    gradcheck(lambda *args: residual_norm(*args), x, delta, weight, bias)
    gradcheck(lambda x, w, b: residual_norm(x, None, w, b)[1], x, weight, bias)
    refuses_second_derivative(lambda x: residual_norm(x, delta, weight, bias)[1], x)
    refuses_second_derivative(lambda d: residual_norm(x, d, weight, bias)[1], delta)


@pytest.mark.parametrize("delta", [torch.float32, torch.bfloat16, None], ids=str)
def test_missing_gradients(delta):
    """Of one of the results; and inputs without a gradient."""
    inputs = made(3, 37, 40, delta=delta)
    for upstream in ((torch.randn(3, 37, 40), None), (None, torch.randn(3, 37, 40))):
        leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
        results, theirs = residual_norm(*leaves, EPS), formula(*leaves)
        wanted = [t for t in leaves if t is not None]
        (ours, expected) = (
            torch.autograd.grad(
                [r for r, g in zip(rs, upstream) if g is not None],
                wanted,
                [g for g in upstream if g is not None],
                allow_unused=True,
            )
            for rs in (results, theirs)
        )
        for gradient, other in zip(ours, expected, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-2 if delta == torch.bfloat16 else 1e-4, atol=1e-4)
    x, d, weight, bias = inputs
    residual_norm(x, d, weight.requires_grad_(), bias)[1].sum().backward()
    assert weight.grad is not None and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 197, 96), (2, 50, 768), (5, 3, 1), (1, 2, 20000)], ids=str)
def test_error_is_at_most_torch_s(dtype, shape):
    """Torch computes in float32 and rounds to the dtypes of the results."""
    inputs = made(*shape, dtype=dtype, delta=dtype)
    upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    total = formula(*inputs)[0]  # the rounded sum, since its rounding is no error of the norm
    ours = with_gradients(lambda x, d, w, b: residual_norm(x, d, w, b, EPS), inputs, upstream)
    wide, exact = (
        with_gradients(
            lambda x, w, b: formula(x, None, w, b),
            [t.to(kind) for t in (total, *inputs[2:])],
            [g.to(kind) for g in upstream],
        )
        for kind in (torch.float32, torch.float64)
    )
    assert torch.equal(ours[0][0], total)
    assert_exact(ours[0][1], exact[0][1], wide[0][1].to(dtype), "normed")
    dx, ddelta, *affine = ours[1]
    for gradient in (dx, ddelta):
        assert_exact(gradient, exact[1][0], wide[1][0].to(dtype), "dx")
    for name, gradient, truth, theirs in zip(("dweight", "dbias"), affine, exact[1][1:], wide[1][1:], strict=True):
        assert_as_exact_on_average(gradient, truth, theirs, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("delta", [*FLOATS, None], ids=str)
def test_mixtures_of_dtypes(dtype, delta):
    for affine, out in itertools.product((torch.float32, torch.bfloat16, torch.float64), FLOATS):
        x, d, weight, bias = made(3, 13, 50, dtype=dtype, delta=delta, affine=affine)
        dsum = None if delta is None else torch.randn(x.shape).to(dtype)
        dnormed = torch.randn(x.shape).to(out)
        args = [x, d, weight, bias, EPS, out]
        results, expected = norm._residual_norm_fwd(*args), plain(norm._residual_norm_fwd, *args)
        back = [dnormed, dsum, x if d is None else results[0], *results[2:], weight, delta or dtype]
        gradients, wanted = norm._residual_norm_bwd(*back), plain(norm._residual_norm_bwd, *back)
        for result, other in zip((*results, *gradients), (*expected, *wanted), strict=True):
            assert result.is_contiguous() and result.shape == other.shape and result.dtype == other.dtype
            dtypes = [result.dtype] + ([dtype] if result is gradients[1] else [])  # ddelta is the rounded dx
            tolerance = max(1e-10 if dtype == torch.float64 else 2e-5, *(4 * torch.finfo(kind).eps for kind in dtypes))
            torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)


def test_public_gradients_have_the_dtypes_of_the_inputs():
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    inputs = [t.to(dtype).requires_grad_() for t, dtype in zip(made(2, 3, 8), dtypes)]
    total, normed = residual_norm(*inputs, dtype=torch.bfloat16)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    (total.sum() + normed.sum()).backward()
    assert tuple(t.grad.dtype for t in inputs) == dtypes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast(dtype):
    """The normalised rows have the dtype of autocast; the residual stream keeps its dtype."""
    x, delta, weight, bias = made(2, 3, 24, dtype=dtype, delta=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = residual_norm(x, delta, weight, bias)
        named = residual_norm(x, delta, weight, bias, dtype=torch.float32)[1]
    out = dtype if dtype == torch.float64 else torch.bfloat16
    expected, wide = residual_norm(x, delta, weight, bias, dtype=out)
    assert total.dtype == dtype and normed.dtype == out and named.dtype == torch.float32
    assert torch.equal(total, expected) and torch.equal(normed, wide)


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_strides(data):
    batch, length, width = (data.draw(st.integers(low, most)) for low, most in ((0, 4), (0, 70), (1, 90)))
    order = data.draw(st.permutations(range(3)))

    def strided():
        shape, step = (batch, length, width), data.draw(st.sampled_from([1, 2]))
        base = torch.randn([shape[d] * step for d in order])[::step, ::step, ::step]
        return base.permute([order.index(d) for d in range(3)])

    x, delta, dsum, dnormed = (strided() for _ in range(4))
    vectors = [torch.randn(2 * width)[::2] for _ in range(2)]
    fwd = [x, delta if data.draw(st.booleans()) else None, *vectors, EPS, torch.float32]
    results, expected = norm._residual_norm_fwd(*fwd), plain(norm._residual_norm_fwd, *fwd)
    back = [dnormed, dsum, x, *results[2:], vectors[0], torch.bfloat16]
    gradients, others = norm._residual_norm_bwd(*back), plain(norm._residual_norm_bwd, *back)
    for i, (result, other) in enumerate(zip((*results, *gradients), (*expected, *others), strict=True)):
        assert result.is_contiguous() or result.numel() == 0
        if width > 8 or i < 2:  # few values may be nearly equal, which magnifies rounding
            tolerance = 2e-2 if result.dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)


def test_rows_far_from_zero_and_constant_rows():
    x = torch.full((1, 4, 512), 1000.0)
    x[:, 1] += torch.rand(512) * 0.01
    x[:, 2] = 0
    weight, bias = torch.ones(512), torch.zeros(512)
    (truth, theirs) = (formula(x.to(dtype), None, weight, bias)[1] for dtype in (torch.float64, torch.float32))
    assert_exact(residual_norm(x, None, weight, bias)[1], truth, theirs)
    assert residual_norm(x.fill_(float("nan")), None, weight, bias)[1].isnan().all()


def test_results_larger_than_the_cache():
    """Results of 16 MB and more are written with non-temporal stores."""
    x, delta, weight, bias = made(1, 8200, 513, delta=torch.bfloat16)
    total, normed = residual_norm(x, delta, weight, bias, EPS)
    expected, theirs = formula(x, delta, weight, bias)
    assert torch.equal(total, expected)
    torch.testing.assert_close(normed, theirs, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_31_bits():
    for strides in ((2**31, 16, 1), (16, 2**30, 1)):
        x, delta = (sparse((2, 3, 16), strides).copy_(torch.randn(2, 3, 16)) for _ in range(2))
        weight, bias = torch.ones(16), torch.zeros(16)
        far, near = residual_norm(x, delta, weight, bias), residual_norm(x.clone(), delta.clone(), weight, bias)
        assert all(torch.equal(one, other) for one, other in zip(far, near))


def test_same_bits_on_one_thread_and_on_two():
    inputs, upstream = made(4, 197, 512, delta=torch.bfloat16), [torch.randn(4, 197, 512) for _ in range(2)]
    found = []
    for count in (1, 2):
        with torch_threads(count):
            results, gradients = with_gradients(lambda *args: residual_norm(*args), inputs, upstream)
            found.append([*results, *gradients])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_tensors_kept_for_the_gradient():
    """The sum, two numbers a row and the weight; neither the normalised rows nor a copy of x."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, delta, weight, bias = (t.requires_grad_() for t in made(2, 5, 8))
        total, _ = residual_norm(x, delta, weight, bias, dtype=torch.bfloat16)
        residual_norm(x, None, weight, bias)
    assert [t.numel() for t in kept] == [80, 10, 10, 8] * 2
    assert kept[0].data_ptr() == total.data_ptr() and kept[4].data_ptr() == x.data_ptr()


def test_contract():
    x, delta, weight, bias = (t.requires_grad_() for t in made(2, 3, 8))
    for d, out in ((delta, torch.float32), (None, torch.bfloat16)):
        opcheck(norm._residual_norm_fwd, x, d, weight, bias, EPS, out)
        _, normed, mean, rstd = norm._residual_norm_fwd(x.detach(), d, weight.detach(), bias.detach(), EPS, out)
        for dsum, narrow in ((None, torch.float32), (torch.randn(2, 3, 8), torch.bfloat16)):
            opcheck(norm._residual_norm_bwd, normed, dsum, x, mean, rstd, weight, narrow)
    compiles(lambda *args: residual_norm(*args), x, delta, weight, bias)
    compiles(lambda *args: residual_norm(*args)[1], x, delta, weight, bias)
    compiles(lambda x, w, b: residual_norm(x, None, w, b), x, weight, bias)


def test_native_where_it_is_built():
    assert dispatch.native_level() is None or dispatch.has_kernel("residual_norm_fwd", "cpu")


def test_error_sentences():
    x, delta, weight, bias = made(2, 3, 8)
    refused(
        "residual_norm: x must be a tensor of shape [..., D], D ≥ 1, got [2, 0]",
        ValueError,
        residual_norm,
        x.new_zeros(2, 0),
        None,
        weight,
        bias,
    )
    refused(
        "residual_norm: delta must have the shape of x, [2, 3, 8], got [2, 8]",
        ValueError,
        residual_norm,
        x,
        delta[:, 0],
        weight,
        bias,
    )
    refused(
        "residual_norm: weight must have shape [D=8], got [7]", ValueError, residual_norm, x, None, weight[1:], bias
    )
    refused(
        "residual_norm: delta must be float32, float64, bfloat16 or float16, got int64",
        TypeError,
        residual_norm,
        x,
        delta.long(),
        weight,
        bias,
    )
    refused(
        "residual_norm: dtype must be float32, float64, bfloat16 or float16, got int8",
        TypeError,
        residual_norm,
        x,
        delta,
        weight,
        bias,
        dtype=torch.int8,
    )
    refused(
        "residual_norm: weight must be on cpu like x, got meta",
        ValueError,
        residual_norm,
        x,
        delta,
        weight.to("meta"),
        bias,
    )
