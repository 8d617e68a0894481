"""MAE's random masking: choosing the tokens to keep, gathering them, and restoring the sequence."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import masking

    return masking


class Masking(NamedTuple):
    """Result of `random_masking`, for each sample."""

    ids_keep: Tensor  # [B, keep] int64, the kept tokens in ascending order of noise
    ids_masked: Tensor  # [B, L − keep] int64, the removed tokens in ascending order of noise
    ids_restore: Tensor  # [B, L] int64, rank of each token's noise: its position in (ids_keep, ids_masked)
    mask: Tensor  # [B, L] float32, 0 kept, 1 removed


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Keeps the `keep` tokens of smallest noise in each row.

    Equals ``ids = noise.argsort(1, stable=True)``, ``ids_keep, ids_masked = ids[:, :keep], ids[:, keep:]``,
    ``ids_restore = ids.argsort(1)`` and ``mask = (ids_restore >= keep).float()``. Equal noise is ordered by index and
    NaN comes last, on every device.

    Args:
        noise: [B, L] floating, usually ``torch.rand(B, L)``. No gradient.
        keep: number of tokens to keep, 1 ≤ keep ≤ L; the reference code takes ``int(L * (1 - mask_ratio))``, which
            rounds down: 19 of 100 at ratio 0.8.

    Returns:
        `Masking` of ids_keep [B, keep], ids_masked [B, L − keep], ids_restore [B, L], all int64, and mask [B, L]
        float32, 0 kept, 1 removed. The kept tokens are in ascending order of noise, not of position.

    Raises:
        ValueError: noise is not [B, L], or keep is outside 1..L.
        TypeError: noise is not floating.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, section 3, "Masking".
    """
    _check_masking(noise, keep)
    return Masking(*_random_masking(noise.detach() if noise.requires_grad else noise, keep))


@check.once_a_signature
def _check_masking(noise: Tensor, keep: int) -> None:
    check.tensor("random_masking", "noise", noise, "B L")
    check.floating("random_masking", noise=noise)
    length = noise.shape[1]
    check.integer("random_masking", keep=keep)
    if not 1 <= keep <= length:
        check.fail("random_masking", f"keep must be between 1 and L={length}, got {keep}")


@op("random_masking")
def _random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = noise.argsort(dim=1, stable=True)
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(ids)
    ids_restore = torch.empty_like(ids).scatter_(1, ids, ranks)
    mask = (ids_restore >= keep).float()
    ids_keep, ids_masked = (part.clone(memory_format=torch.contiguous_format) for part in ids.tensor_split([keep], 1))
    return ids_keep, ids_masked, ids_restore, mask


@fake(_random_masking)
def _(noise, keep):
    batch, length = noise.shape
    return (
        noise.new_empty(batch, keep, dtype=torch.int64),
        noise.new_empty(batch, length - keep, dtype=torch.int64),
        noise.new_empty(batch, length, dtype=torch.int64),
        noise.new_empty(batch, length, dtype=torch.float32),
    )


register_triton(_random_masking, lambda: _kernels().random_masking)


def keep_tokens(x: Tensor, ids_keep: Tensor, pos: Tensor | None = None) -> Tensor:
    """Gathers the kept tokens of each sample and adds their positional embedding.

    Equals ``(x + pos).gather(1, ids_keep[..., None].expand(-1, -1, D))``; dtypes promote as in that sum.

    Args:
        x: [B, L, D] any floating dtype.
        ids_keep: [B, M] int64 in 0..L−1. Where one is repeated, its row of x gets the sum of the gradients, on CPUs; on
            GPUs the gradient requires ids without duplicates in a row.
        pos: [L, D] or [1, L, D], optional.

    Returns: [B, M, D] of dtype ``torch.result_type(x, pos)``. Gradient to x and pos, summed in float32 or wider.

    Raises:
        ValueError: a shape or device does not fit. TypeError: ids_keep is not int64, or x or pos not floating.

    Source: He et al., 2021 (MAE), section 3, "MAE encoder".
    """
    _check_keep(x, ids_keep, pos)
    return _KeepTokens.apply(x, ids_keep, pos if pos is None else pos.reshape(pos.shape[-2:]))


@check.once_a_signature
def _check_keep(x: Tensor, ids_keep: Tensor, pos: Tensor | None) -> None:
    check.tensor("keep_tokens", "x", x, "B L D")
    check.tensor("keep_tokens", "ids_keep", ids_keep, "B M", B=x.shape[0])
    check.floating("keep_tokens", x=x)
    check.index("keep_tokens", ids_keep=ids_keep)
    check.same_device("keep_tokens", x=x, ids_keep=ids_keep)
    _check_positions("keep_tokens", pos, x, x.shape[1], "L")


@op("keep_tokens_fwd")
def _keep_tokens_fwd(x: Tensor, ids_keep: Tensor, pos: Tensor | None) -> Tensor:
    check.in_range("keep_tokens", "ids_keep", ids_keep, x.shape[1])
    kept = _gather(x, ids_keep)
    return kept if pos is None else kept + pos[ids_keep]


@fake(_keep_tokens_fwd)
def _(x, ids_keep, pos):
    dtype = x.dtype if pos is None else torch.result_type(x, pos)
    return x.new_empty(*ids_keep.shape, x.shape[2], dtype=dtype)


register_triton(_keep_tokens_fwd, lambda: _kernels().keep_tokens_fwd)


@op("keep_tokens_bwd")
def _keep_tokens_bwd(dkept: Tensor, ids_keep: Tensor, length: int) -> Tensor:
    """The gradient of x in dkept's dtype: rows of dkept at ids_keep, added where ids repeat, zeros elsewhere."""
    dx = dkept.new_zeros(dkept.shape[0], length, dkept.shape[2])
    return dx.scatter_add_(1, ids_keep.unsqueeze(-1).expand_as(dkept), dkept)


@fake(_keep_tokens_bwd)
def _(dkept, ids_keep, length):
    return dkept.new_empty(dkept.shape[0], length, dkept.shape[2])


register_triton(_keep_tokens_bwd, lambda: _kernels().keep_tokens_bwd)


class _KeepTokens(Function):
    @staticmethod
    def forward(ctx, x, ids_keep, pos):
        ctx.save_for_backward(ids_keep)
        ctx.length = x.shape[1]
        return _keep_tokens_fwd(x, ids_keep, pos)

    @staticmethod
    @first_order("keep_tokens")
    def backward(ctx, dkept):
        (ids_keep,) = ctx.saved_tensors
        needs_x, _, needs_pos = ctx.needs_input_grad
        if not (needs_x or needs_pos):
            return None, None, None
        dx = _keep_tokens_bwd(dkept, ids_keep, ctx.length)
        return dx if needs_x else None, None, _batch_sum(dx) if needs_pos else None


def restore_tokens(
    x: Tensor, mask_token: Tensor, ids_restore: Tensor, pos: Tensor | None = None, prefix: int = 1
) -> Tensor:
    """Restores the sequence: kept tokens in their positions, mask tokens elsewhere, plus the positional embedding.

    Equals ``torch.cat([x[:, :prefix], torch.cat([x[:, prefix:], mask_token.expand(B, L - M, D)], 1).gather(1,
    ids_restore[..., None].expand(-1, -1, D))], 1) + pos``; dtypes promote as in that expression.

    Args:
        x: [B, prefix + M, D] any floating dtype: `prefix` tokens that stay in front, then the M kept tokens in the
            order of `Masking.ids_keep`.
        mask_token: D values, as [D] or [1, 1, D].
        ids_restore: [B, L] int64, L ≥ M: the rank of each token, as `random_masking` returns it. On GPUs the gradient
            requires that no rank is repeated.
        pos: [prefix + L, D] or [1, prefix + L, D], optional.
        prefix: number of tokens that are not patches: 1 for a class token, 0 for none.

    Returns: [B, prefix + L, D] of the promoted dtype. Gradient to x, mask_token and pos, sums in float32 or wider.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: ids_restore is not int64, or x, mask_token or pos is not floating.

    Source: He et al., 2021 (MAE), section 3, "MAE decoder".
    """
    _check_restore(x, mask_token, ids_restore, pos, prefix)
    pos = pos if pos is None else pos.reshape(pos.shape[-2:])
    return _RestoreTokens.apply(x, mask_token.reshape(-1), ids_restore, pos, prefix)


@check.once_a_signature
def _check_restore(x: Tensor, mask_token: Tensor, ids_restore: Tensor, pos: Tensor | None, prefix: int) -> None:
    check.tensor("restore_tokens", "x", x, "B prefix+M D")
    batch, tokens, width = x.shape
    check.tensor("restore_tokens", "ids_restore", ids_restore, "B L", B=batch)
    length = ids_restore.shape[1]
    check.integer("restore_tokens", prefix=prefix)
    check.is_tensor("restore_tokens", "mask_token", mask_token)
    if not 0 <= prefix <= tokens or tokens - prefix > length:
        check.fail("restore_tokens", f"x must have prefix={prefix} to prefix+L={prefix + length} tokens, got {tokens}")
    if mask_token.numel() != width or mask_token.ndim == 0 or mask_token.shape[-1] != width:
        check.fail("restore_tokens", f"mask_token must have shape [D={width}], got {list(mask_token.shape)}")
    check.floating("restore_tokens", x=x, mask_token=mask_token)
    check.index("restore_tokens", ids_restore=ids_restore)
    check.same_device("restore_tokens", x=x, mask_token=mask_token, ids_restore=ids_restore)
    _check_positions("restore_tokens", pos, x, prefix + length, "prefix+L")


@op("restore_tokens_fwd")
def _restore_tokens_fwd(x: Tensor, mask_token: Tensor, ids_restore: Tensor, pos: Tensor | None, prefix: int) -> Tensor:
    batch, tokens, width = x.shape
    check.in_range("restore_tokens", "ids_restore", ids_restore, ids_restore.shape[1])
    dtype = torch.result_type(x, mask_token)
    mask_tokens = mask_token.to(dtype).expand(batch, prefix + ids_restore.shape[1] - tokens, width)
    patches = _gather(torch.cat([x[:, prefix:].to(dtype), mask_tokens], dim=1), ids_restore)
    restored = torch.cat([x[:, :prefix].to(dtype), patches], dim=1)
    return restored if pos is None else restored + pos


@fake(_restore_tokens_fwd)
def _(x, mask_token, ids_restore, pos, prefix):
    dtype = torch.result_type(x, mask_token)
    if pos is not None:
        dtype = torch.promote_types(dtype, pos.dtype)
    return x.new_empty(x.shape[0], prefix + ids_restore.shape[1], x.shape[2], dtype=dtype)


register_triton(_restore_tokens_fwd, lambda: _kernels().restore_tokens_fwd)


@op("restore_tokens_bwd")
def _restore_tokens_bwd(dout: Tensor, ids_restore: Tensor, prefix: int, kept: int) -> tuple[Tensor, Tensor]:
    """(dx [B, prefix + kept, D], dmask_token [D] in float32 or wider)."""
    dpatches = dout[:, prefix:]
    by_rank = torch.zeros_like(dpatches, memory_format=torch.contiguous_format)
    by_rank.scatter_add_(1, ids_restore.unsqueeze(-1).expand_as(dpatches), dpatches)
    dx = torch.cat([dout[:, :prefix], by_rank[:, :kept]], dim=1)
    return dx, by_rank[:, kept:].sum(dim=(0, 1), dtype=acc_dtype(dout))


@fake(_restore_tokens_bwd)
def _(dout, ids_restore, prefix, kept):
    width = dout.shape[2]
    return dout.new_empty(dout.shape[0], prefix + kept, width), dout.new_empty(width, dtype=acc_dtype(dout))


register_triton(_restore_tokens_bwd, lambda: _kernels().restore_tokens_bwd)


class _RestoreTokens(Function):
    @staticmethod
    def forward(ctx, x, mask_token, ids_restore, pos, prefix):
        ctx.save_for_backward(ids_restore)
        ctx.prefix, ctx.kept = prefix, x.shape[1] - prefix
        return _restore_tokens_fwd(x, mask_token, ids_restore, pos, prefix)

    @staticmethod
    @first_order("restore_tokens")
    def backward(ctx, dout):
        (ids_restore,) = ctx.saved_tensors
        needs_x, needs_mask_token, _, needs_pos, _ = ctx.needs_input_grad
        dx = dmask_token = None
        if needs_x or needs_mask_token:
            dx, dmask_token = _restore_tokens_bwd(dout, ids_restore, ctx.prefix, ctx.kept)
        return dx, dmask_token, None, _batch_sum(dout) if needs_pos else None, None


def _check_positions(op_name: str, pos: Tensor | None, x: Tensor, tokens: int, letters: str) -> None:
    if pos is None:
        return
    check.is_tensor(op_name, "pos", pos)
    if pos.shape not in ((tokens, x.shape[2]), (1, tokens, x.shape[2])):
        expected = f"[{letters}={tokens}, D={x.shape[2]}] or [1, {letters}={tokens}, D={x.shape[2]}]"
        check.fail(op_name, f"pos must have shape {expected}, got {list(pos.shape)}")
    check.floating(op_name, pos=pos)
    check.same_device(op_name, x=x, pos=pos)


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    """Rows [B, M, D] of x [B, L, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _batch_sum(dx: Tensor) -> Tensor:
    """Sum over the batch in float32 or wider."""
    return dx.sum(0, dtype=acc_dtype(dx))
