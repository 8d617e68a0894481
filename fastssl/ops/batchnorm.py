"""Batch norm in training, with the addition and the ReLU that follow it in a residual network."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, has_kernel, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import batchnorm

    return batchnorm


class Running(NamedTuple):
    """Running statistics, updated in place by `batch_norm`."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    momentum: float  # weight of the new statistics


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    eps: float = 1e-5,
    splits: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """relu(batch_norm(x) + residual) in training mode: normalised by the statistics of x itself.

    With `splits` > 1, part s of the batch (samples s, s + splits, s + 2·splits and so on) is normalised by its own mean
    and variance. The running statistics move towards the average over the parts of their means and unbiased variances.

    The kernel reads x once for the statistics and once to normalise, add and clip. It keeps x for the gradient, and the
    result only where there are both a residual and a ReLU; else it recomputes the ReLU's mask from x.

    Args:
        x: [B, C] or [B, C, H, W] floating. The kernel reads it in channels_last order, and copies it if it has another.
            Gradient.
        weight, bias: [C] floating. Gradient.
        running: two floating tensors [C] and the momentum, as in `torch.nn.BatchNorm2d`.
        eps: added to the variance.
        splits: number of parts; B must be divisible by it, and a part must have more than one value a channel.
        relu: clip the result below 0.
        residual: like x, added before the ReLU. Gradient.

    Returns: like x, in its dtype; from the kernel in channels_last order. Statistics in float32 (float64 for float64),
        from sums in float64.

    Raises:
        ValueError: a shape or device does not fit, eps ≤ 0, or a running statistic shares memory with another argument.
        TypeError: not floating.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; He et al., 2020 (MoCo), section 3.3, "Shuffling BN".
    """
    _check(x, weight, bias, running, splits, residual)
    check.number("batch_norm", eps=eps, momentum=running.momentum)
    if not eps > 0:
        check.fail("batch_norm", f"eps must be > 0, got {eps}")
    if backend(x) == "torch":
        out = _batch_norm_in_torch(x, weight, bias, running, eps, splits)
        out = out if residual is None else out.add_(residual)
        return F.relu_(out) if relu else out
    x, residual = _channels_last(x), None if residual is None else _channels_last(residual.to(x.dtype))
    weight, bias = (vector.to(acc_dtype(x)).contiguous() for vector in (weight, bias))
    y, mean, var = _BatchNorm.apply(x, weight, bias, residual, eps, splits, relu)
    with torch.no_grad():
        for average, statistic in ((running.mean, mean), (running.var, var)):
            average.lerp_(statistic.mean(0).to(average.dtype), running.momentum)
    return y


def backend(x: Tensor) -> str:
    """The implementation that `batch_norm` uses for x: "kernel", on CPUs and GPUs, or "torch"."""
    return "kernel" if has_kernel("batch_norm_fwd", x.device.type) and x.numel() else "torch"


def _check(x: Tensor, weight: Tensor, bias: Tensor, running: Running, splits: int, residual: Tensor | None) -> None:
    check.is_tensor("batch_norm", "x", x)
    if x.ndim not in (2, 4):
        check.fail("batch_norm", f"x must have shape [B, C] or [B, C, H, W], got {list(x.shape)}")
    check.floating("batch_norm", x=x, weight=weight, bias=bias)
    vectors = {"weight": weight, "bias": bias, "running.mean": running.mean, "running.var": running.var}
    for name, value in vectors.items():
        check.tensor("batch_norm", name, value, "C", C=x.shape[1])
    check.same_device("batch_norm", x=x, **vectors)
    averages = {"running.mean": running.mean, "running.var": running.var}
    check.floating("batch_norm", **averages)
    check.separate("batch_norm", averages, {"x": x, "weight": weight, "bias": bias})
    check.integer("batch_norm", splits=splits)
    for name, average in averages.items():
        if average.requires_grad:
            check.fail("batch_norm", f"{name} must not require a gradient, got requires_grad=True")
    if splits < 1 or x.shape[0] % splits:
        check.fail("batch_norm", f"x must have a batch divisible by splits={splits}, got B={x.shape[0]}")
    if x.numel() == splits * x.shape[1]:
        parts = f" in each of {splits} parts" if splits > 1 else ""
        check.fail("batch_norm", f"x must have more than one value a channel{parts}, got {list(x.shape)}")
    if residual is not None:
        check.is_tensor("batch_norm", "residual", residual)
        if residual.shape != x.shape:
            check.fail("batch_norm", f"residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
        check.floating("batch_norm", residual=residual)
        check.same_device("batch_norm", x=x, residual=residual)


def _batch_norm_in_torch(x: Tensor, weight: Tensor, bias: Tensor, running: Running, eps: float, splits: int) -> Tensor:
    """Batch norm by torch, with the parts as channels; torch takes vectors in the dtype of sums alone."""
    dtype = acc_dtype(x)
    if splits == 1 and {vector.dtype for vector in (weight, bias, *running[:2])} == {dtype}:
        return F.batch_norm(x, running.mean, running.var, weight, bias, True, running.momentum, eps)
    parts = x.reshape(x.shape[0] // splits, splits * x.shape[1], *x.shape[2:])
    mean, var, weight, bias = (t.to(dtype).repeat(splits) for t in (running.mean, running.var, weight, bias))
    out = F.batch_norm(parts, mean, var, weight, bias, True, running.momentum, eps)
    with torch.no_grad():
        running.mean.copy_(mean.view(splits, -1).mean(0))
        running.var.copy_(var.view(splits, -1).mean(0))
    return out.view(x.shape)


@op("batch_norm_fwd")
def _batch_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, splits: int, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, 1/√(variance + eps), unbiased variance), the last three [splits, C] in the dtype of weight and bias.

    x and residual are dense in channels_last order, as y is; weight and bias are contiguous, in the dtype of sums.
    """
    values = _parts(x, splits)
    var, mean = torch.var_mean(values, (0, 2), correction=0)
    invstd = (var + eps).rsqrt()
    y = _standardise(values, mean, invstd) * weight + bias
    y = y if residual is None else y + _parts(residual, splits)
    count = values.shape[0] * values.shape[2]
    return _join_parts(F.relu(y) if relu else y, x), mean, invstd, var * (count / (count - 1))


@fake(_batch_norm_fwd)
def _(x, weight, bias, residual, eps, splits, relu):
    statistics = [weight.new_empty(splits, x.shape[1]) for _ in range(3)]
    return torch.empty_like(x), *statistics


register_triton(_batch_norm_fwd, lambda: _kernels().batch_norm_fwd)


@op("batch_norm_bwd")
def _batch_norm_bwd(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual). y is given where there was a residual and a ReLU, else dresidual is empty."""
    standardised = _standardise(_parts(x, len(mean)), mean, invstd)
    gradient = _parts(dy, len(mean))
    if relu:
        clipped = standardised * weight + bias if y is None else _parts(y, len(mean))
        gradient = gradient.masked_fill(clipped <= 0, 0)
    dweight, dbias = (gradient * standardised).sum((0, 2)), gradient.sum((0, 2))
    count = gradient.shape[0] * gradient.shape[2]
    dx = (gradient - _column(dbias) / count - standardised * _column(dweight) / count) * (_column(invstd) * weight)
    dresidual = x.new_empty(0) if y is None else _join_parts(gradient, x)
    return _join_parts(dx, x), dweight.sum(0), dbias.sum(0), dresidual


@fake(_batch_norm_bwd)
def _(dy, x, y, weight, bias, mean, invstd, relu):
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dresidual


register_triton(_batch_norm_bwd, lambda: _kernels().batch_norm_bwd)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, splits, relu):
        y, mean, invstd, var = _batch_norm_fwd(x, weight, bias, residual, eps, splits, relu)
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, invstd)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # mean and var have no gradient
        return y, mean, var

    @staticmethod
    @first_order("batch_norm")
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 7
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        dy = _channels_last(dy)
        dx, dweight, dbias, dresidual = _batch_norm_bwd(dy, x, y, weight, bias, mean, invstd, ctx.relu)
        dresidual = dy if y is None else dresidual
        return dx, dweight, dbias, dresidual if ctx.needs_input_grad[3] else None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def _parts(x: Tensor, splits: int) -> Tensor:
    """[B, C, …] → [B / splits, splits, pixels, C] in the dtype of sums."""
    return x.to(acc_dtype(x)).reshape(-1, splits, x.shape[1], x.shape[2:].numel()).movedim(2, 3)


def _join_parts(parts: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_parts`: a tensor with x's shape, dtype and memory format."""
    return torch.empty_like(x).copy_(parts.movedim(3, 2).reshape(x.shape))


def _column(statistic: Tensor) -> Tensor:
    """[splits, C] → [splits, 1, C]"""
    return statistic.unsqueeze(1)


def _standardise(parts: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (parts - _column(mean)) * _column(invstd)
