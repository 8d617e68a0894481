"""Contrast with sampled rows of a memory bank (InstDisc, CMC), and the bank's update.

With logits s_ij = q_i·row_ij / τ of the sampled rows and weights w_ij = ∂loss_i/∂s_ij the gradient is

    ∂loss_i/∂q_i = Σ_j w_ij row_ij / τ,

so one pass over the rows computes loss, rank and the gradient of the queries, while a row is still in a cache. The
gathered rows [B, 1+m, D] are never stored: at B = 256, m = 4,096, D = 128 they are 0.5 GB, and reading them once takes
most of the time. The plain-torch bodies below gather them.

The kernels take all four dtypes, also mixed, and give the same bits every time, the C++ ones on any number of threads.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .contrastive import InfoNCE
from .dispatch import Function, acc_dtype, call_in_place, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import bank

    return bank


class SampledNCE(NamedTuple):
    """Loss, rank and log-sum-exp of each query."""

    loss: Tensor  # [B] float32 (float64 for float64 queries)
    rank: Tensor  # [B] int64, number of sampled negatives that score above the positive; no gradient
    lse: Tensor  # [B], log-sum-exp of the logits of all 1+m rows; no gradient


def sampled_info_nce(q: Tensor, bank: Tensor, indices: Tensor, tau: float | Tensor) -> InfoNCE:
    """InfoNCE of each query against sampled rows of a bank, the first of which is its positive.

    Equals ``logits = torch.einsum("bd,bmd->bm", q, bank[indices]) / tau``,
    ``loss = F.cross_entropy(logits, zeros, reduction="none")``, ``rank = (logits[:, 1:] > logits[:, :1]).sum(1)``.
    A row may be drawn more than once, and may be the positive itself, as in the reference code: each draw counts in the
    loss, and a draw of the positive never counts in the rank. Rows are not normalised here.

    Args:
        q: [B, D] any floating dtype, queries. Gradient.
        bank: [N, D], rows contiguous, any floating dtype, no gradient. It is neither copied nor kept for the backward
            pass, so it may be updated as soon as this returns.
        indices: [B, 1+m] int64 in 0..N−1, m ≥ 0; column 0 is the positive. On GPUs they are not checked: an index
            outside counts as a row of zeros.
        tau: temperature > 0, a number, or a tensor with one element. Gradient to a tensor.

    Returns: `InfoNCE` of loss [B] and rank [B]. Computed and summed in float32, in float64 for float64 queries,
        whatever the input dtypes, and also under autocast; the gradient of q has q's dtype.

    Raises:
        ValueError: a shape or device does not fit, rows of the bank are not contiguous, a number tau is not in 1e-30 …
            1e30, or bank requires a gradient.
        TypeError: an argument is not floating, or indices are not int64.

    Memory: a kernel needs O(B·D) whatever m. The plain-torch body gathers rows [B, 1+m, D].

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, equation 2,
    over sampled rows; Tian et al., "Contrastive Multiview Coding", 2020, equation 2.
    """
    tau = _checked("sampled_info_nce", q, bank, indices, tau)
    with_grad = torch.is_grad_enabled() and (q.requires_grad or tau.requires_grad)
    return InfoNCE(*_SampledInfoNCE.apply(q, bank, indices, tau, with_grad))


def sampled_nce(
    q: Tensor, bank: Tensor, indices: Tensor, tau: float | Tensor, z: float | Tensor, eps: float = 1e-7
) -> SampledNCE:
    """Noise-contrastive estimation of each query against sampled rows of a bank, the first of which is its positive.

    Equals ``p = torch.einsum("bd,bmd->bm", q, bank[indices]).div(tau).exp() / z`` and, with ``c = m / N`` (m draws from
    the uniform distribution over N rows), ``loss = -(p[:, 0] / (p[:, 0] + c + eps)).log() - (c / (p[:, 1:] + c +
    eps)).log().sum(1)``: a sum over the negatives, without overflow of the exponentials. Rank and lse are
    ``(p[:, 1:] > p[:, :1]).sum(1)`` and ``(p * z).sum(1).log()``. InstDisc and CMC estimate z once, from their first
    batch: ``z = N * (p * z).mean()``, which is ``N * (lse - log(1 + m)).exp().mean()``.

    Args:
        q: [B, D] any floating dtype, queries. Gradient.
        bank: [N, D], rows contiguous, any floating dtype, no gradient; see `sampled_info_nce`.
        indices: [B, 1+m] int64 in 0..N−1, m ≥ 0; column 0 is the positive; see `sampled_info_nce`.
        tau: temperature > 0, a number, or a tensor with one element. Gradient to a tensor.
        z: normalising constant Z > 0, a number, or a tensor with one element, whose value is not read on the host. No
            gradient.
        eps: added to denominators, ≥ 0; 1e-7 in the reference code.

    Returns: `SampledNCE` of loss [B], rank [B] and lse [B]. Computed and summed in float32, in float64 for float64
        queries, whatever the input dtypes, and also under autocast; the gradient of q has q's dtype.

    Raises:
        ValueError: a shape or device does not fit, rows of the bank are not contiguous, a number tau or z is not in
            1e-30 … 1e30, eps is negative or not finite, or bank or z requires a gradient.
        TypeError: an argument is not floating, or indices are not int64.

    Memory: a kernel needs O(B·D) whatever m. The plain-torch body gathers rows [B, 1+m, D].

    Source: Wu et al., 2018, equations 4 to 7 and algorithm 1, and its code; Gutmann and Hyvärinen, "Noise-contrastive
    estimation", 2010.
    """
    tau = _checked("sampled_nce", q, bank, indices, tau)
    log_z = _log_z(z, like=q)
    check.number("sampled_nce", eps=eps)
    if not 0 <= eps < math.inf:
        check.fail("sampled_nce", f"eps must be at least 0 and finite, got {eps}")
    drawn = indices.shape[1] - 1
    noise = drawn / max(1, bank.shape[0])  # c, the expected number of draws of a row
    if noise + eps <= 0:
        check.fail("sampled_nce", f"eps must be above 0 where no negative is drawn, got {eps}")
    with_grad = torch.is_grad_enabled() and (q.requires_grad or tau.requires_grad)
    shift = log_z + math.log(noise + eps)
    loss, rank, lse = _SampledNCE.apply(q, bank, indices, tau, shift, with_grad)
    return SampledNCE(loss + drawn * math.log1p(eps / noise) if drawn else loss, rank, lse)


@op("sampled_info_nce_fwd")
def _sampled_info_nce_fwd(
    q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], rank [B], dq [B, D] for an upstream gradient of 1; an empty dq without `with_grad`)."""
    rows, logits = _rows_and_logits("sampled_info_nce", q, bank, indices, tau)
    rank_B = _rank(logits, indices)
    log_softmax = logits.log_softmax(1)
    if not with_grad:
        return -log_softmax[:, 0], rank_B, q.new_empty(0, dtype=logits.dtype)
    weights = log_softmax.exp()
    # 1 − p(positive) as the sum of the other weights: the difference would cancel where p(positive) is close to 1.
    weights[:, 0] = -weights[:, 1:].sum(1)
    return -log_softmax[:, 0], rank_B, _weighted_sum(weights, rows) / tau.to(logits.dtype)


@fake(_sampled_info_nce_fwd)
def _(q, bank, indices, tau, with_grad):
    loss, rank, dq = _fake_results(q, with_grad)
    return loss, rank, dq


register_triton(_sampled_info_nce_fwd, lambda: _kernels().sampled_info_nce_fwd)


class _SampledInfoNCE(Function):
    @staticmethod
    def forward(ctx, q, bank, indices, tau, with_grad):
        loss, rank, dq = _sampled_info_nce_fwd(q, bank, indices, tau, with_grad)
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(q, dq, tau)
        return loss, rank

    @staticmethod
    @first_order("sampled_info_nce")
    def backward(ctx, dloss, _):
        dq, dtau = _gradients(ctx, dloss)
        return dq, None, None, dtau, None


@op("sampled_nce_fwd")
def _sampled_nce_fwd(
    q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor, shift: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [B] without its constant m·log(1 + eps / c), rank [B], lse [B], dq [B, D] as in sampled_info_nce_fwd).

    `shift` is log(z·(c + eps)): p / (c + eps) is exp(logit − shift).
    """
    rows, logits = _rows_and_logits("sampled_nce", q, bank, indices, tau)
    rank_B = _rank(logits, indices)
    lse_B = logits.logsumexp(1)
    shifted = logits - shift.to(logits.dtype)
    loss_B = -F.logsigmoid(shifted[:, 0]) - F.logsigmoid(-shifted[:, 1:]).sum(1)
    if not with_grad:
        return loss_B, rank_B, lse_B, q.new_empty(0, dtype=logits.dtype)
    weights = shifted.sigmoid()
    weights[:, 0] = -torch.sigmoid(-shifted[:, 0])
    return loss_B, rank_B, lse_B, _weighted_sum(weights, rows) / tau.to(logits.dtype)


@fake(_sampled_nce_fwd)
def _(q, bank, indices, tau, shift, with_grad):
    loss, rank, dq = _fake_results(q, with_grad)
    return loss, rank, torch.empty_like(loss), dq


register_triton(_sampled_nce_fwd, lambda: _kernels().sampled_nce_fwd)


class _SampledNCE(Function):
    @staticmethod
    def forward(ctx, q, bank, indices, tau, shift, with_grad):
        loss, rank, lse, dq = _sampled_nce_fwd(q, bank, indices, tau, shift, with_grad)
        ctx.mark_non_differentiable(rank, lse)
        ctx.save_for_backward(q, dq, tau)
        return loss, rank, lse

    @staticmethod
    @first_order("sampled_nce")
    def backward(ctx, dloss, *_):
        dq, dtau = _gradients(ctx, dloss)
        return dq, None, None, dtau, None, None


def update_bank_(bank: Tensor, indices: Tensor, features: Tensor, momentum: float) -> None:
    """Moves rows of a bank towards new features and normalises them, in place.

    Equals ``rows = F.normalize(momentum * bank[indices] + (1 - momentum) * features)``, ``bank[indices] = rows``, with
    two rules: of an index that occurs several times the last occurrence counts, alone; and a row whose update has a
    norm of 0, or one that is not finite, stays as it is.

    Args:
        bank: [N, D], rows contiguous, any floating dtype, changed in place.
        indices: [B] int64 in 0..N−1, B ≥ 0. On GPUs they are not checked: an index outside is ignored.
        features: [B, D] any floating dtype and strides, no gradient.
        momentum: share of the old row, 0 … 1.

    The update is computed in float32 (float64 if bank or features have that), then rounded to the bank's dtype.

    Raises:
        ValueError: a shape or device does not fit, rows of the bank are not contiguous, momentum is not in 0 … 1, or
            two of the arguments, or two rows of the bank, share memory.
        TypeError: indices are not int64, or bank or features are not floating.

    Memory: none beyond the arguments; the plain-torch body compares all pairs of indices.

    Source: Wu et al., 2018, section 3.2, "Learning with a memory bank", and its code.
    """
    _check_update(bank, indices, features)
    check.number("update_bank_", momentum=momentum)
    if not 0 <= momentum <= 1:
        check.fail("update_bank_", f"momentum must be from 0 to 1, got {momentum}")
    _check_rows("update_bank_", bank)
    check.separate("update_bank_", {"bank": bank}, {"indices": indices, "features": features})
    call_in_place(_update_bank_, (bank,), bank, indices, features, float(momentum))


@check.once_a_signature
def _check_update(bank: Tensor, indices: Tensor, features: Tensor) -> None:
    check.tensor("update_bank_", "bank", bank, "N D")
    check.tensor("update_bank_", "indices", indices, "B")
    check.tensor("update_bank_", "features", features, "B D", B=indices.shape[0], D=bank.shape[1])
    check.floating("update_bank_", bank=bank, features=features)
    check.index("update_bank_", indices=indices)
    check.same_device("update_bank_", bank=bank, indices=indices, features=features)


@op("update_bank_", mutates_args=("bank",))
def _update_bank_(bank: Tensor, indices: Tensor, features: Tensor, momentum: float) -> None:
    check.in_range("update_bank_", "indices", indices, bank.shape[0], f"N-1={bank.shape[0] - 1}")
    if indices.shape[0] == 0:
        return
    dtype = torch.promote_types(acc_dtype(bank), features.dtype)
    positions = torch.arange(indices.shape[0], device=indices.device)
    last = torch.where(indices[:, None] == indices, positions, -1).amax(1)  # position of each index's last occurrence
    old = bank[indices]
    rows = old.to(dtype) * momentum + features[last].to(dtype) * (1 - momentum)
    norm = rows.square().sum(1, keepdim=True).sqrt()
    is_kept = ~norm.isfinite() | (norm == 0)
    bank.index_copy_(0, indices, torch.where(is_kept, old, (rows / norm).to(bank.dtype)))


@fake(_update_bank_)
def _(bank, indices, features, momentum):
    pass


register_triton(_update_bank_, lambda: _kernels().update_bank_)


def _checked(name: str, q: Tensor, bank: Tensor, indices: Tensor, tau: float | Tensor) -> Tensor:
    """tau as a tensor, after checks of all arguments."""
    _check_sampled(name, q, bank, indices)
    _check_rows(name, bank)
    if bank.requires_grad:
        check.fail(name, "bank must not require a gradient, got requires_grad=True; pass bank.detach()")
    return check.temperature(name, tau, like=q)


@check.once_a_signature
def _check_sampled(name: str, q: Tensor, bank: Tensor, indices: Tensor) -> None:
    check.tensor(name, "q", q, "B D")
    check.tensor(name, "bank", bank, "N D", D=q.shape[1])
    check.tensor(name, "indices", indices, "B 1+m", B=q.shape[0])
    check.floating(name, q=q, bank=bank)
    check.index(name, indices=indices)
    check.same_device(name, q=q, bank=bank, indices=indices)
    if indices.shape[1] == 0:
        check.fail(name, f"indices must have a first column, the positives, got shape {list(indices.shape)}")


def _check_rows(name: str, bank: Tensor) -> None:
    if bank.shape[0] == 0:
        check.fail(name, f"bank must have at least one row, got shape {list(bank.shape)}")
    if bank.stride(1) != 1 and bank.shape[1] > 1:
        check.fail(name, f"bank must have contiguous rows [N, D], got strides {list(bank.stride())}")


def _log_z(z: float | Tensor, like: Tensor) -> Tensor:
    """log z as a 0-dim float64 tensor on the device of `like`. A number is checked; a tensor's value is not read."""
    low, high = check.TAU
    if isinstance(z, Tensor):
        if z.numel() != 1:
            check.fail("sampled_nce", f"z must be a number or a tensor with one element, got shape {list(z.shape)}")
        check.floating("sampled_nce", z=z)
        if z.requires_grad:
            check.fail("sampled_nce", "z must not require a gradient, got requires_grad=True; pass z.detach()")
        if z.is_meta and not like.is_meta:
            check.fail("sampled_nce", f"z must be on {like.device} or have a value there, got meta")
        return z.reshape(()).to(like.device, torch.float64).log()
    check.number("sampled_nce", z=z)
    if not low <= z <= high:
        check.fail("sampled_nce", f"z must be > 0, from {low} to {high}, got {z}")
    return torch.full((), math.log(z), dtype=torch.float64, device=like.device)


def _rows_and_logits(name: str, q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled rows [B, 1+m, D] and their logits [B, 1+m]."""
    check.in_range(name, "indices", indices, bank.shape[0], f"N-1={bank.shape[0] - 1}")
    dtype = acc_dtype(q)
    rows = bank[indices].to(dtype)
    return rows, torch.bmm(rows, q.to(dtype)[:, :, None]).squeeze(2) / tau.to(dtype)


def _rank(logits: Tensor, indices: Tensor) -> Tensor:
    """Number of negatives above the positive [B]. A second product of the positive's row may be rounded otherwise."""
    return ((logits[:, 1:] > logits[:, :1]) & (indices[:, 1:] != indices[:, :1])).sum(1)


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_j weights[b, j] · rows[b, j]: [B, D]."""
    return torch.bmm(weights[:, None], rows).squeeze(1)


def _fake_results(q: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (loss, rank, dq)."""
    loss, rank = q.new_empty(q.shape[0], dtype=acc_dtype(q)), q.new_empty(q.shape[0], dtype=torch.int64)
    return loss, rank, q.new_empty(q.shape if with_grad else 0, dtype=acc_dtype(q))


def _gradients(ctx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and of tau: every logit is bilinear in q and 1/τ, so τ's is −Σ q·dq / τ."""
    q, dq, tau = ctx.saved_tensors
    dq = dq * dloss.unsqueeze(1)
    dtau = None
    if ctx.needs_input_grad[3]:
        dtau = -(q.to(dq.dtype) * dq).sum() / tau.to(dq.dtype)
    return dq if ctx.needs_input_grad[0] else None, dtau
