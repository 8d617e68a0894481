"""MAE's masking and loss with the official signatures, and mask noise that is a function of seeds."""

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.ops.dispatch import acc_dtype


def random_masking(
    x: Tensor, mask_ratio: float, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps a random part of the tokens of each sample. Equals the official MAE's method of this name.

    Like that method it draws ``torch.rand(B, L)``, so the same seed gives the same mask; equal noise is ordered by
    index.

    Args:
        x: [B, L, D] any floating dtype. Gradient.
        mask_ratio: fraction removed; ``int(L · (1 − mask_ratio))`` tokens are kept, rounded down: 19 of 196 at 0.9.
        noise: [B, L] floating; the tokens of smallest noise are kept. Uniform random numbers if None.
        generator: random generator of the noise, on x's device; torch's global one if None.

    Returns: kept tokens [B, keep, D] in the order of their noise; mask [B, L] float32, 0 kept, 1 removed; ids_restore
        [B, L] int64.

    Raises:
        ValueError: no token would be kept, or noise has another shape.

    Source: He et al., 2021 (MAE), section 3, "Masking".
    """
    batch, length = x.shape[:2]
    keep = num_kept_tokens("random_masking", length, mask_ratio)
    if noise is None:
        noise = torch.rand(batch, length, device=x.device, generator=generator)
    ops.check.tensor("random_masking", "noise", noise, "B L", B=batch, L=length)
    masking = ops.random_masking(noise, keep)
    return ops.keep_tokens(x, masking.ids_keep), masking.mask, masking.ids_restore


def num_kept_tokens(name: str, length: int, mask_ratio: float, min_masked: int = 0) -> int:
    """Number of tokens that masking keeps, rounded down as in the reference code.

    Args:
        name: function or class that the error names.
        length: number of tokens.
        mask_ratio: fraction removed.
        min_masked: 1 if at least one token must be removed, else 0.

    Raises:
        ValueError: no token would be kept, or none removed with min_masked.
    """
    keep = int(length * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if not 0 < keep <= length - min_masked:
        expected = "keep at least one" + " and mask at least one" * min_masked
        raise ValueError(
            f"{name}: mask_ratio must {expected} of {length} patches, got {mask_ratio}, which keeps {keep}"
        )
    return keep


def seeded_noise(length: int, *key: int | Tensor) -> Tensor:
    """Uniform noise [B, length] float32 in [0, 1) that depends on the key alone: equal on every device and rank.

    ``seeded_noise(196, seed, step, index)`` gives each sample a mask by (seed, step, index), whatever rank and batch
    the sample is in. The generator is SplitMix64, whose seed is mixed from the key's numbers one after another; a value
    has 24 random bits.

    Args:
        length: L.
        key: numbers, at least one of them an int64 tensor [B]; the noise is made on its device.

    Raises:
        ValueError: the key holds no int64 tensor.
    """
    tensors = [part for part in key if isinstance(part, Tensor)]
    if not tensors or tensors[0].dtype != torch.int64:
        raise ValueError("seeded_noise: the key must hold an int64 tensor [B], one number for each sample")
    seeds = tensors[0].new_zeros(1)
    for part in key:
        seeds = _scramble(seeds + part + _GOLDEN)  # the generator's first number with the seed `seeds + part`
    return (_shift(splitmix64(seeds, length), 40) & 0xFFFFFF).float() / 2**24


def splitmix64(seeds: Tensor, length: int) -> Tensor:
    """The first `length` numbers [B, length] of the generator SplitMix64 with each of the seeds [B], all int64.

    The generator's uint64 numbers are given as int64 with the same bits. `data/draws.py` has it in NumPy.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014, figure 15 and its finaliser.
    """
    # & -1 changes nothing: without it torch.compile takes the product for an index, in 32 bits on GPUs (torch 2.11).
    steps = (torch.arange(1, length + 1, device=seeds.device) & -1) * _GOLDEN
    return _scramble(seeds[:, None] + steps)


_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = (  # as signed numbers: int64 multiplication wraps as uint64's does
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _scramble(x: Tensor) -> Tensor:
    """SplitMix64's output function of its state."""
    x = (x ^ _shift(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift(x, 27)) * _MULTIPLIER_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; the operator >> would copy the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


class MaskedPatchLoss(nn.Module):
    """MAE's loss on the masked patches: ``MaskedPatchLoss(p, norm)(imgs, pred, mask)`` equals the official
    ``forward_loss(imgs, pred, mask)``. Neither patches nor a target are materialised, except for a mask that removes
    different numbers of patches from the images.

    Args:
        patch_size: p.
        norm_pix_loss: compare with pixels standardised by their patch's mean and variance (of n − 1, 1e-6 added).
        masked: number of patches removed from each image. If None, they are counted, and the host waits for a GPU;
            torch.compile with fullgraph=True needs the number. Without it the images may differ in their numbers.

    Source: He et al., 2021 (MAE), section 3, "Reconstruction target".
    """

    def __init__(self, patch_size: int, norm_pix_loss: bool = False, masked: int | None = None):
        super().__init__()
        self.patch_size, self.norm_pix_loss, self.masked = patch_size, norm_pix_loss, masked

    def forward(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error, a float32 scalar (float64 for float64 predictions).

        Args:
            imgs: [B, C, H, W].
            pred: [B, L, P] predictions of all patches, or [B, M, P] of the masked ones. Gradient.
            mask: [B, L] floating or bool, 0 kept, 1 removed; or the indices of the removed patches [B, M] int64. Where
                rows remove different numbers of patches, pred must be [B, L, P]; every removed patch counts the same.

        Raises:
            ValueError: a shape does not fit, the mask removes nothing, or rows remove another number than `masked`.
        """
        ids = mask
        if mask.dtype != torch.int64:
            ids, is_ragged = self._ids(mask)
            if is_ragged:
                return self._ragged_loss(imgs, pred, ids, mask)
        elif mask.shape[1] * self.patch_size**2 == imgs.shape[2] * imgs.shape[3]:
            raise ValueError(
                f"MaskedPatchLoss: int64 numbers of removed patches must be fewer than all {mask.shape[1]} patches: a "
                "mask of zeros and ones must be floating or bool"
            )
        if pred.shape[1] != ids.shape[1]:
            pred = ops.keep_tokens(pred, ids)
        return ops.masked_patch_mse(pred, imgs, ids, self.patch_size, self.norm_pix_loss)

    def _ids(self, mask: Tensor) -> tuple[Tensor, bool]:
        """(patches [B, M] that any mask could remove: a row's own are last, whether rows remove different numbers)"""
        masked, is_ragged = self.masked, False
        if masked is None or (mask.device.type == "cpu" and not torch.compiler.is_compiling()):
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError("MaskedPatchLoss: mask must hold zeros and ones alone, 0 kept and 1 removed")
            fewest, most = map(int, torch.stack(mask.sum(1).aminmax()).tolist())
            if masked is not None and not fewest == most == masked:
                got = f"from {fewest} to {most}"
                raise ValueError(f"MaskedPatchLoss: mask must remove masked={masked} patches in each row, got {got}")
            if most == 0:
                raise ValueError("MaskedPatchLoss: mask must remove at least one patch, got zeros alone")
            masked, is_ragged = most, fewest != most
        if masked == mask.shape[1]:  # random_masking keeps at least one patch
            return torch.arange(masked, device=mask.device).expand(mask.shape), is_ragged
        # Kept patches come first, in image order.
        return ops.random_masking(mask.float(), mask.shape[1] - masked).ids_masked, is_ragged

    def _ragged_loss(self, imgs: Tensor, pred: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss where the last patches in each row of ids [B, M] are removed, as many as the row of mask tells."""
        length = mask.shape[1]
        if pred.shape[1] != length:
            expected = f"[B, L={length}, P] where rows of mask remove different numbers"
            raise ValueError(f"MaskedPatchLoss: pred must be {expected}, got pred [B, {pred.shape[1]}, P]")
        dtype = acc_dtype(pred)
        target = ops.keep_patches(imgs.detach(), ids, self.patch_size).to(dtype)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        removed = mask.to(dtype).gather(1, ids)
        errors = (ops.keep_tokens(pred, ids).to(dtype) - target).square().mean(-1)
        return (errors * removed).sum() / removed.sum()
