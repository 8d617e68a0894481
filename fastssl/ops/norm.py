"""The residual addition and the layer norm behind it, as one op: a pre-norm transformer has two in each block."""

import torch
from torch import Tensor

from . import check
from .dispatch import acc_dtype, autocast_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import norm

    return norm


def residual_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and normalises the sum.

    Equals ``total = x + delta`` and ``F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(dtype)``. Written in
    the dtype that the next matrix product computes in, so under autocast no float32 output is made only to be cast.

    Args:
        x: [..., D] any floating dtype and strides: the residual stream.
        delta: [..., D] of x's shape and any floating dtype, or None: the sum is then x itself.
        weight, bias: [D] any floating dtype.
        eps: added to the variance.
        dtype: of the normalised rows; if None autocast's where autocast is on, but for float64, else x's.

    Returns: (sum [..., D] in x's dtype, normalised sum [..., D] in `dtype`). Moments and sums in float32 (float64 for
        float64). Gradient to x, delta, weight and bias.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype is not floating.

    Memory: for the gradient the sum, and two numbers a row; not the normalised rows.

    Source: Ba et al., "Layer Normalization", 2016, equation 4, before each sublayer as in Xiong et al., "On Layer
    Normalization in the Transformer Architecture", 2020, table 1.
    """
    _check("residual_norm", x, delta, weight, bias, dtype)
    dtype = dtype or autocast_dtype(x) or x.dtype
    if x.ndim != 3:
        rows = (t if t is None else t.reshape(1, -1, x.shape[-1]) for t in (x, delta))
        total, normed = (t.reshape(x.shape) for t in residual_norm(*rows, weight, bias, eps, dtype))
        return x if delta is None else total, normed
    total, normed = _ResidualNorm.apply(x, delta, weight, bias, eps, dtype)
    return x if delta is None else total, normed


@op("residual_norm_fwd")
def _residual_norm_fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normed, mean [B, L], 1 / deviation [B, L]) of x [B, L, D]; an empty sum without delta."""
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
    dnormed: Tensor, dsum: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, ddelta in the dtype `narrow`, dweight, dbias), the last two float32 or wider; an empty ddelta where `narrow`
    is the dtype of dx, which then is ddelta too."""
    dtype = acc_dtype(total)
    factors = weight.to(dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(dtype).contiguous(),
        total.to(dtype).contiguous(),
        total.shape[2:],
        mean.unsqueeze(2),
        rstd.unsqueeze(2),
        factors,
        factors,
        [True, True, True],
    )
    dx = (dx if dsum is None else dx + dsum.to(dtype)).to(total.dtype).contiguous()
    return dx, dx.new_empty(0, dtype=narrow) if narrow == dx.dtype else dx.to(narrow), dweight, dbias


@fake(_residual_norm_bwd)
def _(dnormed, dsum, total, mean, rstd, weight, narrow):
    ddelta = total.new_empty(0 if narrow == total.dtype else total.shape, dtype=narrow)
    affine = (weight.new_empty(weight.shape, dtype=acc_dtype(total)) for _ in range(2))
    return total.new_empty(total.shape), ddelta, *affine


register_triton(_residual_norm_bwd, lambda: _kernels().residual_norm_bwd)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps, dtype):
        total, normed, mean, rstd = _residual_norm_fwd(x, delta, weight, bias, eps, dtype)
        ctx.save_for_backward(x if delta is None else total, mean, rstd, weight)
        ctx.delta_dtype, ctx.bias_dtype = None if delta is None else delta.dtype, bias.dtype
        ctx.materialize_grads = False  # as set_materialize_grads(False), a call that torch.compile refuses
        return total, normed

    @staticmethod
    @first_order
    def backward(ctx, dsum, dnormed):
        total, mean, rstd, weight = ctx.saved_tensors
        delta_dtype = ctx.delta_dtype or total.dtype
        if ctx.delta_dtype is None:  # the sum is x, whose own gradient autograd adds
            dsum = None
        if dnormed is None:
            return dsum, dsum if dsum is None else dsum.to(delta_dtype), None, None, None, None
        dx, ddelta, dweight, dbias = _residual_norm_bwd(dnormed, dsum, total, mean, rstd, weight, delta_dtype)
        if ctx.delta_dtype is None:
            ddelta = None
        elif delta_dtype == dx.dtype:
            ddelta = dx
        return dx, ddelta, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


def _check(op_name: str, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype | None):
    if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[-1] == 0:
        came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        check.fail(op_name, f"x must be a tensor of shape [..., D], D ≥ 1, got {came}")
    tensors = {"x": x, "weight": weight, "bias": bias} | ({} if delta is None else {"delta": delta})
    for name in ("weight", "bias"):
        check.tensor(op_name, name, tensors[name], "D", D=x.shape[-1])
    if delta is not None and (not isinstance(delta, Tensor) or delta.shape != x.shape):
        came = list(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
        check.fail(op_name, f"delta must have the shape of x, {list(x.shape)}, got {came}")
    check.floating(op_name, **tensors)
    check.same_device(op_name, **tensors)
    if dtype is not None and dtype not in check.FLOATS:
        check.fail(op_name, f"dtype must be float32, float64, bfloat16 or float16, got {str(dtype)[6:]}", TypeError)
