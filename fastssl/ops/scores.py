"""Scores of queries against rows of their own choice, with gradient to both: CPC's drawn negatives.

Plain torch in parts: a part gathers its rows, and the backward pass gathers them again. No part is kept, so memory does
not grow with the number of queries, and no index is repeated to the width of the rows.
"""

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op

VALUES = 2**20  # gathered at a time: 4 MB in float32


def sampled_scores(q: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Dot product of each query with each of the rows that `index` names for it.

    Equals ``(q[:, None] * rows[index]).sum(2)``.

    Args:
        q: [B, D] any floating dtype. Gradient.
        rows: [M, D]. Gradient.
        index: [B, K] int64, rows of `rows`; a row may occur several times.

    Returns: scores [B, K] float32, float64 for float64 queries, computed in that dtype, also under autocast; gradients
        have the dtype of their tensor.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit.
        RuntimeError: an index is not in 0 … M − 1 (CPU; a device assertion on GPUs).

    Memory: 4 MB of gathered rows at a time beside scores and gradients, where the formula keeps [B, K, D] twice. On
        GPUs the gradient of rows is summed in an order that may vary.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, section 2.3.
    """
    _check(q, rows, index)
    return _SampledScores.apply(q, rows, index)


@check.once_a_signature
def _check(q: Tensor, rows: Tensor, index: Tensor) -> None:
    check.tensor("sampled_scores", "q", q, "B D")
    check.tensor("sampled_scores", "rows", rows, "M D", D=q.shape[1])
    check.tensor("sampled_scores", "index", index, "B K", B=q.shape[0])
    check.floating("sampled_scores", q=q, rows=rows)
    check.index("sampled_scores", index=index)
    check.same_device("sampled_scores", q=q, rows=rows, index=index)


def _parts(q: Tensor, index: Tensor, *others: Tensor):
    """Queries, index and further tensors in parts of `VALUES` gathered values."""
    size = max(1, VALUES // max(1, index.shape[1] * q.shape[1]))
    return zip(*(x.split(size) for x in (q, index, *others)))


@op("sampled_scores_fwd")
def _sampled_scores_fwd(q: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Scores [B, K]."""
    check.in_range("sampled_scores", "index", index, rows.shape[0], f"M-1={rows.shape[0] - 1}")
    dtype = acc_dtype(q)
    scores = torch.empty(index.shape, dtype=dtype, device=q.device)
    for q_part, index_part, out in _parts(q, index, scores):
        torch.matmul(rows[index_part].to(dtype), q_part.to(dtype)[:, :, None], out=out[:, :, None])
    return scores


@fake(_sampled_scores_fwd)
def _(q, rows, index):
    return q.new_empty(index.shape, dtype=acc_dtype(q))


@op("sampled_scores_bwd")
def _sampled_scores_bwd(q: Tensor, rows: Tensor, index: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor]:
    """(dq [B, D], drows [M, D]) in the dtype of dscores."""
    dq = torch.empty(q.shape, dtype=dscores.dtype, device=q.device)
    drows = torch.zeros(rows.shape, dtype=dscores.dtype, device=q.device)
    for q_part, index_part, d_part, out in _parts(q, index, dscores, dq):
        torch.matmul(d_part[:, None], rows[index_part].to(dscores.dtype), out=out[:, None])
        drows.index_add_(0, index_part.flatten(), (d_part[:, :, None] * q_part[:, None]).flatten(0, 1))
    return dq, drows


@fake(_sampled_scores_bwd)
def _(q, rows, index, dscores):
    return dscores.new_empty(q.shape), dscores.new_empty(rows.shape)


class _SampledScores(Function):
    @staticmethod
    def forward(ctx, q, rows, index):
        ctx.save_for_backward(q, rows, index)
        return _sampled_scores_fwd(q, rows, index)

    @staticmethod
    @first_order("sampled_scores")
    def backward(ctx, dscores):
        q, rows, index = ctx.saved_tensors
        dq, drows = _sampled_scores_bwd(q, rows, index, dscores)
        return dq, drows, None
