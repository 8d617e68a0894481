"""Residual addition and layer norm as one op: a pre-norm transformer has two in each block."""

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, autocast_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import norm

    return norm


def residual_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer norm of the sum.

    Equals ``total = x + delta`` and ``F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(dtype)``. The
    normalised rows are written in the dtype of the next matrix product, so under autocast nothing needs a cast.

    Args:
        x: [..., D] any floating dtype and strides: the residual stream.
        delta: [..., D] of x's shape and any floating dtype; with None the sum is x itself.
        weight, bias: [D] any floating dtype.
        eps: added to the variance.
        dtype: dtype of the normalised rows; if None, that of autocast where it is on (except float64), else x's.

    Returns: (sum [..., D] in x's dtype, normalised sum [..., D] in `dtype`). Moments and sums in float32 (float64 for
        float64). Gradient to x, delta, weight and bias.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype is not floating.

    Memory: keeps the sum and two numbers a row for the gradient; not the normalised rows.

    Source: Ba et al., "Layer Normalization", 2016, equation 4, before each sublayer as in Xiong et al., "On Layer
    Normalization in the Transformer Architecture", 2020, table 1.
    """
    _check(x, delta, weight, bias, eps, dtype)
    dtype = dtype or autocast_dtype(x) or x.dtype
    if x.ndim != 3:
        x_rows = x.reshape(1, -1, x.shape[-1])
        delta_rows = None if delta is None else delta.reshape(1, -1, x.shape[-1])
        total, normed = residual_norm(x_rows, delta_rows, weight, bias, eps, dtype)
        return x if delta is None else total.reshape(x.shape), normed.reshape(x.shape)
    total, normed = _ResidualNorm.apply(x, delta, weight, bias, eps, dtype)
    return x if delta is None else total, normed


@op("residual_norm_fwd")
def _residual_norm_fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normalised sum, mean [B, L], 1/√(variance + eps) [B, L]) of x [B, L, D]; an empty sum without delta."""
    total = x if delta is None else (x.to(acc_dtype(x)) + delta.to(acc_dtype(x))).to(x.dtype)
    rows, affine = total.to(acc_dtype(x)), (weight.to(acc_dtype(x)), bias.to(acc_dtype(x)))
    normed, mean, rstd = torch.native_layer_norm(rows, rows.shape[2:], *affine, eps)
    total = x.new_empty(0) if delta is None else total
    return total.contiguous(), normed.to(dtype).contiguous(), mean.squeeze(2), rstd.squeeze(2)


@fake(_residual_norm_fwd)
def _(x, delta, weight, bias, eps, dtype):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=acc_dtype(x)) for _ in range(2))
    return x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


register_triton(_residual_norm_fwd, lambda: _kernels().residual_norm_fwd)


@op("residual_norm_bwd")
def _residual_norm_bwd(
    dnormed: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, ddelta, dweight, dbias), the last two in float32 or wider. ddelta is empty where it would equal dx."""
    dtype = acc_dtype(total)
    affine = weight.to(dtype)  # also passed as the bias, whose values are not used
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(dtype).contiguous(),
        total.to(dtype).contiguous(),
        total.shape[2:],
        mean.unsqueeze(2),
        rstd.unsqueeze(2),
        affine,
        affine,
        [True, True, True],
    )
    dx = (dx if dsum is None else dx + dsum.to(dtype)).to(total.dtype).contiguous()
    ddelta = dx.new_empty(0, dtype=delta_dtype) if delta_dtype == dx.dtype else dx.to(delta_dtype)
    return dx, ddelta, dweight, dbias


@fake(_residual_norm_bwd)
def _(dnormed, dsum, total, mean, rstd, weight, delta_dtype):
    ddelta = total.new_empty(0 if delta_dtype == total.dtype else total.shape, dtype=delta_dtype)
    affine = (weight.new_empty(weight.shape, dtype=acc_dtype(total)) for _ in range(2))
    return total.new_empty(total.shape), ddelta, *affine


register_triton(_residual_norm_bwd, lambda: _kernels().residual_norm_bwd)


class _ResidualNorm(Function):
    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps, dtype):
        total, normed, mean, rstd = _residual_norm_fwd(x, delta, weight, bias, eps, dtype)
        ctx.save_for_backward(x if delta is None else total, mean, rstd, weight)
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.materialize_grads = False  # set_materialize_grads(False) does not compile
        return total, normed

    @staticmethod
    @first_order("residual_norm")
    def backward(ctx, dsum, dnormed):
        total, mean, rstd, weight = ctx.saved_tensors
        delta_dtype = ctx.delta_dtype or total.dtype
        if ctx.delta_dtype is None:  # the sum is x itself, and autograd adds its gradient
            dsum = None
        if dnormed is None:
            return dsum, dsum, None, None, None, None
        dx, ddelta, dweight, dbias = _residual_norm_bwd(dnormed, dsum, total, mean, rstd, weight, delta_dtype)
        if ctx.delta_dtype is None:
            ddelta = None
        elif delta_dtype == dx.dtype:
            ddelta = dx
        return dx, ddelta, dweight, dbias, None, None


@check.once_a_signature
def _check(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[-1] == 0:
        check.fail("residual_norm", f"x must be a tensor of shape [..., D], D ≥ 1, got {_shape_or_type(x)}")
    tensors = {"x": x, "weight": weight, "bias": bias} | ({} if delta is None else {"delta": delta})
    for name in ("weight", "bias"):
        check.tensor("residual_norm", name, tensors[name], "D", D=x.shape[-1])
    if delta is not None and (not isinstance(delta, Tensor) or delta.shape != x.shape):
        check.fail("residual_norm", f"delta must have the shape of x, {list(x.shape)}, got {_shape_or_type(delta)}")
    check.floating("residual_norm", **tensors)
    check.same_device("residual_norm", **tensors)
    if dtype is not None and dtype not in check.FLOATS:
        got = check.dtype_name(dtype)
        check.fail("residual_norm", f"dtype must be float32, float64, bfloat16 or float16, got {got}", TypeError)
    check.number("residual_norm", eps=eps)


def _shape_or_type(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
