"""Linear layer, with a GELU of its input fused into it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import Function, autocast_dtype, first_order, has_kernel
from .gelu import gelu_bwd_, gelu_fwd
from .products import FEWEST, has_inner_product, product, rounded


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Linear layer of x, or of GELU(x).

    Equals ``F.linear(F.gelu(x) if gelu else x, weight, bias)``; `backend` returns which implementation runs.

    On CPUs GELU is computed again in the backward pass, in one pass with its derivative, so that x alone is kept, not
    GELU(x). Float32 weights beside 16-bit inputs are rounded for each product and not kept, as autocast keeps them; the
    trainer rounds them once a step. `ops.products` says which library computes the products.

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
        if weight.dtype == torch.float64:  # which autocast leaves as it is
            weight = weight.to(dtype)
        if bias is not None and bias.dtype == torch.float64:
            bias = bias.to(dtype)
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"{weight.dtype}" + (f" and {bias.dtype}" if bias is not None else "")
        check.fail("linear", f"weight and bias must have x's dtype {x.dtype} outside autocast, got {dtypes}", TypeError)
    if backend(x, weight, gelu) == "torch":
        return F.linear(F.gelu(x) if gelu else x, weight, bias)
    return _Linear.apply(_rows(x), weight, bias, gelu).view(*x.shape[:-1], weight.shape[0])


def backend(x: Tensor, weight: Tensor, gelu: bool = False) -> str:
    """The implementation that `linear` uses for these tensors, in autocast's dtype: "ours" or "torch".

    Ours on CPUs from 64 rows on, unless torch's keeps as little and calls the same library.
    """
    if not has_kernel("gelu_fwd", x.device.type) or x.numel() < FEWEST * x.shape[-1] or not weight.numel():
        return "torch"
    return "ours" if gelu or x.dtype != weight.dtype or has_inner_product(x.dtype) else "torch"


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gelu):
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.bias_dtype = gelu, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(x.dtype)
        return product(gelu_fwd(x) if gelu else x, rounded(weight, x.dtype), bias)

    @staticmethod
    @first_order("linear")
    def backward(ctx, dy):
        (x, weight), dy = ctx.saved_tensors, _rows(dy)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, rounded(weight, x.dtype).T)
        if ctx.gelu:
            x = gelu_fwd(x) if dx is None else gelu_bwd_(dx, x)
        if ctx.needs_input_grad[1]:
            dweight = product(dy.T, x.T).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def _rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K] with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
