"""Linear layer, with a GELU of its input fused into it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import autocast_dtype, fake, first_order, has_kernel, op, uses_native_gemm

FEWEST = 64  # smallest number of rows for the kernel: packing the weight takes as long as multiplying several rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Linear layer of x, or of GELU(x).

    Equals ``F.linear(F.gelu(x) if gelu else x, weight, bias)``; `backend` returns which implementation runs.

    The kernel takes float32 weights with bfloat16 inputs and rounds them as it packs them, so there are no copies of
    the weights as autocast makes them. It computes GELU as it reads x, and again in the backward pass, so neither its
    result nor its derivative is kept. Gradients of float32 weights are not rounded to 16 bits.

    Args:
        x: [..., K] floating. Under autocast it is first converted to its dtype, except float64.
        weight: [N, K] of x's dtype, or any floating dtype under autocast.
        bias: [N] of the dtype of weight, or None.
        gelu: apply GELU (the exact one, not the tanh approximation) to x first.

    Returns: [..., N] in x's dtype, under autocast in its dtype. Sums in float32 (float64 for float64). Gradient to x,
        weight and bias, in their dtypes.

    Raises:
        ValueError: a shape or device does not fit. TypeError: dtypes differ outside autocast, or are not floating.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    check.tensor("linear", "weight", weight, "N K")
    check.is_tensor("linear", "x", x)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        check.fail("linear", f"x must have shape [..., K={weight.shape[1]}], got {list(x.shape)}")
    check.floating("linear", x=x, weight=weight)
    check.same_device("linear", x=x, weight=weight)
    if bias is not None:
        check.tensor("linear", "bias", bias, "N", N=weight.shape[0])
        check.floating("linear", bias=bias)
        check.same_device("linear", x=x, bias=bias)
    if dtype := autocast_dtype(x):
        x = x.to(dtype)
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"{weight.dtype}" + (f" and {bias.dtype}" if bias is not None else "")
        check.fail("linear", f"weight and bias must have x's dtype {x.dtype} outside autocast, got {dtypes}", TypeError)
    if backend(x, weight) == "torch":
        return F.linear(F.gelu(x) if gelu else x, weight, bias)
    if weight.dtype != x.dtype and (x.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    return _Linear.apply(_rows(x), weight, bias, gelu).view(*x.shape[:-1], weight.shape[0])


def backend(x: Tensor, weight: Tensor) -> str:
    """The implementation that `linear` uses for these tensors: "kernel" or "torch".

    The kernel, on CPUs, from 64 rows on, unless torch's library is faster there: with tiles (AMX) for 16 bits, and with
    Intel's own library on Intel's processors for float32 and float64.
    """
    rows = x.numel() // max(1, x.shape[-1])
    native = has_kernel("linear_fwd", x.device.type) and uses_native_gemm(x.dtype)
    return "kernel" if native and rows >= FEWEST and weight.numel() else "torch"


@op("linear_fwd")
def _linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """[M, N] from x [M, K]; weight [N, K] and the contiguous bias have x's dtype, or are float32 beside bfloat16."""
    x = F.gelu(x) if gelu else x
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@fake(_linear_fwd)
def _(x, weight, bias, gelu):
    return x.new_empty(x.shape[0], weight.shape[0])


@op("linear_dx")
def _linear_dx(dy: Tensor, weight: Tensor, x: Tensor | None) -> Tensor:
    """dx [M, K] from dy [M, N]; through GELU where x [M, K] is given."""
    dx = dy @ weight.to(dy.dtype)
    return dx if x is None else torch.ops.aten.gelu_backward(dx, x)


@fake(_linear_dx)
def _(dy, weight, x):
    return dy.new_empty(dy.shape[0], weight.shape[1])


@op("linear_dweight")
def _linear_dweight(dy: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """(dweight [N, K], dbias [N]) in the weight's dtype."""
    dweight = dy.T @ (F.gelu(x) if gelu else x)
    return dweight.to(weight.dtype), dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(weight.dtype)


@fake(_linear_dweight)
def _(dy, x, weight, gelu):
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gelu):
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return _linear_fwd(x, _rows(weight), bias, gelu)

    @staticmethod
    @first_order("linear")
    def backward(ctx, dy):
        (x, weight), dy = ctx.saved_tensors, _rows(dy)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _linear_dx(dy, _rows(weight), x if ctx.gelu else None)
        if any(ctx.needs_input_grad[1:3]):
            dweight, dbias = _linear_dweight(dy, x, weight, ctx.gelu)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None


def _rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K] with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
