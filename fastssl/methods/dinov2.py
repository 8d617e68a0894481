"""DINOv2: DINO and iBOT's masked patches, with Sinkhorn–Knopp or centres, KoLeo, LayerScale and registers; ViTs.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2024, arXiv:2304.07193. Names in the state
dict are those of the official training checkpoints.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, BELOW_1, COEFFICIENT, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.distributed import world_size
from fastssl.milestones import MILESTONE
from fastssl.nn import DINOHead, DINOLoss, KoLeoLoss
from fastssl.nn.heads import FactoredLogits
from fastssl.nn.patch_masks import MaskedRows, dinov2_masks, masked_rows, most_masked
from fastssl.nn.patch_network import DINOv2Network, patch_cross_entropy
from fastssl.nn.prototype_losses import centred_targets, mean_logits, teacher_entropy, view_cross_entropy
from fastssl.nn.sinkhorn import sinkhorn_potentials
from fastssl.ops import PrototypeTargets
from fastssl.train.config import Training, check_images_at_once

from . import dino, ibot


@dataclass
class Config(dino.Config):
    """DINOv2's short recipe for ViT-L/16 on ImageNet-1k, of its code. That counts epochs of 1,250 steps; one pass over
    ImageNet in batches of 2,048 is half of such an epoch."""

    backbone: str = "vit_large"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base, vit_large, vit_giant (SwiGLU, patches of 14 pixels)"""
    crop: Annotated[tuple[float, float], SHARE] = (0.32, 1.0)
    """smallest and largest fraction of the image area that a large view covers"""
    local_crop: Annotated[tuple[float, float], SHARE] = (0.05, 0.32)
    """smallest and largest fraction of the image area that a small view covers"""
    blur_p: Annotated[tuple[float, float, float], PROBABILITY] = (0.0, 0.9, 0.5)
    """probability of Gaussian blur: large views, small ones; that of the released weights, the paper has 1.0 0.1 0.5"""
    drop_path: Annotated[float, BELOW_1] = 0.3
    """share of the samples that each branch of the student's blocks leaves out"""
    layer_scale: Annotated[float, NOT_NEGATIVE] = 1e-5
    """initial factors of the residual branches, 0 for none (LayerScale)"""
    registers: Annotated[int, NOT_NEGATIVE] = 0
    """number of registers, tokens without a position that no loss sees"""
    separate_head: bool = False
    """a head for patches of their own, with --patch-prototypes and --patch-bottleneck"""
    patch_prototypes: Annotated[int, AT_LEAST_1] = 65536
    """number of prototypes of patches, with --separate-head"""
    patch_bottleneck: Annotated[int, AT_LEAST_1] = 256
    """width of the unit vectors of patches, with --separate-head"""
    mask_probability: Annotated[float, PROBABILITY] = 0.5
    """share of the large views that are masked"""
    mask_ratio: Annotated[tuple[float, float], COEFFICIENT] = (0.1, 0.5)
    """smallest and largest share of masked patches of a masked view"""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """how the teacher's softmax is kept from collapsing: by a centre, or by Sinkhorn–Knopp over all ranks"""
    koleo_weight: Annotated[float, NOT_NEGATIVE] = 0.1
    """weight of KoLeo, which spreads the class tokens of each large view of a rank's batch"""
    patch_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of the loss of masked patches"""
    warmup_teacher_temp_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 60
    """epochs over which the temperature of the teacher changes along a line, step by step"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.992
    """momentum coefficient of the teacher at the start of training"""
    layer_decay: Annotated[float, SHARE] = 0.9
    """factor of the learning rate from each block to the one before it"""
    patch_embed_lr: Annotated[float, NOT_NEGATIVE] = 0.2
    """further factor of the learning rate of the patch embedding"""
    still_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 2
    """epochs in which the prototypes have the learning rate 0, while moments grow (freeze_last_layer_epochs)"""
    training: Training = field(
        default_factory=lambda: Training(
            200,
            2048,
            "adamw",
            lr=2e-3,  # 4e-3 for 1024 images
            weight_decay=0.04,
            weight_decay_end=0.4,
            warmup_epochs=20,
            warmup_includes_peak=True,
            lr_end=3.5355339e-7,  # 1e-6 for 2048 images
            lr_scaling="sqrt",
            clip_parameter_norm=3.0,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_large") -> "Config":
        """The short recipe. With patches of 14 pixels small views have 98."""
        is_giant = backbone == "vit_giant"
        return cls(backbone, local_size=(98, 98)) if is_giant else cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "adamw", 8e-3, 0.04, warmup_epochs=0.5, clip_parameter_norm=3.0)
        views = {"jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0)}
        crops = {"local_crops": 2, "crop": (0.3, 1.0), "local_crop": (0.3, 0.8)}
        head = {"prototypes": 256, "hidden": 256, "bottleneck": 64, "norm_last_layer": True}
        vit = {"drop_path": 0.0, "layer_scale": 1.0, "layer_decay": 1.0, "patch_embed_lr": 1.0}
        teacher = {"teacher_temp": 0.05, "warmup_teacher_temp_epochs": 0, "ema_momentum": 0.9, "still_epochs": 0}
        losses = {"centering": "sinkhorn_knopp", "koleo_weight": 0.2}
        options = {**views, **crops, **head, **vit, **teacher, **losses}
        return cls("vit_mini", 8, (32, 32), (16, 16), training=training, **options)


linear_probe = dino.linear_probe


def build(config: Config) -> "DINOv2":
    low, high = config.mask_ratio
    if not low <= high < 1:
        raise ValueError(f"dinov2: --mask-ratio must be a range below 1, got {low:g} {high:g}")
    if config.koleo_weight:
        reason = "KoLeo takes the nearest other image of a rank's part of the batch"
        check_images_at_once(config.training, 2 * world_size(), "dinov2", reason)
    options = {"token_std": 1e-6, "drop_path_subset": True, "reg_tokens": config.registers, "no_embed_reg": True}
    options |= {"pos_offset": 0.0, "pos_antialias": True} if config.registers else {}
    backbone = ibot.build_vit(config, "dinov2", init_values=config.layer_scale or None, **options)

    def head(prototypes: int, bottleneck: int) -> DINOHead:
        sizes = {"hidden_dim": config.hidden, "bottleneck_dim": bottleneck}
        return DINOHead(backbone.embed_dim, prototypes, config.bn_in_head, config.norm_last_layer, **sizes)

    patch_head = head(config.patch_prototypes, config.patch_bottleneck) if config.separate_head else None
    cls_head = head(config.prototypes, config.bottleneck)
    return DINOv2(DINOv2Network(backbone, cls_head, patch_head), config)


def parameter_groups(method: "DINOv2") -> list[dict]:
    """Learning rates that decay from block to block; no weight decay for biases, norms and LayerScale's factors."""
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, p in method.student.named_parameters():
        if p.requires_grad:
            key = (*method.scales(name), name.partition(".")[0], "last_layer" in name)
            groups.setdefault(key, []).append(p)
    still = method.config.still_epochs
    return [
        {"params": ps, "lr_scale": lr, "weight_decay_scale": decay, "part": part, "still_epochs": still if last else 0}
        for (lr, decay, part, last), ps in groups.items()
    ]


class DINOv2(ibot.IBOT):
    """Student, teacher, and where there are centres those of class tokens and patches (the paper's section 4).

    Args:
        student: backbone and heads.
        config: temperatures, weights, masks and schedules.
    """

    def __init__(self, student: DINOv2Network, config: Config):
        temps = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs, config.tau
        losses = [DINOLoss(len(layer.weight_v), *temps, config.center_momentum) for layer in student.layers]
        super().__init__(student, config, *losses)
        self.koleo = KoLeoLoss(groups=2)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropies over pairs of views and over masked patches, and KoLeo of both large views, added."""
        large, small = torch.cat(batch.views[:2]), batch.views[2:]
        rows, mask = self.masked_rows(batch)
        teacher = self.teacher(large, None, None, rows.rows)
        student = self.student(large, torch.cat(small) if small else None, mask, rows.rows)
        config, tau = self.config, self.config.tau
        with record_function("loss"):
            targets = self.targets(teacher.cls, self.dino_loss, None)
            patch_targets = self.targets(teacher.patches, self.ibot_patch_loss, rows.counted)
            cls = view_cross_entropy(student.cls, targets, tau, 2)
            patch = patch_cross_entropy(student.patches, patch_targets, tau, rows, len(large))
            loss = cls + config.patch_weight * patch
            koleo = self.koleo(student.tokens) if config.koleo_weight else loss.new_zeros(())
        if self.training and config.centering == "centering":
            self.pending.append((mean_logits(teacher.cls), mean_logits(counted_mean(teacher.patches, rows.counted))))
        metrics = {"cls": cls.detach(), "patch": patch.detach(), "koleo": koleo.detach()}
        metrics |= {"teacher_entropy": teacher_entropy(targets), "std": teacher.cls.features.std(0).mean()}
        return loss + 2 * config.koleo_weight * koleo, metrics

    def targets(self, teacher: FactoredLogits, loss: DINOLoss, counted: Tensor | None) -> PrototypeTargets:
        if self.config.centering == "centering":
            return centred_targets(teacher, self.teacher_temp, loss.center)
        potentials = sinkhorn_potentials(*teacher, self.teacher_temp, 3, counted)
        return PrototypeTargets(*(x.detach() for x in teacher), self.teacher_temp, *potentials)

    def masked_rows(self, batch: Batch) -> tuple[MaskedRows, Tensor]:
        """The masked patches of a batch, and its mask [2B, L]."""
        probability, ratios = self.config.mask_probability, self.config.mask_ratio
        mask = dinov2_masks(batch.seeds(), self.student.backbone.grid, 2, probability, ratios)
        most = most_masked(mask.shape[1], len(mask), probability, ratios)
        return masked_rows(mask, self.dino_loss.center.dtype, most), mask

    def before_step(self, progress: float) -> None:
        """Set the temperature, which changes at every step, and note the momentum coefficient of this step."""
        super().before_step(progress)
        loss, warmup = self.dino_loss, self.dino_loss.warmup_teacher_temp_epochs
        share = min(progress * self.epochs / warmup, 1.0) if warmup else 1.0
        self.teacher_temp.fill_(loss.warmup_teacher_temp + share * (loss.teacher_temp - loss.warmup_teacher_temp))

    def scales(self, name: str) -> tuple[float, float]:
        """Factors of the learning rate and of the weight decay of a parameter of the student."""
        depth, config = len(self.student.backbone.blocks), self.config
        part, _, inner = name.partition(".")
        layer = depth + 1
        if part == "backbone" and not inner.startswith("norm."):
            layer = int(inner.split(".")[1]) + 1 if inner.startswith("blocks.") else 0
        lr = config.layer_decay ** (depth + 1 - layer) * (config.patch_embed_lr if "patch_embed" in name else 1.0)
        return lr, float(not (name.endswith(".bias") or "norm" in name or "gamma" in name))


def counted_mean(logits: FactoredLogits, counted: Tensor | None) -> FactoredLogits:
    """Logits of the mean of the counted rows, or of all: one row."""
    features, prototypes = logits
    if counted is None:
        return FactoredLogits(features.mean(0, keepdim=True), prototypes)
    weights = counted.to(features.dtype)
    return FactoredLogits((weights @ features / weights.sum())[None], prototypes)
