import itertools

import pytest
import torch

from fastssl.kernels import norm as kernels
from fastssl.kernels import tile
from fastssl.ops import dispatch, norm, residual_norm
from tests.kernels.contract import launched
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model
from tests.support.contract import plain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-6


def made(*shape, dtype=torch.float32, delta=torch.float32, affine=torch.float32):
    x = torch.randn(shape).mul(2).add(0.5).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(affine), torch.randn(shape[-1]).to(affine)
    return x, None if delta is None else torch.randn(shape).to(delta), weight, bias


def check(x, delta, weight, bias, out=None, summed=True):
    """Forward and backward equal the plain-torch bodies up to rounding, because sums are added in another order."""
    out, narrow = out or x.dtype, x.dtype if delta is None else delta.dtype
    forward = (x, delta, weight, bias, EPS, out)
    results, expected = launched(kernels.residual_norm_fwd, *forward)[0], plain(norm._residual_norm_fwd, *forward)
    dsum = torch.randn(x.shape).to(x.dtype) if summed else None
    back = (torch.randn(x.shape).to(out), dsum, x if delta is None else expected[0], *expected[2:], weight, narrow)
    gradients, wanted = launched(kernels.residual_norm_bwd, *back)[0], plain(norm._residual_norm_bwd, *back)
    for i, (result, other) in enumerate(zip((*results, *gradients), (*expected, *wanted), strict=True)):
        assert result.is_contiguous() and (result.shape, result.dtype) == (other.shape, other.dtype)
        kinds = [result.dtype] + [x.dtype] * (i == 5)  # the gradient of delta is that of x as it was written
        tolerance = max(1e-10 if x.dtype == torch.float64 else 2e-5, *(4 * torch.finfo(kind).eps for kind in kinds))
        scale = max(1.0, float(expected[3].max()) if expected[3].numel() else 1.0)  # rstd multiplies the errors of sums
        torch.testing.assert_close(
            result, other, rtol=tolerance, atol=tolerance * scale, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize(
    "shape", [(3, 5, 24), (7, 1, 1), (2, 13, 100), (1, 2, 768), (1, 3, 2500), (1, 1, 16384)], ids=str
)
def test_every_width(shape):
    for delta, summed in itertools.product((torch.float32, None), (True, False)):
        check(*made(*shape, delta=delta), summed=summed)


@pytest.mark.parametrize("delta", [*FLOATS, None], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mixtures_of_dtypes(dtype, delta):
    for affine, out in itertools.product((torch.float32, torch.bfloat16, torch.float64), FLOATS):
        check(*made(3, 5, 50, dtype=dtype, delta=delta, affine=affine), out=out)


def test_any_strides():
    x, delta, weight, bias = made(4, 6, 40)
    check(x.transpose(0, 1), delta[:1].expand(4, 6, 40).transpose(0, 1), weight.flip(0), bias[:1].expand(40))
    check(x[:, ::2, ::2], delta[:, 1::2, 20:], weight[::2], bias[:20])


def test_no_rows():
    for shape in ((0, 5, 8), (4, 0, 8)):
        check(*made(*shape))


def test_rows_that_are_too_wide_raise():
    with pytest.raises(ValueError, match=r"x must have at most 16384 values a row .*, got 16385"):
        kernels.residual_norm_fwd(*made(1, 1, 16385), EPS, torch.float32)


def test_rows_far_from_zero_keep_their_variance():
    """E[x²] − mean² would lose precision by cancellation."""
    x, _, weight, bias = made(2, 3, 64, delta=None)
    x = x + 1000
    (_, normed, _, rstd), _ = launched(kernels.residual_norm_fwd, x, None, weight, bias, EPS, torch.float32)
    exact = plain(norm._residual_norm_fwd, x.double(), None, weight.double(), bias.double(), EPS, torch.float64)
    torch.testing.assert_close(normed.double(), exact[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rstd.double(), exact[3], rtol=1e-5, atol=0)


def test_public_op():
    inputs = [t.requires_grad_() for t in made(2, 5, 40, delta=torch.bfloat16)]
    upstream = torch.randn(2, 5, 40), torch.randn(2, 5, 40).bfloat16()

    def run():
        results = residual_norm(*inputs, dtype=torch.bfloat16)
        return [*results, *torch.autograd.grad(results, inputs, upstream)]

    with dispatch.reference():
        expected = run()
    with triton_on_cpu() as seen:
        found = run()
    assert [kernel for kernel, _ in seen.launches] == ["residual_norm_fwd_kernel", "residual_norm_bwd_kernel"]
    for result, other in zip(found, expected, strict=True):
        tolerance = 2e-5 if result.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_every_configuration(arch):
    with tile.assume_card(arch, 2):  # a program of the backward pass takes several tiles
        check(*made(5, 9, 200, delta=torch.bfloat16), out=torch.bfloat16)


@pytest.mark.parametrize("delta", [2, None])
def test_bytes_are_those_of_the_model(delta):
    B, L, D = 3, 40, 100
    x, d, weight, bias = made(B, L, D, delta=delta and torch.bfloat16)
    with tile.assume_card("sm_90", 4):
        results, count = launched(kernels.residual_norm_fwd, x, d, weight, bias, EPS, torch.bfloat16)
        assert count == model.residual_norm_fwd(B * L, D, 4, delta or 0, 2, 4).requested
        args = results[1], x if d is not None else None, x, *results[2:], weight, torch.bfloat16 if delta else x.dtype
        _, count = launched(kernels.residual_norm_bwd, *args)
        assert count == model.residual_norm_bwd(B * L, D, 4, delta or 0, 2, 4, multiprocessors=4).requested
