"""MAE's masking and loss with the official signatures, and masks that depend on seeds alone."""

import torch
from torch import Tensor, nn

from fastssl import ops


def random_masking(
    x: Tensor, mask_ratio: float, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps a random part of the tokens of each sample: the official MAE's method of this name.

    Draws ``torch.rand(B, L)`` as that does, so the same seed gives the same mask; equal noise is ordered by index.

    Args:
        x: [B, L, D] any floating dtype. Gradient.
        mask_ratio: share removed; ``int(L · (1 − mask_ratio))`` tokens stay, which cuts: 19 of 196 at ratio 0.9.
        noise: [B, L] floating, smallest stays; drawn if None.
        generator: draws the noise, on x's device; torch's global one if None.

    Returns: (kept tokens [B, keep, D] in noise order, mask [B, L] float32: 0 kept, 1 removed, ids_restore [B, L]
        int64).

    Raises:
        ValueError: nothing would stay, or noise has another shape.

    Source: He et al., 2021 (MAE), section 3, "Masking".
    """
    batch, length = x.shape[:2]
    keep = kept_tokens("random_masking", length, mask_ratio)
    if noise is None:
        noise = torch.rand(batch, length, device=x.device, generator=generator)
    ops.check.tensor("random_masking", "noise", noise, "B L", B=batch, L=length)
    masking = ops.random_masking(noise, keep)
    return ops.keep_tokens(x, masking.ids_keep), masking.mask, masking.ids_restore


def kept_tokens(name: str, length: int, mask_ratio: float, fewest_masked: int = 0) -> int:
    """Tokens that stay: the reference cuts, it does not round. Refuses to keep none, or to mask too few."""
    keep = int(length * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if not 0 < keep <= length - fewest_masked:
        wanted = "keep at least one" + " and mask at least one" * fewest_masked
        came = f"{mask_ratio}, which keeps {keep}"
        raise ValueError(f"{name}: mask_ratio must {wanted} of {length} patches, got {came}")
    return keep


def seeded_noise(length: int, *key: int | Tensor) -> Tensor:
    """Noise [B, length] float32 in [0, 1) that depends on the key alone: the same on every device and rank.

    ``seeded_noise(196, seed, step, index)`` masks each sample by (seed, step, sample), however the samples are dealt
    out to ranks and batches. SplitMix64 in int64 arithmetic, 24 random bits a value.

    Args:
        length: L.
        key: numbers, and at least one int64 tensor [B], on whose device the noise is made.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014, figure 15 and its finaliser.
    """
    tensors = [part for part in key if isinstance(part, Tensor)]
    if not tensors or tensors[0].dtype != torch.int64:
        raise ValueError("seeded_noise: the key must hold an int64 tensor [B], one number for each sample")
    state = tensors[0].new_zeros(1)
    for part in key:
        state = _finalise(state + part + _GOLDEN)
    # & -1 changes nothing: without it torch.compile takes the product for an index, in 32 bits on GPUs (torch 2.11).
    steps = (torch.arange(1, length + 1, device=state.device) & -1) * _GOLDEN
    return (_shift(_finalise(state[:, None] + steps), 40) & 0xFFFFFF).float() / 2**24


_GOLDEN, _FIRST, _SECOND = (  # SplitMix64's constants as signed numbers: int64 multiplication wraps as uint64's does
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shift(x: Tensor, bits: int) -> Tensor:
    """The logical right shift: int64's own copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


class MaskedPatchLoss(nn.Module):
    """MAE's loss on the masked patches: ``MaskedPatchLoss(p, norm)(imgs, pred, mask)`` is the official
    ``forward_loss(imgs, pred, mask)``. No patches are cut out and no target is kept.

    Args:
        patch_size: p.
        norm_pix_loss: compare with each patch's own standardised pixels (variance of n − 1, 1e-6 added).
        masked: patches removed of each image. If None they are counted, for which a GPU's host waits; torch.compile
            in one graph needs it.

    Source: He et al., 2021 (MAE), section 3, "Reconstruction target".
    """

    def __init__(self, patch_size: int, norm_pix_loss: bool = False, masked: int | None = None):
        super().__init__()
        self.patch_size, self.norm_pix_loss, self.masked = patch_size, norm_pix_loss, masked

    def forward(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """The mean squared error, a float32 scalar (float64 for float64 predictions).

        Args:
            imgs: [B, C, H, W].
            pred: [B, L, P] predictions of all patches, or [B, M, P] of those that are masked. Gradient.
            mask: [B, L] floating or bool, 0 kept, 1 removed, the same number in each row; or the removed patches'
                numbers [B, M] int64.

        Raises:
            ValueError: a shape does not fit, or the rows of mask remove different numbers.
        """
        ids = mask
        if mask.dtype != torch.int64:
            ids = self._ids(mask)
        elif mask.shape[1] * self.patch_size**2 == imgs.shape[2] * imgs.shape[3]:
            raise ValueError(
                f"MaskedPatchLoss: int64 numbers of removed patches must be fewer than all {mask.shape[1]} patches: a "
                "mask of zeros and ones must be floating or bool"
            )
        if pred.shape[1] != ids.shape[1]:
            pred = ops.keep_tokens(pred, ids)
        return ops.masked_patch_mse(pred, imgs, ids, self.patch_size, self.norm_pix_loss)

    def _ids(self, mask: Tensor) -> Tensor:
        masked = self.masked
        if masked is None or (mask.device.type == "cpu" and not torch.compiler.is_compiling()):
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError("MaskedPatchLoss: mask must hold zeros and ones alone, 0 kept and 1 removed")
            fewest, most = map(int, torch.stack(mask.sum(1).aminmax()).tolist())
            if fewest != most or masked not in (None, most):
                wanted = "the same number" if masked is None else f"masked={masked}"
                came = f"from {fewest} to {most}"
                raise ValueError(f"MaskedPatchLoss: mask must remove {wanted} in each row, got {came}")
            masked = most
        return ops.random_masking(mask.float(), mask.shape[1] - masked).ids_masked  # zeros come first, by place
