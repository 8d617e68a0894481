"""iBOT: DINO, whose student also predicts the teacher's softmax of patches that are masked for the student; ViTs.

Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", 2022, arXiv:2111.07832.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, SHARE
from fastssl.contract import Batch
from fastssl.eval.protocols import is_resnet
from fastssl.nn import DINOLoss
from fastssl.nn.heads import FactoredLogits
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.patch_masks import MaskedRows, ibot_masks, masked_rows
from fastssl.nn.patch_network import IBOTHead, PatchNetwork, patch_cross_entropy
from fastssl.nn.prototype_losses import centred_targets, mean_logits, teacher_entropy, view_cross_entropy
from fastssl.nn.vit import ViT, without_mask_token
from fastssl.train.config import Training

from . import dino


@dataclass
class Config(dino.Config):
    """iBOT as in its paper (section 4) and the command of its code for ViT-S: 800 epochs, one head for all tokens."""

    backbone: str = "vit_small"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base or vit_large"""
    local_crops: Annotated[int, NOT_NEGATIVE] = 10
    """number of small views"""
    crop: Annotated[tuple[float, float], SHARE] = (0.25, 1.0)
    """smallest and largest fraction of the image area that a large view covers"""
    local_crop: Annotated[tuple[float, float], SHARE] = (0.05, 0.25)
    """smallest and largest fraction of the image area that a small view covers"""
    prototypes: Annotated[int, AT_LEAST_1] = 8192
    """number K of prototypes of class tokens (out_dim of the code)"""
    patch_prototypes: Annotated[int, AT_LEAST_1] = 8192
    """number of prototypes of patches, if they have their own (patch_out_dim)"""
    shared_head: bool = True
    """one layer of prototypes for class tokens and patches; the code's default is two, its commands have one"""
    shared_head_teacher: bool = True
    """one layer of prototypes in the teacher, also where the student has two, as the code does"""
    mask_ratio: Annotated[tuple[float, ...], COEFFICIENT] = (0.0, 0.3)
    """shares of masked patches, one of which each large view draws (pred_ratio)"""
    mask_ratio_var: Annotated[tuple[float, ...], COEFFICIENT] = (0.0, 0.2)
    """for each --mask-ratio, how far at most the drawn share is from it (pred_ratio_var)"""
    mask_shape: Literal["block", "rand"] = "block"
    """mask blocks of patches, or single patches (pred_shape)"""
    warmup_teacher_patch_temp: Annotated[float, POSITIVE] = 0.04
    """temperature of the teacher's patches in the first epoch"""
    teacher_patch_temp: Annotated[float, POSITIVE] = 0.07
    """temperature of the teacher's patches after the warm-up"""
    patch_center_momentum: Annotated[float, COEFFICIENT] = 0.9
    """momentum coefficient of the centre of the teacher's patches (center_momentum2)"""
    cls_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of the loss of class tokens (lambda1)"""
    patch_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of the loss of masked patches (lambda2)"""
    training: Training = field(
        default_factory=lambda: Training(
            800,
            1024,
            "adamw",
            lr=5e-4,
            weight_decay=0.04,
            weight_decay_end=0.4,
            warmup_epochs=10,
            warmup_includes_peak=True,
            lr_end=2.5e-7,  # 1e-6 for 1024 images
            **dino.CLIPPED_AND_FROZEN,
        )
    )

    def __post_init__(self):
        """The code leaves out the gradient of both layers of prototypes in the first epoch."""
        first, second = "student.head.last_layer", "student.head.last_layer2"
        names = self.training.freeze
        if not self.shared_head and first in names and second not in names:
            self.training = dataclasses.replace(self.training, freeze=(*names, second))

    @classmethod
    def paper(cls, backbone: str = "vit_small") -> "Config":
        return cls(backbone, norm_last_layer=backbone not in ("vit_small", "vit_tiny", "vit_mini"))

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "adamw", 4e-3, 0.04, warmup_epochs=1, clip_parameter_norm=3.0)
        views = {"jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0)}
        crops = {"local_crops": 2, "crop": (0.3, 1.0), "local_crop": (0.3, 0.8)}
        head = {"prototypes": 256, "hidden": 256, "bottleneck": 64, "norm_last_layer": True, "drop_path": 0.0}
        temperatures = {"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04, "teacher_patch_temp": 0.07}
        options = {**views, **crops, **head, **temperatures, "ema_momentum": 0.98, "patch_weight": 0.1}
        return cls("vit_mini", 8, (32, 32), (16, 16), training=training, **options)


linear_probe = dino.linear_probe


def build_vit(config: Config, owner: str, **options) -> ViT:
    """The ViT with a mask token."""
    if is_resnet(config.backbone) or ":" in config.backbone:
        raise ValueError(f"{owner}: backbone must be a ViT of ours, whose patches are masked, got {config.backbone!r}")
    return dino.build_backbone(config, owner, mask_token=True, **options)[0]


def build(config: Config) -> "IBOT":
    if len(config.mask_ratio) != len(config.mask_ratio_var) or not config.mask_ratio:
        got = f"{len(config.mask_ratio)} and {len(config.mask_ratio_var)} numbers"
        raise ValueError(f"ibot: --mask-ratio and --mask-ratio-var must have as many numbers, got {got}")
    if not config.shared_head and config.shared_head_teacher and config.prototypes != config.patch_prototypes:
        got = f"{config.prototypes} and {config.patch_prototypes}"
        raise ValueError(f"ibot: --prototypes must be --patch-prototypes with --shared-head-teacher, got {got}")
    if not all(0 <= r - v <= r + v < 1 for r, v in zip(config.mask_ratio, config.mask_ratio_var)):
        got = f"{config.mask_ratio} ± {config.mask_ratio_var}"
        raise ValueError(f"ibot: --mask-ratio ± --mask-ratio-var must be at least 0 and below 1, got {got}")
    backbone = build_vit(config, "ibot")
    own = None if config.shared_head else config.patch_prototypes
    options = {"use_bn": config.bn_in_head, "norm_last_layer": config.norm_last_layer}
    options |= {"hidden_dim": config.hidden, "bottleneck_dim": config.bottleneck}
    student = PatchNetwork(backbone, IBOTHead(backbone.embed_dim, config.prototypes, own, **options))
    warmup, tau = config.warmup_teacher_temp_epochs, config.tau
    cls = DINOLoss(
        config.prototypes, config.warmup_teacher_temp, config.teacher_temp, warmup, tau, config.center_momentum
    )
    temps = config.warmup_teacher_patch_temp, config.teacher_patch_temp
    patch = DINOLoss(len(student.layers[1].weight_v), *temps, warmup, tau, config.patch_center_momentum)
    method = IBOT(student, config, cls, patch)
    if not config.shared_head and config.shared_head_teacher:  # as loading the student into the code's teacher does
        head = method.teacher.module.head
        head.shared = True
        head.last_layer.load_state_dict(head.last_layer2.state_dict())
    return sync_batch_norms(method)


class IBOT(dino.DINO):
    """Student, teacher, and the centres of class tokens and patches (the paper's algorithm 1 with multi-crop).

    Args:
        student: backbone and head.
        config: weights, masks and schedules.
        cls_loss: centre and temperatures of class tokens.
        patch_loss: centre and temperatures of patches.
    """

    def __init__(self, student: PatchNetwork, config: Any, cls_loss: DINOLoss, patch_loss: DINOLoss):
        super().__init__(student, cls_loss, config.ema_momentum, config.ema_momentum_end, config.training.epochs)
        self.config, self.ibot_patch_loss = config, patch_loss
        self.register_buffer("patch_temp", torch.tensor(patch_loss.teacher_temp_at(0)), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy over pairs of views, and over the masked patches of the large views."""
        large, small = torch.cat(batch.views[:2]), batch.views[2:]
        rows, mask = self.masked_rows(batch)
        teacher = self.teacher(large)  # all patches, which the centre needs
        student = self.student(large, torch.cat(small) if small else None, mask, rows.rows)
        tau, config = self.config.tau, self.config
        with record_function("loss"):
            targets = centred_targets(teacher.cls, self.teacher_temp, self.dino_loss.center)
            cls = view_cross_entropy(student.cls, targets, tau, 2)
            features, prototypes = teacher.patches
            masked = FactoredLogits(features[rows.rows], prototypes)
            patch_targets = centred_targets(masked, self.patch_temp, self.ibot_patch_loss.center)
            patch = patch_cross_entropy(student.patches, patch_targets, tau, rows, len(large))
        if self.training:
            self.pending.append((mean_logits(teacher.cls), mean_logits(teacher.patches)))
        metrics = {"cls": cls.detach(), "patch": patch.detach(), "teacher_entropy": teacher_entropy(targets)}
        metrics["std"] = teacher.cls.features.std(0).mean()
        return config.cls_weight * cls + config.patch_weight * patch, metrics

    def masked_rows(self, batch: Batch) -> tuple[MaskedRows, Tensor]:
        """The masked patches of a batch, and its mask [2B, L]."""
        config, grid = self.config, self.student.backbone.grid
        shares = tuple(zip(config.mask_ratio, config.mask_ratio_var))
        mask = ibot_masks(batch.seeds(), grid, 2, shares, config.mask_shape == "block")
        most = len(mask) * int(max(ratio + span for ratio, span in shares) * mask.shape[1])
        return masked_rows(mask, self.dino_loss.center.dtype, most), mask

    def before_step(self, progress: float) -> None:
        """Set temperatures and note the momentum coefficient of this step, as the official code does."""
        super().before_step(progress)
        self.patch_temp.fill_(self.ibot_patch_loss.teacher_temp_at(progress * self.epochs + 1e-9))

    def after_step(self, progress: float) -> None:
        """Update both centres from the teacher's logits of the step, then the teacher."""
        if self.pending:
            cls, patches = zip(*self.pending)
            self.dino_loss.update_center(torch.stack(cls))
            self.ibot_patch_loss.update_center(torch.stack(patches))
        self.pending = []
        self.teacher.update(self.student, self.momentum_of_step)

    @property
    def encoder(self) -> nn.Module:
        """The teacher's backbone without its mask token, as the paper evaluates it; names of timm."""
        return without_mask_token(self.teacher.module.backbone)
