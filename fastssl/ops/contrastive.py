"""InfoNCE over a queue (MoCo v1, v2), in the batch (MoCo v3) and NT-Xent (SimCLR).

All three have the same gradient. With logits s_ij = q_i·k_j / τ it is

    ∂loss_i/∂q_i = (Σ_j softmax(s_i)_j k_j − k_positive) / τ,

attention whose values are its keys. So one pass over the keys computes loss, rank and the gradient of the queries, and
∂loss/∂τ = −q·∂loss/∂q / τ follows from them. The plain-torch bodies below hold all logits in memory; a kernel does not.

The kernels take all four dtypes and any strides, also mixed, and give the same bits every time, the C++ ones on any
number of threads. On GPUs the softmax of 16-bit inputs is rounded to their dtype before it is multiplied with the keys,
as in flash attention, and so is that of bfloat16 on CPUs with bfloat16 instructions (levels avx512 and amx); loss and
rank do not depend on that. The GPU kernels multiply float32 as exactly as float32 does, unless torch is allowed to use
tf32 (`torch.set_float32_matmul_precision`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import contrastive

    return contrastive


class InfoNCE(NamedTuple):
    """Loss and rank of each query."""

    loss: Tensor  # [B] float32 (float64 for float64 queries)
    rank: Tensor  # [B] int64, number of negatives that score above the positive: 0 means top-1; no gradient


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> InfoNCE:
    """InfoNCE of each query against its key and a queue of negatives.

    Equals ``logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / tau``,
    ``loss = F.cross_entropy(logits, zeros, reduction="none")``, ``rank = (logits[:, 1:] > logits[:, :1]).sum(1)``.
    Queries and keys are not normalised here; MoCo normalises them to unit length.

    Args:
        q: [B, D] any floating dtype, queries. Gradient.
        k: [B, D] positive keys, no gradient.
        queue: [K, D] negatives, rows contiguous, no gradient. It is neither copied nor kept for the backward pass, so
            it may be overwritten as soon as this returns.
        tau: temperature > 0, a number, or a tensor with one element. Gradient to a tensor.

    Returns: `InfoNCE` of loss [B] and rank [B]. Computed and summed in float32, in float64 for float64 queries,
        whatever the input dtypes, and also under autocast; the gradient of q has q's dtype.

    Raises:
        ValueError: a shape or device does not fit, a number tau is not in 1e-30 … 1e30, or k or queue requires a
            gradient.
        TypeError: an argument is not floating.

    Memory: a kernel needs O(B·D) whatever K: at B = 256, D = 128 under 4 MB on a CPU, and on a GPU 10 MB of partial
        results, a few rows for each multiprocessor. The plain-torch body makes logits [B, K], and converts a queue of
        another dtype.

    Source: van den Oord et al., 2018 (CPC), equation 4; He et al., 2020 (MoCo), equation 1 and algorithm 1.
    """
    _check_queue(q, k, queue)
    for name, value in (("k", k), ("queue", queue)):
        if value.requires_grad:
            check.fail("info_nce", f"{name} must not require a gradient, got requires_grad=True; pass {name}.detach()")
    tau = check.temperature("info_nce", tau, like=q)
    with_grad = torch.is_grad_enabled() and (q.requires_grad or tau.requires_grad)
    return InfoNCE(*_InfoNCE.apply(q, k, queue, tau, with_grad))


@check.once_a_signature
def _check_queue(q: Tensor, k: Tensor, queue: Tensor) -> None:
    check.tensor("info_nce", "q", q, "B D")
    check.tensor("info_nce", "k", k, "B D", B=q.shape[0], D=q.shape[1])
    check.tensor("info_nce", "queue", queue, "K D", D=q.shape[1])
    check.floating("info_nce", q=q, k=k, queue=queue)
    check.same_device("info_nce", q=q, k=k, queue=queue)


@op("info_nce_fwd")
def _info_nce_fwd(q: Tensor, k: Tensor, queue: Tensor, tau: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], rank [B], dq [B, D] for an upstream gradient of 1; an empty dq without `with_grad`)."""
    dtype = acc_dtype(q)
    q, k, queue, tau = q.to(dtype), k.to(dtype), queue.to(dtype), tau.to(dtype)
    positive_B1 = (q * k).sum(1, keepdim=True) / tau
    logits = torch.cat([positive_B1, (q @ queue.T) / tau], dim=1)  # [B, 1 + K]
    rank_B = (logits[:, 1:] > positive_B1).sum(1)
    log_softmax = logits.log_softmax(1)
    loss_B = -log_softmax[:, 0]
    if not with_grad:
        return loss_B, rank_B, q.new_empty(0)
    weights_BK = log_softmax[:, 1:].exp()
    # 1 − p(positive) as the sum of the other weights: the difference would cancel where p(positive) is close to 1.
    return loss_B, rank_B, (weights_BK @ queue - weights_BK.sum(1, keepdim=True) * k) / tau


@fake(_info_nce_fwd)
def _(q, k, queue, tau, with_grad):
    return _fake_results(q, with_grad)


register_triton(_info_nce_fwd, lambda: _kernels().info_nce_fwd)


class _InfoNCE(Function):
    @staticmethod
    def forward(ctx, q, k, queue, tau, with_grad):
        loss, rank, dq = _info_nce_fwd(q, k, queue, tau, with_grad)
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(q, dq, tau)
        return loss, rank

    @staticmethod
    @first_order("info_nce")
    def backward(ctx, dloss, _):
        q, dq, tau = ctx.saved_tensors
        dq = dq * dloss.unsqueeze(1)
        return dq, None, None, _tau_gradient(q, dq, tau) if ctx.needs_input_grad[3] else None, None


def batch_info_nce(q: Tensor, keys: Tensor, tau: float | Tensor, label_offset: int = 0) -> InfoNCE:
    """InfoNCE in the batch: the positive of query i is ``keys[label_offset + i]``, every other key is a negative.

    Equals ``logits = q @ keys.T / tau``, ``labels = label_offset + arange(B)``,
    ``loss = F.cross_entropy(logits, labels, reduction="none")``, ``rank = (logits > logits[i, labels[i]]).sum(1)``.
    MoCo v3 gathers the keys of all ranks, passes ``label_offset = rank * B``, and multiplies the mean loss by 2·τ.

    Args:
        q: [B, D] any floating dtype. Gradient.
        keys: [M, D], M ≥ label_offset + B. Gradient where they require one.
        tau: temperature > 0, a number, or a tensor with one element. Gradient to a tensor.
        label_offset: the row of `keys` that is the positive of query 0.

    Returns: `InfoNCE` of loss [B] and rank [B]. Computed and summed in float32, in float64 for float64 queries,
        whatever the input dtypes, and also under autocast; gradients have the dtype of their tensor.

    Raises:
        ValueError: a shape or device does not fit, a number tau is not in 1e-30 … 1e30, or a positive lies outside
            keys.
        TypeError: an argument is not floating.

    Memory: a kernel needs O((B + M)·D). The plain-torch body makes logits [B, M], and again for the gradient of keys.

    Source: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", 2021, algorithm 1.
    """
    _check_batch(q, keys, label_offset)
    tau = check.temperature("batch_info_nce", tau, like=q)
    with_grad = torch.is_grad_enabled() and (q.requires_grad or tau.requires_grad)
    return InfoNCE(*_BatchInfoNCE.apply(q, keys, tau, label_offset, with_grad))


@check.once_a_signature
def _check_batch(q: Tensor, keys: Tensor, label_offset: int) -> None:
    check.tensor("batch_info_nce", "q", q, "B D")
    check.tensor("batch_info_nce", "keys", keys, "M D", D=q.shape[1])
    check.floating("batch_info_nce", q=q, keys=keys)
    check.same_device("batch_info_nce", q=q, keys=keys)
    check.integer("batch_info_nce", label_offset=label_offset)
    if not 0 <= label_offset <= keys.shape[0] - q.shape[0]:
        largest = keys.shape[0] - q.shape[0]
        message = f"label_offset must be at least 0 and at most M − B = {largest}, got {label_offset}"
        check.fail("batch_info_nce", message)


@op("batch_info_nce_fwd")
def _batch_info_nce_fwd(
    q: Tensor, keys: Tensor, tau: Tensor, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], rank [B], dq [B, D] as in info_nce_fwd, log-sum-exp of the logits [B])."""
    dtype = acc_dtype(q)
    q, keys, tau = q.to(dtype), keys.to(dtype), tau.to(dtype)
    logits_BM = (q @ keys.T) / tau
    positive_B = logits_BM.diagonal(label_offset)[: q.shape[0]]
    rank_B = (logits_BM > positive_B[:, None]).sum(1)
    lse_B = logits_BM.logsumexp(1)
    loss_B = -logits_BM.log_softmax(1).diagonal(label_offset)[: q.shape[0]]
    dq = _softmax_minus_positive(logits_BM, lse_B, label_offset) @ keys / tau if with_grad else q.new_empty(0)
    return loss_B, rank_B, dq, lse_B


@fake(_batch_info_nce_fwd)
def _(q, keys, tau, label_offset, with_grad):
    loss, rank, dq = _fake_results(q, with_grad)
    return loss, rank, dq, torch.empty_like(loss)


register_triton(_batch_info_nce_fwd, lambda: _kernels().batch_info_nce_fwd)


@op("batch_info_nce_dkeys")
def _batch_info_nce_dkeys(
    q: Tensor, keys: Tensor, tau: Tensor, label_offset: int, lse: Tensor, dloss: Tensor
) -> Tensor:
    """dkeys [M, D] in float32 or wider."""
    dtype = lse.dtype
    q, keys, tau = q.to(dtype), keys.to(dtype), tau.to(dtype)
    weights_BM = _softmax_minus_positive((q @ keys.T) / tau, lse, label_offset) * dloss[:, None]
    return weights_BM.T @ q / tau


@fake(_batch_info_nce_dkeys)
def _(q, keys, tau, label_offset, lse, dloss):
    return keys.new_empty(keys.shape, dtype=lse.dtype)


register_triton(_batch_info_nce_dkeys, lambda: _kernels().batch_info_nce_dkeys)


class _BatchInfoNCE(Function):
    @staticmethod
    def forward(ctx, q, keys, tau, label_offset, with_grad):
        loss, rank, dq, lse = _batch_info_nce_fwd(q, keys, tau, label_offset, with_grad)
        ctx.label_offset = label_offset
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(q, keys, tau, dq, lse)
        return loss, rank

    @staticmethod
    @first_order("batch_info_nce")
    def backward(ctx, dloss, _):
        q, keys, tau, dq, lse = ctx.saved_tensors
        needs_q, needs_keys, needs_tau, _, _ = ctx.needs_input_grad
        dkeys = dtau = None
        if needs_keys:
            dkeys = _batch_info_nce_dkeys(q, keys, tau, ctx.label_offset, lse, dloss)
        if needs_q or needs_tau:
            dq = dq * dloss.unsqueeze(1)
            dtau = _tau_gradient(q, dq, tau) if needs_tau else None
        return dq if needs_q else None, dkeys, dtau, None, None


def nt_xent(z1: Tensor, z2: Tensor, tau: float | Tensor) -> Tensor:
    """NT-Xent, SimCLR's loss: the positive of a view is the other view of its image, the rest are negatives.

    Equals ``z = torch.cat([z1, z2])``, ``logits = (z @ z.T / tau).fill_diagonal_(-inf)``,
    ``F.cross_entropy(logits, (arange(2B) + B) % 2B, reduction="none")``. Rows are not normalised here; SimCLR compares
    cosines, so normalise them to unit length first.

    Args:
        z1, z2: [B, D] any floating dtype, B ≥ 1; row i of both is of the same image. Gradient to both.
        tau: temperature > 0, a number, or a tensor with one element. Gradient to a tensor.

    Returns: loss [2B], of z1's rows and then of z2's; float32, float64 for float64 inputs, computed and summed in
        that dtype whatever the input dtypes, and also under autocast; gradients have the dtype of their tensor.

    Raises:
        ValueError: shapes or devices differ, or a number tau is not in 1e-30 … 1e30. TypeError: one is not floating.

    Memory: a kernel needs O(B·D); the C++ kernel three copies of z, and it computes the logit of each pair once. The
        plain-torch body makes logits [2B, 2B], and again for the gradient.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, equation 1.
    """
    _check_views(z1, z2)
    return _NTXent.apply(torch.cat([z1, z2]), check.temperature("nt_xent", tau, like=z1))


@check.once_a_signature
def _check_views(z1: Tensor, z2: Tensor) -> None:
    check.tensor("nt_xent", "z1", z1, "B D")
    check.tensor("nt_xent", "z2", z2, "B D", B=z1.shape[0], D=z1.shape[1])
    check.floating("nt_xent", z1=z1, z2=z2)
    check.same_device("nt_xent", z1=z1, z2=z2)


@op("nt_xent_fwd")
def _nt_xent_fwd(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [2B], log-sum-exp of the logits [2B])."""
    logits = _nt_xent_logits(z.to(acc_dtype(z)), tau)
    log_softmax, half = logits.log_softmax(1), z.shape[0] // 2
    return -torch.cat([log_softmax.diagonal(half), log_softmax.diagonal(-half)]), logits.logsumexp(1)


@fake(_nt_xent_fwd)
def _(z, tau):
    rows = z.new_empty(z.shape[0], dtype=acc_dtype(z))
    return rows, torch.empty_like(rows)


register_triton(_nt_xent_fwd, lambda: _kernels().nt_xent_fwd)


@op("nt_xent_bwd")
def _nt_xent_bwd(z: Tensor, tau: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
    """dz [2B, D] in float32 or wider: a view is the query of its row of logits and a key of all other rows."""
    z, half = z.to(lse.dtype), z.shape[0] // 2
    weights = (_nt_xent_logits(z, tau) - lse[:, None]).exp_()
    weights.diagonal(half).sub_(1)
    weights.diagonal(-half).sub_(1)
    weights *= dloss[:, None]
    return (weights + weights.T) @ z / tau.to(lse.dtype)


@fake(_nt_xent_bwd)
def _(z, tau, lse, dloss):
    return z.new_empty(z.shape, dtype=lse.dtype)


register_triton(_nt_xent_bwd, lambda: _kernels().nt_xent_bwd)


class _NTXent(Function):
    @staticmethod
    def forward(ctx, z, tau):
        loss, lse = _nt_xent_fwd(z, tau)
        ctx.save_for_backward(z, tau, lse)
        return loss

    @staticmethod
    @first_order("nt_xent")
    def backward(ctx, dloss):
        z, tau, lse = ctx.saved_tensors
        dz = _nt_xent_bwd(z, tau, lse, dloss)
        # Each z_i·z_j appears in dz_i and in dz_j, so z·dz counts every logit twice.
        return dz, _tau_gradient(z, dz, tau) / 2 if ctx.needs_input_grad[1] else None


def _fake_results(q: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (loss, rank, dq)."""
    loss, rank = q.new_empty(q.shape[0], dtype=acc_dtype(q)), q.new_empty(q.shape[0], dtype=torch.int64)
    return loss, rank, q.new_empty(q.shape if with_grad else 0, dtype=acc_dtype(q))


def _softmax_minus_positive(logits_BM: Tensor, lse_B: Tensor, label_offset: int) -> Tensor:
    """The gradient of the summed loss with respect to the logits [B, M]."""
    weights_BM = (logits_BM - lse_B[:, None]).exp_()
    weights_BM.diagonal(label_offset)[: weights_BM.shape[0]].sub_(1)
    return weights_BM


def _nt_xent_logits(z: Tensor, tau: Tensor) -> Tensor:
    """Logits [2B, 2B], −∞ on the diagonal."""
    return ((z @ z.T) / tau.to(z.dtype)).fill_diagonal_(float("-inf"))


def _tau_gradient(q: Tensor, dq: Tensor, tau: Tensor) -> Tensor:
    """−Σ q·dq / τ, since every logit is bilinear in q and 1/τ."""
    return -(q.to(dq.dtype) * dq).sum() / tau.to(dq.dtype)
