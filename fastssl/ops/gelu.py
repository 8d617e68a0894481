"""GELU: with the bias of the linear layer before it on GPUs, whose gradient is summed in the same pass, and for the
linear layer behind it on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, has_kernel, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import gelu

    return gelu


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias.

    Equals ``F.gelu(x + bias)``; `backend` returns which implementation runs. For a linear layer that is computed
    without its bias: the kernel adds it on the way, in float32, and its backward pass sums the gradient of the bias
    while it writes that of x. The sum that torch computes after a product with a bias reads [..., K] once more.

    Args:
        x: [..., K] floating.
        bias: [K] floating.

    Returns: [..., K] in x's dtype, also under autocast. Computed and summed in float32 (float64 for float64). Gradient
        to x and bias, in their dtypes.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype is not floating.

    Memory: keeps x for the gradient; the kernel makes no tensor beside the results but partial sums of the bias's
        gradient.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    check.is_tensor("bias_gelu", "x", x)
    if x.ndim < 1:
        check.fail("bias_gelu", f"x must have shape [..., K], got {list(x.shape)}")
    check.tensor("bias_gelu", "bias", bias, "K", K=x.shape[-1])
    check.floating("bias_gelu", x=x, bias=bias)
    check.same_device("bias_gelu", x=x, bias=bias)
    if backend(x) == "torch":
        return F.gelu(x + bias.to(x.dtype))
    return _BiasGelu.apply(x.reshape(-1, x.shape[-1]), bias).view(x.shape)


def backend(x: Tensor) -> str:
    """The implementation that `bias_gelu` uses for x: "kernel", on GPUs, or "torch"."""
    return "kernel" if has_kernel("bias_gelu_fwd", x.device.type) else "torch"


@op("bias_gelu_fwd")
def _bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """[M, K] in x's dtype."""
    return F.gelu(x.to(acc_dtype(x)) + bias.to(acc_dtype(x))).to(x.dtype).contiguous()


@fake(_bias_gelu_fwd)
def _(x, bias):
    return x.new_empty(x.shape)


register_triton(_bias_gelu_fwd, lambda: _kernels().bias_gelu_fwd)


@op("bias_gelu_bwd")
def _bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [M, K] in x's dtype, dbias [K] in float32 or wider, the sum of dx before it is rounded)."""
    dtype = acc_dtype(x)
    dx = torch.ops.aten.gelu_backward(dy.to(dtype), x.to(dtype) + bias.to(dtype))
    return dx.to(x.dtype).contiguous(), dx.sum(0)


@fake(_bias_gelu_bwd)
def _(dy, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape, dtype=acc_dtype(x))


register_triton(_bias_gelu_bwd, lambda: _kernels().bias_gelu_bwd)


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _bias_gelu_fwd(x, bias)

    @staticmethod
    @first_order("bias_gelu")
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx, dbias = _bias_gelu_bwd(dy, x, bias)
        return dx, dbias.to(bias.dtype)


@op("gelu_fwd")
def gelu_fwd(x: Tensor) -> Tensor:
    """GELU of x [M, K], whose rows are contiguous; contiguous, in x's dtype."""
    return F.gelu(x.to(acc_dtype(x))).to(x.dtype).contiguous()


@fake(gelu_fwd)
def _(x):
    return x.new_empty(x.shape)


@op("gelu_bwd_", mutates_args=("dy",))
def gelu_bwd_(dy: Tensor, x: Tensor) -> Tensor:
    """Multiplies dy [M, K] by the derivative of GELU at x, both with contiguous rows, and returns GELU(x) [M, K]."""
    wide = x.to(acc_dtype(x))
    dy.copy_(torch.ops.aten.gelu_backward(dy.to(wide.dtype), wide))
    return F.gelu(wide).to(x.dtype).contiguous()


@fake(gelu_bwd_)
def _(dy, x):
    return x.new_empty(x.shape)
