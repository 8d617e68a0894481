import importlib
import itertools

import pytest
import torch

from fastssl.kernels import batchnorm as kernels
from fastssl.kernels import tile
from fastssl.ops import Running, batch_norm, dispatch
from tests.kernels.contract import every_architecture, launched
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model
from tests.support.contract import plain

module = importlib.import_module("fastssl.ops.batchnorm")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5


def made(shape, dtype=torch.float32, mean=5.0):
    """x, weight, bias, residual, dy, as the op's public function passes them."""
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    x, residual, dy = (
        t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in (x + mean, residual, dy)
    )
    wide = torch.promote_types(dtype, torch.float32)
    return x, torch.randn(shape[1]).to(wide), torch.randn(shape[1]).to(wide), residual, dy


def check(shape, dtype=torch.float32, splits=1, relu=True, with_residual=True, mean=5.0):
    """Forward and backward equal the plain-torch bodies up to rounding, because sums are added in another order."""
    x, weight, bias, residual, dy = made(shape, dtype, mean)
    forward = (x, weight, bias, residual if with_residual else None, EPS, splits, relu)
    results, expected = launched(kernels.batch_norm_fwd, *forward)[0], plain(module._batch_norm_fwd, *forward)
    y, means, invstd, _ = expected
    near = (y if relu and with_residual else plain(module._batch_norm_fwd, *forward[:6], False)[0]).abs() < 1e-3
    dy[near] = 0  # where rounding decides the gradient of the ReLU
    back = (dy, x, y if relu and with_residual else None, weight, bias, means, invstd, relu)
    gradients, wanted = launched(kernels.batch_norm_bwd, *back)[0], plain(module._batch_norm_bwd, *back)
    for i, (result, other) in enumerate(zip((*results, *gradients), (*expected, *wanted), strict=True)):
        assert (result.shape, result.dtype, result.stride()) == (other.shape, other.dtype, other.stride())
        tolerance = 1e-11 if dtype == torch.float64 else max(3e-5, 4 * torch.finfo(result.dtype).eps)
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(
            result, other, rtol=tolerance, atol=tolerance * scale, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize("relu, with_residual", list(itertools.product([False, True], [False, True])))
@pytest.mark.parametrize("shape, splits", [((4, 3, 5, 7), 2), ((8, 17, 3, 3), 1), ((8, 40), 4)], ids=str)
def test_every_variant(shape, splits, relu, with_residual):
    check(shape, splits=splits, relu=relu, with_residual=with_residual)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype):
    check((4, 20, 6, 5), dtype, splits=2)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (4, 300, 4, 4), (2, 1, 40, 40)], ids=str)
def test_sizes(shape):
    check(shape)


def test_means_far_from_zero():
    """Sums of squares would cancel: in 24 bits a mean of 10,000 standard deviations leaves no variance."""
    x, weight, bias, *_ = made((8, 20, 10, 10), mean=1e4)
    (_, mean, _, var), _ = launched(kernels.batch_norm_fwd, x, weight, bias, None, EPS, 1, False)
    exact = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean[0].double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0].double(), exact.var(1), rtol=1e-4, atol=0)


def test_nan_propagates_through_the_relu():
    x, weight, bias, residual, _ = made((4, 8, 3, 3))
    x[1, 2, 0, 0], residual[2, 4, 1, 1] = float("nan"), float("nan")
    (y, *_), _ = launched(kernels.batch_norm_fwd, x, weight, bias, residual, EPS, 2, True)
    assert y[1::2, 2].isnan().all() and y[2, 4, 1, 1].isnan() and y.isnan().sum() == 2 * 9 + 1


@every_architecture
def test_several_programs(arch):
    """Programs take several blocks of rows, and the last block is not whole."""
    with tile.assume_card(arch, 1):
        check((6, 70, 13, 13), torch.bfloat16, splits=2)
        check((3, 33, 13, 13), splits=1)


def test_bytes_are_those_of_the_model():
    shape, splits = (6, 70, 13, 13), 2
    x, weight, bias, residual, dy = made(shape, torch.bfloat16)
    with tile.assume_card("sm_90", 2):
        (y, mean, invstd, _), count = launched(kernels.batch_norm_fwd, x, weight, bias, residual, EPS, splits, True)
        assert count == model.batch_norm_fwd(6 * 169, 70, 2, splits, True, multiprocessors=2).requested
        _, count = launched(kernels.batch_norm_bwd, dy, x, y, weight, bias, mean, invstd, True)
        assert count == model.batch_norm_bwd(6 * 169, 70, 2, splits, True, multiprocessors=2).requested


def test_public_op(monkeypatch):
    x, weight, bias, residual, dy = (t.requires_grad_() for t in made((4, 10, 5, 5)))

    def run():
        running = Running(torch.zeros(10), torch.ones(10), 0.1)
        y = batch_norm(x, weight, bias, running, EPS, 2, True, residual)
        return [y, *torch.autograd.grad(y, (x, weight, bias, residual), dy.detach()), *running[:2]]

    with dispatch.reference():
        expected = run()
    monkeypatch.setattr(module, "backend", lambda x: "kernel")
    with triton_on_cpu() as seen:
        found = run()
    kernels_run = ["fwd", "merge", "apply", "bwd", "dx"]
    assert [name for name, _ in seen.launches] == [f"batch_norm_{name}_kernel" for name in kernels_run]
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)
