"""The logistic loss of all pairs of a batch (SigLIP).

With logits s_ij = scale · q_i·k_j + bias and z_ij = 1 for the pairs that belong together, else −1, the loss of a pair
is log(1 + exp(−z_ij s_ij)). There is no sum over a row inside the logarithm, so a tile of logits gives its part of the
loss and of all gradients at once, ∂loss/∂s_ij = σ(s_ij) − [z_ij = 1]. The C++ kernel makes each tile once: three
products of B·M·D multiplications where a softmax takes four. The Triton kernel makes it twice, once for each side's
gradient, so that no two programs add to the same rows. The plain-torch body holds all logits in memory; a kernel does
not.

The kernels take all four dtypes and any strides, also mixed, and give the same bits every time, the C++ ones on any
number of threads. In 16 bits the derivatives of the logits are rounded to the inputs' dtype before they are multiplied
with keys and queries, on GPUs and on CPUs with bfloat16 instructions; the loss does not depend on that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import pairwise

    return pairwise


def pairwise_sigmoid(
    q: Tensor, keys: Tensor, scale: float | Tensor, bias: float | Tensor, label_offset: int = 0
) -> Tensor:
    """Logistic loss of all pairs of queries and keys, of which (i, ``label_offset + i``) belong together.

    Equals ``logits = scale * q @ keys.T + bias``, ``z = -ones(B, M)`` with 1 at ``[i, label_offset + i]``,
    ``-F.logsigmoid(z * logits).sum() / B``: a sum over pairs, divided by the number of queries. SigLIP compares
    cosines, so normalise rows to unit length first. Over ranks, pass the keys of all and ``label_offset = rank * B``:
    the mean of the ranks' losses is the loss of the whole batch.

    Args:
        q: [B, D] any floating dtype, B ≥ 1 and D ≥ 1. Gradient.
        keys: [M, D], M ≥ label_offset + B. Gradient.
        scale: factor of the products, a number, or a tensor with one element. Gradient to a tensor.
        bias: number added to all logits, likewise.
        label_offset: the row of `keys` that belongs to query 0.

    Returns: the loss, a float32 scalar (float64 for float64 queries). Computed and summed in that dtype whatever the
        input dtypes, and also under autocast; gradients have the dtype of their tensor.

    Raises:
        ValueError: a shape or device does not fit, or a query's key lies outside keys.
        TypeError: an argument is not floating.

    Memory: a kernel needs O((B + M)·D). Gradients are computed in the forward pass, and kept. The plain-torch body
        makes logits [B, M] and their derivatives.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, algorithm 1.
    """
    _check(q, keys, label_offset)
    scale = check.scalar("pairwise_sigmoid", "scale", scale, like=q)
    bias = check.scalar("pairwise_sigmoid", "bias", bias, like=q)
    needs = q.requires_grad or keys.requires_grad or scale.requires_grad or bias.requires_grad
    return _PairwiseSigmoid.apply(q, keys, scale, bias, label_offset, needs and torch.is_grad_enabled())


@check.once_a_signature
def _check(q: Tensor, keys: Tensor, label_offset: int) -> None:
    check.tensor("pairwise_sigmoid", "q", q, "B D")
    check.tensor("pairwise_sigmoid", "keys", keys, "M D", D=q.shape[1])
    check.floating("pairwise_sigmoid", q=q, keys=keys)
    check.same_device("pairwise_sigmoid", q=q, keys=keys)
    check.integer("pairwise_sigmoid", label_offset=label_offset)
    if q.numel() < 1:
        check.fail("pairwise_sigmoid", f"q must have at least one row and one column, got {list(q.shape)}")
    if not 0 <= label_offset <= keys.shape[0] - q.shape[0]:
        largest = keys.shape[0] - q.shape[0]
        message = f"label_offset must be at least 0 and at most M − B = {largest}, got {label_offset}"
        check.fail("pairwise_sigmoid", message)


@op("pairwise_sigmoid_fwd")
def _pairwise_sigmoid_fwd(
    q: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dq [B, D], dkeys [M, D], dscale, dbias); gradients for an upstream gradient of 1, empty without
    `with_grad`."""
    dtype, B = acc_dtype(q), q.shape[0]
    q, keys, scale, bias = q.to(dtype), keys.to(dtype), scale.to(dtype), bias.to(dtype)
    logits_BM = scale * (q @ keys.T) + bias
    positive_B = logits_BM.diagonal(label_offset)[:B]
    negated_BM = logits_BM.clone()
    negated_BM.diagonal(label_offset)[:B].neg_()
    loss = -F.logsigmoid(-negated_BM).sum() / B
    if not with_grad:
        return loss, q.new_empty(0), q.new_empty(0), q.new_empty(0), q.new_empty(0)
    weights_BM = logits_BM.sigmoid()
    weights_BM.diagonal(label_offset)[:B].copy_(-(-positive_B).sigmoid())
    weights_BM /= B
    sums_BD = weights_BM @ keys
    return loss, scale * sums_BD, scale * (weights_BM.T @ q), (q * sums_BD).sum(), weights_BM.sum()


@fake(_pairwise_sigmoid_fwd)
def _(q, keys, scale, bias, label_offset, with_grad):
    def empty(*shape):
        return q.new_empty(shape if with_grad else 0, dtype=acc_dtype(q))

    return q.new_empty((), dtype=acc_dtype(q)), empty(*q.shape), empty(*keys.shape), empty(), empty()


register_triton(_pairwise_sigmoid_fwd, lambda: _kernels().pairwise_sigmoid_fwd)


class _PairwiseSigmoid(Function):
    @staticmethod
    def forward(ctx, q, keys, scale, bias, label_offset, with_grad):
        loss, *gradients = _pairwise_sigmoid_fwd(q, keys, scale, bias, label_offset, with_grad)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @first_order("pairwise_sigmoid")
    def backward(ctx, dloss):
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad)
        return *(x * dloss if needed else None for x, needed in gradients), None, None
