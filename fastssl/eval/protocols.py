"""Optimizers, schedules and augmentations of linear probing and fine-tuning, as plain values.

Learning rates are for a batch of 256 images and scale with the batch size.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from fastssl.bounds import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, check_ranges
from fastssl.milestones import MILESTONE, check_milestones
from fastssl.train.config import Training


def is_resnet(name: str) -> bool:
    """Whether a backbone is a ResNet, ours or another library's: it then has the papers' numbers for ResNets."""
    return name.rpartition(":")[2].startswith("resnet")


class Setting(NamedTuple):
    """Optimizer and learning rate of a linear classifier."""

    optimizer: str
    value: float  # learning rate; for lbfgs the weight of the penalty ½‖w‖²

    def __str__(self) -> str:
        return f"{self.optimizer}, {'l2' if self.optimizer == 'lbfgs' else 'lr'} {self.value:g}"


GRID = {  # values to try, around the best for features of unit variance; the first is used without validation images
    "lbfgs": (1e-3, 1e-2, 1e-1, 1e-4, 1e-5, 1e-6),
    "sgd": (0.1, 0.01, 0.03, 0.3, 1.0, 3.0),
    "lars": (30.0, 3.0, 10.0, 100.0),
}


@dataclass
class Sweep:
    """A linear classifier on features extracted once. Several optimizers and learning rates are trained on nine tenths
    of the training features; the best on the remaining tenth is trained on all and evaluated on the held-out split."""

    optimizers: tuple[Literal["lbfgs", "sgd", "lars"], ...] = ("lbfgs", "sgd", "lars")
    """optimizers to try: lbfgs (with several weights of the L2 penalty), sgd, lars"""
    lrs: Annotated[tuple[float, ...], POSITIVE] = ()
    """learning rates of sgd and lars to try, for a batch of 256; several decades by default"""
    epochs: Annotated[int, AT_LEAST_1] = 100
    """passes over the features; lbfgs takes at most twice as many iterations"""
    batch_size: Annotated[int, AT_LEAST_1] = 256
    """features per step of sgd and lars"""
    blocks: Annotated[tuple[int, ...], AT_LEAST_1] = ()
    """numbers of a ViT's last blocks whose class tokens are tried as features, with and without the mean of the patch
    tokens: 1 4 as in DINOv2; by default the method's own features"""

    @property
    def settings(self) -> list[Setting]:
        """All combinations of optimizer and learning rate to try."""
        tried = {name: self.lrs if self.lrs and name != "lbfgs" else values for name, values in GRID.items()}
        return [Setting(name, value) for name in dict.fromkeys(self.optimizers) for value in tried[name]]


@dataclass
class Official:
    """The linear probe of the method's paper: each step passes newly augmented images through the frozen encoder."""

    epochs: Annotated[int, AT_LEAST_1] = 90
    """passes over the images"""
    batch_size: Annotated[int, AT_LEAST_1] = 16384
    """images per step"""
    optimizer: Literal["sgd", "lars", "larc"] = "lars"
    """optimizer: sgd, lars or larc"""
    lr: Annotated[float, POSITIVE] = 0.1
    """learning rate for a batch of 256"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """weight decay, added to the gradient"""
    warmup_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 10
    """epochs over which the learning rate rises from 0"""
    lr_by_epoch: bool = False
    """change the learning rate once per epoch instead of every step"""
    lr_drops: Annotated[tuple[float, ...], NOT_NEGATIVE, MILESTONE] = ()
    """epochs at which the learning rate drops to a tenth, instead of a cosine schedule"""
    standardise: bool = True
    """batch norm without weights (eps 1e-6) before the linear layer"""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """interpolation of the training crops; test images are resized bicubically"""
    at_once: Annotated[int, AT_LEAST_1] = 512
    """largest number of images in one pass through encoder and batch norm, by default as per GPU in the official run"""

    @property
    def training(self) -> Training:
        return Training(
            self.epochs,
            self.batch_size,
            self.optimizer,
            self.lr,
            self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            lr_by_epoch=self.lr_by_epoch,
            lr_drops=self.lr_drops,
        )

    @property
    def pieces(self) -> int:
        """Number of equal parts that the images of a step are divided into."""
        batch = self.batch_size
        return next(n for n in range(-(-batch // self.at_once), batch + 1) if batch % n == 0)


@dataclass
class Finetune:
    """End-to-end fine-tuning. The classifier takes the mean of a ViT's patch tokens, or a ResNet's pooled features."""

    epochs: Annotated[int, AT_LEAST_1] = 100
    """passes over the images"""
    batch_size: Annotated[int, AT_LEAST_1] = 1024
    """images per step"""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """micro-batches per step: less memory for the same step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """optimizer: adamw (betas 0.9, 0.999) or sgd (momentum 0.9)"""
    lr: Annotated[float, POSITIVE] = 5e-4
    """learning rate for a batch of 256"""
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    """learning rate at the end of the cosine schedule"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """weight decay, decoupled for adamw, added to the gradient for sgd; not of biases, norms, positions, class token"""
    warmup_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 5
    """epochs over which the learning rate rises from 0"""
    lr_drops: Annotated[tuple[float, ...], NOT_NEGATIVE, MILESTONE] = ()
    """epochs at which the learning rate drops to a tenth, instead of a cosine schedule"""
    layer_decay: Annotated[float, SHARE] = 0.65
    """learning rate of a ViT's block relative to that of the next block"""
    head_lr: Annotated[float, POSITIVE] = 1.0
    """learning rate of the classifier relative to that of the last block"""
    drop_path: Annotated[float, BELOW_1] = 0.1
    """largest probability of skipping a block of a ViT (stochastic depth)"""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.8
    """mixup alpha, 0 to turn it off"""
    cutmix: Annotated[float, NOT_NEGATIVE] = 1.0
    """cutmix alpha, 0 to turn it off"""
    label_smoothing: Annotated[float, BELOW_1] = 0.1
    """label smoothing: share of the label spread over all classes"""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation, or none"""
    erasing: Annotated[float, PROBABILITY] = 0.25
    """probability of random erasing"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest area of a random crop, as a share of the image"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """precision: fp32, or bf16 for autocast"""

    @classmethod
    def paper(cls, backbone: str) -> "Finetune":
        """Numbers of the papers.

        Source: ViT: He et al., 2021 (MAE), appendix A.1, table 9, and its code's FINETUNE.md; smaller ViTs have those
            of ViT-B. ResNet: Caron et al., 2020 (SwAV), section 4.1 and its code for few labels, with learning rates of
            0.01 and of 0.2 for the classifier, which drop to a tenth here and to a fifth there.
        """
        if is_resnet(backbone):
            return cls(
                20,
                256,
                optimizer="sgd",
                lr=0.01,
                min_lr=0.0,
                weight_decay=0.0,
                warmup_epochs=0,
                lr_drops=(12, 16),
                layer_decay=1.0,
                head_lr=20.0,
                drop_path=0.0,
                mixup=0.0,
                cutmix=0.0,
                label_smoothing=0.0,
                randaugment="none",
                erasing=0.0,
            )
        if backbone in ("vit_large", "vit_huge"):
            return cls(50, lr=1e-3, layer_decay=0.75, drop_path=0.3 if backbone == "vit_huge" else 0.2)
        return cls()

    @classmethod
    def small(cls, backbone: str) -> "Finetune":
        """For images of at most 64 pixels and minutes on a laptop; not from a paper. No flips, which change digits."""
        light = {"label_smoothing": 0.1, "randaugment": "none", "erasing": 0.0, "crop_min": 0.6, "flip_p": 0.0}
        if is_resnet(backbone):
            return cls(
                20,
                64,
                optimizer="sgd",
                lr=0.3,
                weight_decay=5e-4,
                warmup_epochs=1,
                layer_decay=1.0,
                drop_path=0.0,
                mixup=0.2,
                cutmix=0.0,
                **light,
            )
        return cls(20, 64, lr=1e-2, warmup_epochs=2, layer_decay=0.75, drop_path=0.1, mixup=0.2, cutmix=0.0, **light)

    @property
    def training(self) -> Training:
        return Training(
            self.epochs,
            self.batch_size,
            self.optimizer,
            self.lr,
            self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            lr_drops=self.lr_drops,
        )


@dataclass
class FewLabels:
    """Accuracy with few labels: the pretrained encoder by kNN, linear and fine-tuned, beside raw pixels and the same
    network trained from scratch, on the same labels and held-out images, for several draws of the labels.

    Fine-tuning and training from scratch differ in their initial weights, learning rate and layer decay alone."""

    counts: Annotated[tuple[int, ...], AT_LEAST_1] = (10, 100, 1000)
    """numbers of labels, as many of each class; those that the data cannot have are left out"""
    draws: Annotated[int, AT_LEAST_1] = 3
    """draws of the labels, of which mean and standard deviation are shown"""
    steps: Annotated[int, AT_LEAST_1] = 150
    """steps of fine-tuning and of training from scratch"""
    batch_size: Annotated[int, AT_LEAST_1] = 32
    """images per step, at most the number of labels"""
    lr: Annotated[float, POSITIVE] = 5e-3
    """largest learning rate of fine-tuning (AdamW)"""
    scratch_lr: Annotated[float, POSITIVE] = 1e-2
    """largest learning rate of training from scratch (AdamW)"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """decoupled weight decay, not of biases, norms, positions, class token"""
    layer_decay: Annotated[float, SHARE] = 1.0
    """learning rate of a ViT's block relative to that of the next block, in fine-tuning"""
    crop_min: Annotated[float, SHARE] = 0.6
    """smallest area of a random crop, as a share of the image"""
    flip_p: Annotated[float, PROBABILITY] = 0.0
    """probability of a horizontal flip"""
    l2: Annotated[float, POSITIVE] = 1e-3
    """weight of the L2 penalty of the linear classifiers"""

    @classmethod
    def of_backbone(cls, backbone: str) -> "FewLabels":
        """Numbers for a backbone, by the sweep of `benchmarks/few_labels.py` with small networks."""
        return cls() if is_resnet(backbone) else cls(lr=4e-3, scratch_lr=1e-3, layer_decay=0.75)


def check_protocol(numbers: Sweep | Official | Finetune | FewLabels) -> None:
    """Checks the numbers of a protocol, each by itself and against the others.

    Raises:
        ValueError: a number is out of range; one sentence with the flag, its range, and the value.
    """
    check_ranges(numbers, "eval")
    if isinstance(numbers, Sweep):
        if not numbers.optimizers:
            raise ValueError("eval: --optimizers must name at least one of lbfgs, sgd, lars, got none")
        return
    if isinstance(numbers, FewLabels):
        if not numbers.counts:
            raise ValueError("eval: --counts must have at least one number of labels, got none")
        return
    check_milestones(numbers, "eval")
    accumulate = getattr(numbers, "accumulate", 1)
    if numbers.batch_size % accumulate:
        raise ValueError(f"eval: --batch-size must be divisible by --accumulate {accumulate}, got {numbers.batch_size}")


@dataclass
class _Evaluation:
    """Numbers of an evaluation that are not part of a protocol."""

    k: Annotated[tuple[int, ...], AT_LEAST_1] = (1,)
    tau: Annotated[float, POSITIVE] = 1.0
    labels: Annotated[float, POSITIVE] = 1.0
    seed: Annotated[int, NOT_NEGATIVE] = 0
    rerank: Annotated[int, NOT_NEGATIVE] = 0


def check_evaluation(**numbers: Any) -> None:
    """Checks any of the numbers k, tau, labels, seed and rerank.

    Raises:
        ValueError: a number is out of range; one sentence with the flag, its range, and the value.
    """
    check_ranges(_Evaluation(**numbers), "eval")
    labels = numbers.get("labels", 1)
    if labels > 1 and labels != int(labels):
        raise ValueError(f"eval: --labels must be a share of at most 1 or a whole number of labels, got {labels:g}")
    if not numbers.get("k", True):
        raise ValueError("eval: --k must have at least one number of neighbours, got none")
