import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.ops import Running, batch_norm, dispatch
from tests.support.close import assert_as_exact_on_average, assert_same
from tests.support.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative, torch_threads

module = importlib.import_module("fastssl.ops.batchnorm")
SIZES = [  # shape, splits; rows shorter than a vector, shorter than a page, of several pages; one task and several
    *(((4, 3, 5, 7), 2), ((8, 17, 3, 3), 1), ((8, 17, 3, 3), 4), ((40, 33), 1), ((24, 70, 1, 1), 4)),
    *(((8, 70, 28, 28), 1), ((4, 64, 56, 56), 2), ((4, 1100, 12, 12), 2)),
]
AFTER = list(itertools.product([False, True], [False, True]))  # relu, residual
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layer(shape, dtype=torch.float64, with_residual=True):
    """x, weight, bias, residual, dy; x has a mean far from 0, so that sums of squares would cancel."""
    x, residual, dy = torch.randn(shape) * 2 + 5, torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    x, residual, dy = (lay(t.to(dtype)) for t in (x, residual, dy))
    wide = torch.promote_types(dtype, torch.float32)
    return x, weight.to(wide), bias.to(wide), residual if with_residual else None, dy


def lay(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def running(weight, momentum=0.1):
    return Running(torch.zeros_like(weight), torch.ones_like(weight), momentum)


def all_of(function, x, weight, bias, residual, dy, splits, relu):
    """[y, gradients, running statistics]"""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    after = running(weight)
    y = function(*leaves[:3], after, 1e-5, splits, relu, *leaves[3:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), after.mean, after.var]


def formula(x, weight, bias, after, eps, splits, relu, residual=None):
    """torch's batch norm of each part, contiguous, since torch's sums are less exact in channels_last order."""
    parts = [Running(after.mean.clone(), after.var.clone(), after.momentum) for _ in range(splits)]
    done = [
        F.batch_norm(x[s::splits].contiguous(), part.mean, part.var, weight, bias, True, part.momentum, eps)
        for s, part in enumerate(parts)
    ]
    y = torch.stack(done, 1).flatten(0, 1)
    y = y if residual is None else y + residual
    for i in range(2):
        after[i].copy_(torch.stack([part[i] for part in parts]).mean(0))
    return F.relu(y) if relu else y


@pytest.mark.parametrize("relu, with_residual", AFTER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, splits", SIZES, ids=str)
def test_error_is_at_most_torch_s(shape, dtype, splits, relu, with_residual):
    args = layer(shape, dtype, with_residual)
    found, plain = (all_of(f, *args, splits, relu) for f in (batch_norm, formula))
    truth = all_of(formula, *(None if t is None else t.double() for t in args), splits, relu)
    names = ("y", "dx", "dweight", "dbias", *(["dresidual"] if with_residual else []), "mean", "var")
    for name, result, exact, torchs in zip(names, found, truth, plain, strict=True):
        assert_as_exact_on_average(result, exact, torchs, name)


@pytest.mark.parametrize(
    "shape, splits", [((4, 1, 6, 2), 4), ((8, 70, 1, 1), 4), ((2, 3, 1, 1), 1), ((4, 5), 2)], ids=str
)
def test_few_values(shape, splits):
    args = layer(shape)
    for result, wanted in zip(*(all_of(f, *args, splits, True) for f in (batch_norm, formula)), strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, splits", [((8, 17, 9, 9), 2), ((8, 64, 56, 56), 1), ((8, 1100, 14, 14), 4)], ids=str)
def test_same_bits_on_any_number_of_threads(shape, splits, dtype):
    args = layer(shape, dtype)
    with torch_threads(1):
        alone = all_of(batch_norm, *args, splits, True)
    for one, two in zip(alone, all_of(batch_norm, *args, splits, True), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("relu, with_residual", AFTER)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (6, 5)], ids=str)
def test_gradients(shape, splits, relu, with_residual):
    x, weight, bias, residual, _ = layer(shape, with_residual=with_residual)

    def function(x, weight, bias, *residual):
        return batch_norm(x, weight, bias, running(weight), 1e-5, splits, relu, *residual)

    gradcheck(function, *(t.requires_grad_() for t in (x, weight, bias, residual) if t is not None))
    refuses_second_derivative(lambda x: function(x, weight, bias), x)


def test_means_far_from_zero():
    """Sums of squares would cancel: in 24 bits a mean of 10,000 standard deviations leaves no variance."""
    x = torch.randn(8, 40, 28, 28, dtype=torch.float64) + 1e4
    x, weight = lay(x.float()), torch.ones(40)
    found = batch_norm(x, weight, torch.zeros(40), running(weight))
    truth = formula(x.double(), weight.double(), torch.zeros(40).double(), running(weight.double()), 1e-5, 1, False)
    assert (found - truth).abs().max() < 1e-3  # the mean itself is rounded to 5e-4


def test_any_strides():
    x, weight, bias, residual, dy = layer((4, 6, 5, 3))
    expected = all_of(batch_norm, x, weight, bias, residual, dy, 2, True)
    for order in (torch.clone, lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, 2)[:, :, ::2]):
        odd = (order(t.contiguous()) for t in (x, residual, dy))
        x_odd, residual_odd, dy_odd = odd
        found = all_of(batch_norm, x_odd, weight, bias, residual_odd, dy_odd, 2, True)
        for result, wanted in zip(found, expected, strict=True):
            assert_same(result, wanted)
    x.requires_grad_()
    y = batch_norm(x, weight, bias, running(weight))
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.sum(), x)  # dy of stride 0
    assert dx.abs().max() < 1e-12


def test_nan_and_infinity_propagate():
    x, weight, bias, residual, dy = layer((4, 20, 5, 5), torch.float32)
    x[1, 2, 3, 4], x[1, 3, 0, 0], residual[2, 4, 1, 1] = float("nan"), float("inf"), float("nan")
    y, dx, *_ = all_of(batch_norm, x, weight, bias, residual, dy, 2, True)
    assert y[1::2, 2:4].isnan().all() and y[2, 4, 1, 1].isnan()
    assert y.isnan().sum() == 2 * 2 * 25 + 1
    assert dx[1::2, 2:4].isnan().all() and dx[::2].isfinite().all()


def test_running_statistics():
    x, weight, bias, *_ = layer((8, 5, 4, 4), torch.float32)
    ours, theirs = running(weight, 0.3), nn.BatchNorm2d(5, momentum=0.3)
    for _ in range(3):
        batch_norm(x, weight, bias, ours)
        theirs(x)
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.var, theirs.running_var)
    narrow = Running(*(t.bfloat16() for t in running(weight)[:2]), 0.3)
    batch_norm(x, weight, bias, narrow)
    assert narrow.mean.dtype == torch.bfloat16 and narrow.mean.any()


def test_the_result_is_kept_only_with_residual_and_relu():
    for relu, with_residual in AFTER:
        x, weight, bias, residual, _ = layer((4, 3, 2, 2), with_residual=with_residual)
        y = batch_norm(x.requires_grad_(), weight, bias, running(weight), 1e-5, 1, relu, residual)
        kept = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
        assert (y.data_ptr() in kept) == (relu and with_residual)
        assert x.data_ptr() in kept and len(kept) == 5 + (relu and with_residual)


def test_backend():
    x, weight, bias, residual, dy = layer((4, 3, 5, 5))
    assert module.backend(x) == "kernel"
    expected = all_of(batch_norm, x, weight, bias, residual, dy, 2, True)
    with dispatch.reference():
        assert module.backend(x) == "torch"
        found = all_of(batch_norm, x, weight, bias, residual, dy, 2, True)
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu, with_residual", AFTER)
def test_equals_body(relu, with_residual, dtype):
    """The ops below batch_norm, whose bodies no other test runs."""
    x, weight, bias, residual, dy = layer((4, 3, 5, 5), dtype)

    def both():
        y, *statistics = module._batch_norm_fwd(x, weight, bias, residual if with_residual else None, 1e-5, 2, relu)
        mean, invstd, _ = statistics
        kept = y if relu and with_residual else None
        return y, *statistics, *module._batch_norm_bwd(dy, x, kept, weight, bias, mean, invstd, relu)

    found = both()
    with dispatch.reference():
        expected = both()
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_contract():
    x, weight, bias, residual, dy = layer((4, 3, 5, 5), torch.bfloat16)
    opcheck(module._batch_norm_fwd, x, weight, bias, None, 1e-5, 1, False)
    opcheck(module._batch_norm_fwd, x, weight, bias, residual, 1e-5, 2, True)
    y, mean, invstd, _ = module._batch_norm_fwd(x, weight, bias, residual, 1e-5, 2, True)
    opcheck(module._batch_norm_bwd, dy, x, None, weight, bias, mean, invstd, True)
    opcheck(module._batch_norm_bwd, dy, x, y, weight, bias, mean, invstd, True)


@pytest.mark.parametrize("relu, with_residual", AFTER)
def test_compile(relu, with_residual):
    args = [t.float() for t in layer((4, 3, 5, 5))[: 4 if with_residual else 3]]
    x, weight, bias, *residual = (t.requires_grad_() for t in args)
    mean, var = running(weight.detach())[:2]

    def function(x, weight, bias, mean, var, *residual):
        after = Running(mean.clone(), var.clone(), 0.1)
        return batch_norm(x, weight, bias, after, 1e-5, 2, relu, *residual), after.mean, after.var

    compiles(function, x, weight, bias, mean, var, *residual)


def test_weight_and_bias_of_any_strides():
    x, weight, bias, _, dy = layer((6, 5, 3, 3), torch.float32)
    columns, expanded = torch.stack([weight, bias], 1), weight[:1].expand(5)
    for view in (columns[:, 0], columns[:, 1], expanded, weight.flip(0)[::1], columns.flatten()[1:6]):
        results = []
        for vector in (view, view.clone()):
            vector = vector.detach().requires_grad_()
            y = batch_norm(x, vector, vector, running(weight), relu=True)
            results.append((y.detach(), torch.autograd.grad(y, vector, dy)[0]))
        for ours, same in zip(*results):
            torch.testing.assert_close(ours, same, rtol=0, atol=0)


def test_running_statistics_that_share_memory_are_refused():
    x, weight, bias, _, _ = layer((6, 3, 2, 2), torch.float32)
    both = torch.ones(3)
    wanted = "batch_norm: running.var must not share memory with running.mean, got views of the same: "
    wanted += "pass running.var.clone()"
    refused(wanted, ValueError, batch_norm, x, weight, bias, Running(both, both, 0.1))
    wanted = (
        "batch_norm: running.mean must have no two elements in one place of memory, got shape [3] and strides [0]: "
        "pass running.mean.clone()"
    )
    refused(wanted, ValueError, batch_norm, x, weight, bias, Running(both[:1].expand(3), torch.ones(3), 0.1))
    assert (both == 1).all()


def test_error_sentences():
    x, weight, bias, residual, _ = layer((6, 3, 2, 2), torch.float32)
    after = running(weight)
    wanted = "batch_norm: x must have shape [B, C] or [B, C, H, W], got [3, 2, 2]"
    refused(wanted, ValueError, batch_norm, x[0], weight, bias, after)
    refused("batch_norm: weight must have shape [C=3], got [2]", ValueError, batch_norm, x, weight[:2], bias, after)
    wanted = "batch_norm: running.var must have shape [C=3], got [2]"
    refused(wanted, ValueError, batch_norm, x, weight, bias, after._replace(var=bias[:2]))
    wanted = "batch_norm: x must be float32, float64, bfloat16 or float16, got int64"
    refused(wanted, TypeError, batch_norm, x.long(), weight, bias, after)
    wanted = "batch_norm: bias must be on cpu like x, got meta"
    refused(wanted, ValueError, batch_norm, x, weight, bias.to("meta"), after)
    wanted = "batch_norm: x must have a batch divisible by splits=4, got B=6"
    refused(wanted, ValueError, batch_norm, x, weight, bias, after, splits=4)
    wanted = "batch_norm: x must have more than one value a channel in each of 6 parts, got [6, 3, 1, 1]"
    refused(wanted, ValueError, batch_norm, x[:, :, :1, :1], weight, bias, after, splits=6)
    wanted = "batch_norm: residual must have x's shape [6, 3, 2, 2], got [5, 3, 2, 2]"
    refused(wanted, ValueError, batch_norm, x, weight, bias, after, residual=residual[:5])
