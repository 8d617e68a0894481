"""DINO: a student predicts a momentum teacher's softmax over prototypes of other views; multi-crop; ViTs and ResNets.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294. Names in the state
dict are those of the official checkpoints.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, BELOW_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View, global_and_local_views
from fastssl.eval.protocols import Official, is_resnet
from fastssl.milestones import MILESTONE
from fastssl.nn import DINOHead, DINOLoss, MomentumEncoder, backbones
from fastssl.nn.crops import MultiCropNetwork
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.prototype_losses import centred_targets, mean_logits, teacher_entropy, view_cross_entropy
from fastssl.nn.vit import DINO_SIZES, dino_vit
from fastssl.train.config import Training
from fastssl.train.schedule import cosine_schedule

OFFICIAL = "dino"  # layout of the reference checkpoint
# clip_grad and freeze_last_layer of the code
CLIPPED_AND_FROZEN: Any = {"clip_parameter_norm": 3.0, "freeze": ("student.head.last_layer",), "freeze_epochs": 1}


@dataclass
class Config:
    """DINO as in its paper (section 3.2) and the full command of its code's README: 300 epochs of a ViT-S/16."""

    backbone: str = "vit_small"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base, vit_large, resnet_mini, resnet18, resnet34, resnet50,
    resnet101, resnet152, timm:NAME or torchvision:NAME"""
    patch_size: Annotated[int | None, AT_LEAST_1] = None
    """side of a ViT's patches in pixels, which divides the sides of all views; by default 16, for vit_mini 4"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the two large views in pixels"""
    local_size: Annotated[tuple[int, int], AT_LEAST_1] = (96, 96)
    """height and width of the small views in pixels"""
    local_crops: Annotated[int, NOT_NEGATIVE] = 8
    """number of small views"""
    crop: Annotated[tuple[float, float], SHARE] = (0.4, 1.0)
    """smallest and largest fraction of the image area that a large view covers"""
    local_crop: Annotated[tuple[float, float], SHARE] = (0.05, 0.4)
    """smallest and largest fraction of the image area that a small view covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: Annotated[tuple[float, float, float], PROBABILITY] = (1.0, 0.1, 0.5)
    """probability of Gaussian blur: first and second large view, small views"""
    solarize_p: Annotated[tuple[float, float], PROBABILITY] = (0.0, 0.2)
    """probability of solarization, one for each large view"""
    prototypes: Annotated[int, AT_LEAST_1] = 65536
    """number K of prototypes, the outputs of the head (out_dim of the code)"""
    hidden: Annotated[int, AT_LEAST_1] = 2048
    """hidden width of the head"""
    bottleneck: Annotated[int, AT_LEAST_1] = 256
    """width of the unit vectors that are compared with the prototypes"""
    bn_in_head: bool = False
    """batch norms in the head (use_bn_in_head of the code)"""
    norm_last_layer: bool = False
    """keep prototypes at unit length; needed for anything larger than ViT-S"""
    drop_path: Annotated[float, BELOW_1] = 0.1
    """rate of stochastic depth in the last block of the student's ViT"""
    tau: Annotated[float, POSITIVE] = 0.1
    """temperature τ of the student"""
    teacher_temp: Annotated[float, POSITIVE] = 0.07
    """temperature of the teacher after its warm-up; above 0.07 training is unstable"""
    warmup_teacher_temp: Annotated[float, POSITIVE] = 0.04
    """temperature of the teacher in the first epoch"""
    warmup_teacher_temp_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 30
    """epochs over which the temperature of the teacher changes along a line"""
    center_momentum: Annotated[float, COEFFICIENT] = 0.9
    """momentum coefficient of the centre, the running mean of the teacher's logits"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.996
    """momentum coefficient of the teacher at the start of training"""
    ema_momentum_end: Annotated[float, COEFFICIENT] = 1.0
    """momentum coefficient of the teacher at the end of training, reached along a cosine"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    zero_init_residual: bool = False
    """start every block of a ResNet as the identity, which the code does not do"""
    training: Training = field(
        default_factory=lambda: Training(
            300,
            1024,
            "adamw",
            lr=5e-4,
            weight_decay=0.04,
            weight_decay_end=0.4,
            warmup_epochs=10,
            warmup_includes_peak=True,
            lr_end=2.5e-7,  # 1e-6 for 1024 images
            **CLIPPED_AND_FROZEN,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_small") -> "Config":
        """ViT: the README's full command. ResNet: its command for ResNet-50, 100 epochs of SGD."""
        if not is_resnet(backbone):
            return cls(backbone, norm_last_layer=backbone not in ("vit_small", "vit_tiny", "vit_mini"))
        schedule = {"warmup_epochs": 10, "warmup_includes_peak": True, "lr_end": 5e-7}
        training = Training(100, 512, "sgd", 0.03, 1e-4, **schedule, **CLIPPED_AND_FROZEN)
        temperature = {"teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0}
        crops = {"crop": (0.14, 1.0), "local_crop": (0.05, 0.14)}
        return cls(backbone, norm_last_layer=True, training=training, **temperature, **crops)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        frozen = CLIPPED_AND_FROZEN | {"freeze_epochs": 0.5}
        training = Training(14, 32, "adamw", 8e-3, 0.04, warmup_epochs=0.5, **frozen)
        views = {"jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0)}
        crops = {"local_crops": 2, "crop": (0.3, 1.0), "local_crop": (0.3, 0.8)}
        head = {"prototypes": 256, "hidden": 256, "bottleneck": 64, "norm_last_layer": True, "drop_path": 0.0}
        teacher = {"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04, "ema_momentum": 0.98}
        options = {**views, **crops, **head, **teacher}
        return cls("vit_mini", 8, (32, 32), (16, 16), training=training, **options)

    @property
    def augmentation(self) -> Augmentation:
        large = View(
            self.image_size,
            crop=self.crop,
            interpolation="bicubic",
            jitter=self.jitter,
            jitter_p=0.8,
            grayscale_p=0.2,
            flip_p=0.5,
        )
        local = (self.local_size, self.local_crop, self.local_crops)
        return global_and_local_views(large, *local, self.blur_p, self.solarize_p)


def linear_probe(backbone: str) -> Official:
    """SGD without weight decay, on the last class token. Source: Caron et al., 2021 (DINO), section 4.1, and its code,
    which takes the class tokens of the last four blocks for ViT-S."""
    return Official(100, 1024, "sgd", 0.001, warmup_epochs=0, standardise=False, interpolation="bilinear")


def build_backbone(config: Config, owner: str = "dino", **options: Any) -> tuple[nn.Module, int]:
    """The encoder with the official code's initial weights, and the width of its features; `options` of `dino_vit`."""
    name = config.backbone
    if is_resnet(name) or ":" in name:
        encoder = backbones.build_backbone(
            name, 1, config.small_images, zero_init_residual=config.zero_init_residual, image_size=config.image_size
        )
        if isinstance(encoder, backbones.ForeignNetwork) and config.local_crops:
            encoder.check(config.local_size, "--local-size")
        width, encoder.fc = encoder.fc.in_features, nn.Identity()
        return encoder, width
    if name not in DINO_SIZES:
        names = ", ".join((*DINO_SIZES, *backbones.NAMES))
        raise ValueError(f"{owner}: unknown backbone {name!r}, there are {names}, timm:NAME and torchvision:NAME")
    patch = config.patch_size or DINO_SIZES[name][-1]
    for flag, size in (("--image-size", config.image_size), ("--local-size", config.local_size)):
        if size[0] % patch or size[1] % patch:
            got = f"got {size[0]} {size[1]}"
            raise ValueError(f"{owner}: {flag} must be divisible by the patch size {patch} of {name}, {got}")
    vit = dino_vit(name, config.image_size, patch, config.drop_path, **options)
    return vit, vit.embed_dim


def build(config: Config) -> "DINO":
    backbone, width = build_backbone(config)
    sizes = {"hidden_dim": config.hidden, "bottleneck_dim": config.bottleneck}
    head = DINOHead(width, config.prototypes, config.bn_in_head, config.norm_last_layer, **sizes)
    temperatures = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs, config.tau
    criterion = DINOLoss(config.prototypes, *temperatures, config.center_momentum)
    momentum, epochs = (config.ema_momentum, config.ema_momentum_end), config.training.epochs
    return sync_batch_norms(DINO(MultiCropNetwork(backbone, head), criterion, *momentum, epochs))


class DINO(nn.Module):
    """Student, teacher and centre (the paper's algorithm 1 with multi-crop).

    Args:
        student: backbone and head.
        criterion: loss with the centre of the teacher's logits.
        momentum: momentum coefficient of the teacher at the start of training.
        momentum_end: momentum coefficient at the end of training.
        epochs: epochs of the run, for the temperature of the teacher.
    """

    def __init__(
        self, student: MultiCropNetwork, criterion: DINOLoss, momentum: float, momentum_end: float, epochs: int
    ):
        super().__init__()
        self.momentum, self.momentum_end, self.epochs = momentum, momentum_end, epochs
        self.student = student
        self.teacher = MomentumEncoder(student, momentum, drop_path=False)
        self.dino_loss = criterion
        self.register_buffer("teacher_temp", torch.tensor(criterion.teacher_temp_at(0)), persistent=False)
        self.momentum_of_step, self.pending = momentum, []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy over pairs of views. Where entropy is 0 or ln K, or std 0, training has collapsed."""
        teacher = self.teacher(batch.views[:2])
        student = self.student(batch.views)
        with record_function("loss"):
            targets = centred_targets(teacher, self.teacher_temp, self.dino_loss.center)
            loss = view_cross_entropy(student, targets, self.dino_loss.student_temp, 2)
        if self.training:
            self.pending.append(mean_logits(teacher))
        entropy, std = teacher_entropy(targets), teacher.features.std(0).mean()
        return loss, {"teacher_entropy": entropy, "kl": loss.detach() - entropy, "std": std}

    def before_step(self, progress: float) -> None:
        """Set the temperature and note the momentum coefficient of this step, as the official code does."""
        self.teacher_temp.fill_(self.dino_loss.teacher_temp_at(progress * self.epochs + 1e-9))
        self.momentum_of_step = self.momentum_at(progress)

    def after_step(self, progress: float) -> None:
        """Update the centre from the teacher's logits of the step, then the teacher."""
        self.dino_loss.update_center(torch.stack(self.pending))
        self.pending = []
        self.teacher.update(self.student, self.momentum_of_step)

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the teacher's update at `progress`."""
        return cosine_schedule(self.momentum, self.momentum_end, progress)

    @property
    def encoder(self) -> nn.Module:
        """The teacher's backbone, which the paper evaluates; names of timm or torchvision."""
        return self.teacher.module.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the teacher's backbone [B, F]: the class token of a ViT."""
        return self.encoder(images)
