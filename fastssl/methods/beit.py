"""BEiT: predict the codes of masked patches, which a frozen tokenizer computes from the same crop in another size.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022, arXiv:2106.08254. Names in the state dict are those
of the official code; the tokenizer is not in it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastssl.distributed import all_mean
from fastssl.eval.protocols import Finetune
from fastssl.nn.beit import BEIT_SIZES, Beit, beit_, decay_groups, patch_size_for
from fastssl.nn.dvae import load_tokenizer, tokenizer_checksum, tokenizer_images
from fastssl.nn.patch_masks import masked_rows
from fastssl.nn.sharing import shared_copy
from fastssl.nn.visual_tokens import CodeHead, codes_of_pixels, pixels_of_codes
from fastssl.nn.vit import without_mask_token
from fastssl.ops import block_mask, patchify
from fastssl.train.config import Training

OFFICIAL = "beit"  # layout of the reference checkpoint


@dataclass
class Config:
    """BEiT as in its paper (section 3.1) and its code's command for ImageNet-1k: 800 epochs, relative positions."""

    backbone: str = "vit_base"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base or vit_large"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels, divisible by the patch size"""
    tokenizer: str | None = None
    """run of dvae, or weights file of one or of DALL-E's encoder, whose codes are predicted; needed for training"""
    mask_patches: Annotated[int, AT_LEAST_1] = 75
    """largest number of masked patches; blocks often end a few short of it (num_mask_patches)"""
    mask_min: Annotated[int, AT_LEAST_1] = 16
    """smallest number of patches of a block (min_mask_patches_per_block)"""
    relative_bias: Literal["shared", "block", "none"] = "shared"
    """relative positions as a bias of attention: one table for all blocks, one for each, or none"""
    abs_pos: bool = False
    """trained absolute positions (abs_pos_emb)"""
    layer_scale: Annotated[float, NOT_NEGATIVE] = 0.1
    """initial value of LayerScale's factors, 1e-5 for large models; 0 for no LayerScale (layer_scale_init_value)"""
    drop_path: Annotated[float, BELOW_1] = 0.1
    """rate of stochastic depth in the last block"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a training crop covers"""
    jitter: Annotated[tuple[float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4)
    """strengths of brightness, contrast and saturation jitter"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    training: Training = field(
        default_factory=lambda: Training(
            800,
            2048,
            "adamw",
            lr=1.5e-3 / 8,  # 1.5e-3 for 2048 images
            weight_decay=0.05,
            warmup_epochs=10,
            warmup_includes_peak=True,
            lr_end=1e-5 / 8,
            clip_parameter_norm=3.0,
        )
    )

    def __post_init__(self):
        if self.tokenizer is not None:  # a run can be resumed and evaluated from any folder
            self.tokenizer = str(Path(self.tokenizer).expanduser().absolute())

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        return cls(backbone, layer_scale=1e-5 if backbone == "vit_large" else 0.1)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        config = cls("vit_mini", (32, 32), mask_patches=25, mask_min=5, drop_path=0.0, crop_min=0.6, flip_p=0.0)
        config.training = Training(
            30, 64, "adamw", 6e-3, 0.05, warmup_epochs=2, warmup_includes_peak=True, clip_parameter_norm=3.0
        )
        return config

    @property
    def normalisation(self) -> dict[str, tuple[float, float, float]]:
        """That of the encoder's view, which evaluations need also where the tokenizer is gone."""
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    @property
    def augmentation(self) -> Augmentation:
        """The crop for the encoder, and the same crop for the tokenizer: its stride for each patch."""
        if self.tokenizer is None:
            raise ValueError(
                "beit: --tokenizer must name a run of dvae, or a weights file of one or of DALL-E's encoder, got none: "
                "fastssl pretrain dvae trains one"
            )
        tokenizer, patch = tokenizer_images(self.tokenizer), patch_size_for("beit", self.backbone, self.image_size)
        view = View(
            self.image_size,
            crop=(self.crop_min, 1.0),
            interpolation="bicubic",
            jitter=(*self.jitter, 0.0),
            flip_p=self.flip_p,
        )
        height, width = (tokenizer.stride * side // patch for side in self.image_size)
        second = View((height, width), interpolation="lanczos", mean=tokenizer.mean, std=tokenizer.std, same_crop=True)
        return Augmentation((view, second))


def finetuning(backbone: str) -> Finetune:
    """Numbers of fine-tuning at full size: MAE's with twice its learning rate. Source: the code of Bao et al., 2022."""
    return Finetune(lr=1e-3, layer_decay=0.75 if backbone == "vit_large" else 0.65)


def parameter_groups(method: nn.Module) -> list[dict]:
    """Vectors, biases, class token and absolute positions have no weight decay; mask token and bias tables have it. The
    gradient is clipped as a whole."""
    return decay_groups(method, ("cls_token", "pos_embed"))


def build(config: Config) -> "BEiT":
    patch = patch_size_for("beit", config.backbone, config.image_size)
    patches, length = config.mask_patches, math.prod(config.image_size) // patch**2
    if not config.mask_min <= patches < length:
        raise ValueError(
            f"beit: --mask-patches must be at least --mask-min {config.mask_min}, else most masks are empty, and below "
            f"the {length} patches of an image, got {patches}"
        )
    if config.tokenizer is None or not Path(config.tokenizer).exists():
        return BEiT(config)  # which is evaluated without a tokenizer; `augmentation` asks for one for training
    tokenizer = load_tokenizer(config.tokenizer)
    return (BEiT if tokenizer.decoder is None else DecodingBEiT)(config, tokenizer)


class BEiT(Beit):
    """BEiT's ViT with a layer that predicts the codes of masked patches (the paper's equation 2).

    Args:
        config: sizes, masks and drop path.
        tokenizer: see `nn.dvae.load_tokenizer`; None if the method is not trained, which then takes a state dict with
            any number of codes. It is not in the state dict.
    """

    def __init__(self, config: Config, tokenizer: Any = None):
        dim, depth, heads, patch = BEIT_SIZES[config.backbone]
        options: dict[str, Any] = {"relative_bias": config.relative_bias, "abs_pos": config.abs_pos, "fc_norm": False}
        options |= {"init_values": config.layer_scale, "drop_path_rate": config.drop_path, "mask_token": True}
        super().__init__(config.image_size, patch, 3, dim, depth, heads, **options)
        self.length, self.mask_patches, self.mask_min = math.prod(self.grid), config.mask_patches, config.mask_min
        self.__dict__["tokenizer"] = tokenizer  # no child: neither trained nor saved
        self.lm_head = CodeHead(dim, None if tokenizer is None else tokenizer.vocabulary)
        beit_(self.lm_head)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, second = batch.views
        with record_function("tokenizer"):
            codes = self.codes(second)
        return self.loss(images, codes, self.masks(batch.seeds()))

    def before_step(self, progress: float) -> None:
        """BEiT has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """BEiT has no state beside its parameters."""

    def checksums(self) -> dict[str, str]:
        """That of the tokenizer, whose codes a resumed run must have again."""
        return {} if self.tokenizer is None else {"tokenizer": tokenizer_checksum(self.tokenizer)}

    def masks(self, seed: Tensor) -> Tensor:
        """Masks [B, L] bool of seeds [B]: blocks of patches."""
        return block_mask(seed, torch.full_like(seed, self.mask_patches), self.grid, self.mask_min)

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Codes of the patches [B, L] int64 of images [B, 3, stride · rows, stride · columns] for the tokenizer."""
        if self.tokenizer is None:
            raise ValueError("BEiT: tokenizer must not be None for training: name one by Config(tokenizer=…)")
        with torch.autocast(images.device.type, enabled=False):
            return self.tokenizer.codes(images).flatten(1)

    def loss(self, images: Tensor, codes: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of the codes of all masked patches, over all ranks, and the share of codes predicted.

        Each masked patch of the whole batch counts the same, also where ranks mask different numbers.

        Args:
            images: [B, 3, H, W].
            codes: [B, L] int64.
            mask: [B, L] bool, True for masked patches.
        """
        tokens = self.forward_features(images, mask)[:, 1:].flatten(0, 1)
        with record_function("loss"):
            rows = masked_rows(mask, tokens.dtype, len(mask) * self.mask_patches)
            x, targets = tokens.index_select(0, rows.rows), codes.flatten()[rows.rows]
            if rows.counted is not None:
                targets = targets.where(rows.counted, -100)
            share = all_mean(mask.sum()).clamp(min=1)  # masked patches of a rank, on average
            loss = self.lm_head.cross_entropy(x, targets).sum() / share
            right = (self.lm_head.predict(x.detach()) == targets).sum() / mask.sum().clamp(min=1)
        return loss, {"code_accuracy": right}

    @property
    def encoder(self) -> Beit:
        """The ViT without mask token and head, in timm's names; its features are the mean of the patches."""
        return without_mask_token(shared_copy(self, Beit, without=("lm_head",)))

    def _apply(self, fn, recurse: bool = True) -> "BEiT":
        """Moves the tokenizer too, as `to` does with children."""
        if self.tokenizer is not None:
            self.tokenizer._apply(fn)
        return super()._apply(fn, recurse)


class DecodingBEiT(BEiT):
    """BEiT whose tokenizer has a decoder, which makes pixels of predicted codes."""

    norm_pix_loss = False  # these are pixels as they are

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches decoded from predicted codes, and from the tokenizer's where no patch is masked [B, L, P]; and the
        mask [B, L]: 0 kept, 1 removed. The mask follows from the first column of `noise` [B, L], random if None."""
        noise = torch.rand(len(images), 1, device=images.device) if noise is None else noise
        mask = self.masks((noise[:, 0] * 2**24).long())
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        codes = codes_of_pixels(self.tokenizer, images * std + mean, self.grid)
        predicted = self.lm_head.predict(self.forward_features(images, mask)[:, 1:].flatten(0, 1)).view_as(codes)
        pixels = pixels_of_codes(self.tokenizer, predicted.where(mask.view_as(codes), codes), self.img_size)
        return patchify((pixels - mean) / std, self.patch_size), mask.float()
