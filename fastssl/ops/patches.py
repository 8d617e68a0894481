"""Images as patches: cutting, assembling, gathering only the kept ones, and MAE's loss on the masked ones."""

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import patches

    return patches


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images into patches, a row of pixel values each.

    Equals ``images.reshape(B, C, H//p, p, W//p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, L, p*p*C)``: patches in
    row-major order, inside a patch row, column and channel last, as in the reference implementation.

    Args:
        images: [B, C, H, W] any dtype (on a GPU of up to 8 bytes an element) and memory format; H and W divisible by
            `patch`, not necessarily equal.
        patch: p, side of a patch in pixels.

    Returns: [B, L, P] of the same dtype, L = (H/p)·(W/p), P = p·p·C. Gradient to images.

    Raises:
        ValueError: images is not [B, C, H, W], or H or W is not divisible by patch.

    Source: He et al., 2021 (MAE), section 3.
    """
    _check_images("patchify", images, patch)
    return _Patchify.apply(images, patch)


@op("patchify")
def _patchify(images: Tensor, patch: int) -> Tensor:
    grid = _grid_view(images, patch)
    batch, rows, columns, _, _, channels = grid.shape
    return grid.clone(memory_format=torch.contiguous_format).view(batch, rows * columns, patch * patch * channels)


@fake(_patchify)
def _(images, patch):
    batch, channels, height, width = images.shape
    return images.new_empty(batch, (height // patch) * (width // patch), patch * patch * channels)


register_triton(_patchify, lambda: _kernels().patchify)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Assembles images from patches: the inverse of `patchify`.

    Args:
        patches: [B, L, P] any dtype, L = (height/p)·(width/p), P = p·p·C.
        patch: p, side of a patch in pixels.
        height, width: sides of the images in pixels, divisible by p.

    Returns: [B, C, height, width] of the same dtype, contiguous. Gradient to patches.

    Raises:
        ValueError: height or width is not divisible by patch, or the shape of patches does not fit them.
    """
    _check_sides("unpatchify", height, width, patch)
    count = (height // patch) * (width // patch)
    check.tensor("unpatchify", "patches", patches, "B L P", L=count)
    if patches.shape[2] % patch**2 or patches.shape[2] == 0:
        check.fail("unpatchify", f"patches must have P divisible by patch² = {patch**2}, got P={patches.shape[2]}")
    return _Unpatchify.apply(patches, patch, height, width)


@op("unpatchify")
def _unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    batch, _, values = patches.shape
    grid = patches.reshape(batch, height // patch, width // patch, patch, patch, values // patch**2)
    images = grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, values // patch**2, height, width)
    return images.clone(memory_format=torch.contiguous_format)


@fake(_unpatchify)
def _(patches, patch, height, width):
    return patches.new_empty(patches.shape[0], patches.shape[2] // patch**2, height, width)


register_triton(_unpatchify, lambda: _kernels().unpatchify)


class _Patchify(Function):
    """Each of `patchify` and `unpatchify` is the gradient of the other, so derivatives of any order work."""

    @staticmethod
    def forward(ctx, images, patch):
        ctx.patch, ctx.sides = patch, images.shape[2:]
        return _patchify(images, patch)

    @staticmethod
    def backward(ctx, dpatches):
        return _Unpatchify.apply(dpatches, ctx.patch, *ctx.sides), None


class _Unpatchify(Function):
    @staticmethod
    def forward(ctx, patches, patch, height, width):
        ctx.patch = patch
        return _unpatchify(patches, patch, height, width)

    @staticmethod
    def backward(ctx, dimages):
        return _Patchify.apply(dimages, ctx.patch), None, None, None


def keep_patches(images: Tensor, ids_keep: Tensor, patch: int) -> Tensor:
    """Gathers the pixels of the kept patches, for masking **before** the patch embedding.

    Equals ``patchify(images, patch).gather(1, ids_keep[..., None].expand(-1, -1, P))``. At mask ratio 0.75 the patch
    embedding that follows costs a quarter of embedding all patches and dropping the masked ones.

    Args:
        images: [B, C, H, W] any dtype and memory format; H and W divisible by `patch`.
        ids_keep: [B, M] int64 patch numbers in row-major order. Pixels of a repeated one get the sum of its gradients,
            on CPUs; on GPUs the gradient requires ids without duplicates in a row.
        patch: p, side of a patch in pixels.

    Returns: [B, M, P] of the images' dtype, P = p·p·C, channel last inside a patch. Gradient to images.

    Raises:
        ValueError: a shape or device does not fit. TypeError: ids_keep is not int64.
    """
    _check_keep(images, ids_keep, patch)
    return _KeepPatches.apply(images, ids_keep, patch)


@check.once_a_signature
def _check_keep(images: Tensor, ids_keep: Tensor, patch: int) -> None:
    _check_images("keep_patches", images, patch)
    check.tensor("keep_patches", "ids_keep", ids_keep, "B M", B=images.shape[0])
    check.index("keep_patches", ids_keep=ids_keep)
    check.same_device("keep_patches", images=images, ids_keep=ids_keep)


@op("keep_patches_fwd")
def _keep_patches_fwd(images: Tensor, ids_keep: Tensor, patch: int) -> Tensor:
    grid = _grid_view(images, patch)
    columns = grid.shape[2]
    check.in_range("keep_patches", "ids_keep", ids_keep, grid.shape[1] * columns)
    samples = torch.arange(grid.shape[0], device=images.device).unsqueeze(1)
    kept = grid[samples, ids_keep // columns, ids_keep % columns]  # [B, M, p, p, C]: only these pixels are read
    return kept.reshape(*ids_keep.shape, patch * patch * images.shape[1]).contiguous()


@fake(_keep_patches_fwd)
def _(images, ids_keep, patch):
    return images.new_empty(*ids_keep.shape, patch * patch * images.shape[1])


register_triton(_keep_patches_fwd, lambda: _kernels().keep_patches_fwd)


@op("keep_patches_bwd")
def _keep_patches_bwd(dkept: Tensor, ids_keep: Tensor, patch: int, height: int, width: int) -> Tensor:
    dpatches = dkept.new_zeros(dkept.shape[0], (height // patch) * (width // patch), dkept.shape[2])
    dpatches.scatter_add_(1, ids_keep.unsqueeze(-1).expand_as(dkept), dkept)
    return _unpatchify(dpatches, patch, height, width)


@fake(_keep_patches_bwd)
def _(dkept, ids_keep, patch, height, width):
    return dkept.new_empty(dkept.shape[0], dkept.shape[2] // patch**2, height, width)


register_triton(_keep_patches_bwd, lambda: _kernels().keep_patches_bwd)


class _KeepPatches(Function):
    @staticmethod
    def forward(ctx, images, ids_keep, patch):
        ctx.patch, ctx.sides = patch, images.shape[2:]
        ctx.save_for_backward(ids_keep)
        return _keep_patches_fwd(images, ids_keep, patch)

    @staticmethod
    @first_order("keep_patches")
    def backward(ctx, dkept):
        return _keep_patches_bwd(dkept, *ctx.saved_tensors, ctx.patch, *ctx.sides), None, None


def masked_patch_mse(pred: Tensor, images: Tensor, ids: Tensor, patch: int, norm_pix: bool = False) -> Tensor:
    """MAE's loss: mean squared error between predictions and the pixels of the patches `ids`.

    Equals ``(pred - target).square().mean()`` with ``target = keep_patches(images, ids, patch)``, for `norm_pix`
    normalised to ``(target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()`` (unbiased
    variance). This is the reference's mean over masked patches, since every sample has M of them.

    Args:
        pred: [B, M, P] any floating dtype, predictions for the patches `ids` alone.
        images: [B, C, H, W] any dtype and memory format, as the input of the model. No gradient to images.
        ids: [B, M] int64 patch numbers, M ≥ 1; `Masking.ids_masked` in MAE.
        patch: p, side of a patch in pixels.
        norm_pix: normalise the pixels of each patch by their mean and variance.

    Returns: scalar float32 (float64 for a float64 pred), computed in that dtype. Gradient to pred, in its dtype,
        computed in the forward pass.

    Raises:
        ValueError: a shape or device does not fit. TypeError: ids is not int64, or pred is not floating.

    Memory: the gradient [B, M, P] in float32 or wider, nothing where pred needs no gradient.

    Source: He et al., 2021 (MAE), section 3, "Reconstruction target"; unbiased variance and 1e-6 as in its code.
    """
    _check_loss(pred, images, ids, patch)
    with_grad = torch.is_grad_enabled() and pred.requires_grad
    return _MaskedPatchMSE.apply(pred, images.detach(), ids, patch, norm_pix, with_grad)


@check.once_a_signature
def _check_loss(pred: Tensor, images: Tensor, ids: Tensor, patch: int) -> None:
    _check_images("masked_patch_mse", images, patch)
    batch, channels = images.shape[:2]
    check.tensor("masked_patch_mse", "ids", ids, "B M", B=batch)
    values = patch * patch * channels
    check.tensor("masked_patch_mse", "pred", pred, "B M P", B=batch, M=ids.shape[1], P=values)
    check.floating("masked_patch_mse", pred=pred)
    check.index("masked_patch_mse", ids=ids)
    check.same_device("masked_patch_mse", pred=pred, images=images, ids=ids)
    if ids.shape[1] == 0:
        check.fail("masked_patch_mse", f"ids must have at least one patch a sample, got shape {list(ids.shape)}")


@op("masked_patch_mse_fwd")
def _masked_patch_mse_fwd(
    pred: Tensor, images: Tensor, ids: Tensor, patch: int, norm_pix: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """(loss, dpred in the loss's dtype for an upstream gradient of 1; an empty dpred without `with_grad`)."""
    dtype = acc_dtype(pred)
    target = _keep_patches_fwd(images, ids, patch).to(dtype)
    if norm_pix:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    difference = pred.to(dtype) - target
    # In float32 or wider, because without a loss scale 2 / numel is too small for float16.
    dpred = difference * (2 / max(1, difference.numel())) if with_grad else difference.new_empty(0)
    return difference.square().mean(), dpred


@fake(_masked_patch_mse_fwd)
def _(pred, images, ids, patch, norm_pix, with_grad):
    loss = pred.new_empty((), dtype=acc_dtype(pred))
    return loss, pred.new_empty(pred.shape if with_grad else 0, dtype=loss.dtype)


register_triton(_masked_patch_mse_fwd, lambda: _kernels().masked_patch_mse_fwd)


class _MaskedPatchMSE(Function):
    @staticmethod
    def forward(ctx, pred, images, ids, patch, norm_pix, with_grad):
        loss, dpred = _masked_patch_mse_fwd(pred, images, ids, patch, norm_pix, with_grad)
        ctx.save_for_backward(dpred)
        return loss

    @staticmethod
    @first_order("masked_patch_mse")
    def backward(ctx, dloss):
        (dpred,) = ctx.saved_tensors
        return dpred * dloss, None, None, None, None, None


def _grid_view(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] as [B, H/p, W/p, p, p, C]; a view where the strides allow it."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1)


@check.once_a_signature
def _check_images(op_name: str, images: Tensor, patch: int) -> None:
    check.tensor(op_name, "images", images, "B C H W")
    _check_sides(op_name, images.shape[2], images.shape[3], patch)


def _check_sides(op_name: str, height: int, width: int, patch: int) -> None:
    check.integer(op_name, patch=patch, height=height, width=width)
    if patch < 1 or height % patch or width % patch or not height or not width:
        check.fail(op_name, f"height and width must be divisible by patch={patch}, got {height}×{width}")
