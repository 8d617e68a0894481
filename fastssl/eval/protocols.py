"""The numbers of linear probing and fine-tuning, as plain values; learning rates are per 256 images."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from fastssl.train.config import Training


class Setting(NamedTuple):
    """One way to train a linear classifier on features."""

    optimizer: str
    value: float  # learning rate; of lbfgs the weight of ½‖w‖²

    def __str__(self) -> str:
        return f"{self.optimizer}, {'l2' if self.optimizer == 'lbfgs' else 'lr'} {self.value:g}"


TRIED = {  # decades around what is best on features of unit variance; the first is taken where none can be compared
    "lbfgs": (1e-3, 1e-2, 1e-1, 1e-4, 1e-5, 1e-6),
    "sgd": (0.1, 0.01, 0.03, 0.3, 1.0, 3.0),
    "lars": (30.0, 3.0, 10.0, 100.0),
}


@dataclass
class Sweep:
    """A linear classifier on features extracted once. Several optimizers and learning rates are tried on nine tenths of
    the training features; the best on the last tenth is trained on all and asked about the test images."""

    optimizers: tuple[Literal["lbfgs", "sgd", "lars"], ...] = ("lbfgs", "sgd", "lars")
    """which to try: lbfgs (with several weights of the L2 penalty), sgd, lars"""
    lrs: tuple[float, ...] = ()
    """learning rates of sgd and lars to try, for a batch of 256; several decades of each if not given"""
    epochs: int = 100
    """passes over the features; of lbfgs twice as many iterations at most"""
    batch_size: int = 256
    """features a step of sgd and lars"""

    @property
    def settings(self) -> list[Setting]:
        """All that are tried."""
        tried = {name: self.lrs if self.lrs and name != "lbfgs" else values for name, values in TRIED.items()}
        return [Setting(name, value) for name in dict.fromkeys(self.optimizers) for value in tried[name]]


@dataclass
class Official:
    """The linear probe of a method's own code: augmented images through the frozen encoder, every step anew."""

    epochs: int = 90
    """passes over the images"""
    batch_size: int = 16384
    """images a step"""
    optimizer: Literal["sgd", "lars"] = "lars"
    """sgd or lars"""
    lr: float = 0.1
    """learning rate for a batch of 256"""
    weight_decay: float = 0.0
    """part of the gradient"""
    warmup_epochs: float = 10
    """epochs over which the learning rate rises from 0"""
    lr_by_epoch: bool = False
    """change the learning rate once an epoch instead of every step"""
    lr_drops: tuple[int, ...] = ()
    """epochs at which the learning rate falls to a tenth, instead of along a cosine"""
    standardise: bool = True
    """a batch norm without weights (eps 1e-6) before the linear layer"""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """of the training crops; test images are resized bicubically"""
    at_once: int = 512
    """images a batch norm sees, and the encoder takes, at once at most: those of one GPU in the official run"""

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
        """Equal parts that a step's images come in."""
        batch = self.batch_size
        return next(n for n in range(-(-batch // self.at_once), batch + 1) if batch % n == 0)


@dataclass
class Finetune:
    """End-to-end fine-tuning. A ViT's classifier reads the mean of the patch tokens, a ResNet's its pooled features."""

    epochs: int = 100
    """passes over the images"""
    batch_size: int = 1024
    """images a step"""
    accumulate: int = 1
    """micro-batches that a step's images come in: less memory for the same step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (betas 0.9, 0.999) or sgd (momentum 0.9)"""
    lr: float = 5e-4
    """learning rate for a batch of 256"""
    min_lr: float = 1e-6
    """what the cosine ends at"""
    weight_decay: float = 0.05
    """decoupled for adamw, as part of the gradient for sgd; none of biases, norms, positions and class token"""
    warmup_epochs: float = 5
    """epochs over which the learning rate rises from 0"""
    lr_drops: tuple[int, ...] = ()
    """epochs at which the learning rate falls to a tenth, instead of along a cosine"""
    layer_decay: float = 0.65
    """learning rate of each block relative to that of the next one, of a ViT"""
    head_lr: float = 1.0
    """learning rate of the classifier relative to that of the last block"""
    drop_path: float = 0.1
    """largest probability to skip a block, of a ViT"""
    mixup: float = 0.8
    """alpha of mixup, 0 for none"""
    cutmix: float = 1.0
    """alpha of cutmix, 0 for none"""
    label_smoothing: float = 0.1
    """share of the label that goes to all classes"""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """policy in timm's words, or none"""
    erasing: float = 0.25
    """probability of random erasing"""
    crop_min: float = 0.08
    """smallest share of the image that a crop takes"""
    flip_p: float = 0.5
    """probability of a horizontal flip"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 for autocast"""

    @classmethod
    def paper(cls, backbone: str) -> "Finetune":
        """Source: ViT: He et al., 2021 (MAE), appendix A.1, table 9, and its code's FINETUNE.md; that of B for smaller
        ones. ResNet: Caron et al., 2020 (SwAV), section 4.1 and its code for few labels, with learning rates of 0.01
        and 0.2 for the classifier; they fall to a tenth here, to a fifth there."""
        if backbone.startswith("resnet"):
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
        """For images of at most 64 pixels and minutes on a laptop: not of a paper. No flips: digits have none."""
        light = {"label_smoothing": 0.1, "randaugment": "none", "erasing": 0.0, "crop_min": 0.6, "flip_p": 0.0}
        if backbone.startswith("resnet"):
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


_COUNT = ("at least 1", lambda x: x >= 1)
_RATE = ("above 0, up to 1e6", lambda x: 0 < x <= 1e6)
_NOT_NEGATIVE = ("from 0 on, up to 1e9", lambda x: 0 <= x <= 1e9)
_SHARE = ("above 0, up to 1", lambda x: 0 < x <= 1)
_PROBABILITY = ("0 … 1", lambda x: 0 <= x <= 1)
_BELOW_1 = ("from 0 on, below 1", lambda x: 0 <= x < 1)
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("k", "epochs", "batch_size", "accumulate", "at_once"), _COUNT),
    **dict.fromkeys(("tau", "lr", "lrs", "head_lr"), _RATE),
    **dict.fromkeys(("seed", "weight_decay", "warmup_epochs", "min_lr", "mixup", "cutmix"), _NOT_NEGATIVE),
    **dict.fromkeys(("labels", "layer_decay", "crop_min"), _SHARE),
    **dict.fromkeys(("flip_p", "erasing"), _PROBABILITY),
    **dict.fromkeys(("label_smoothing", "drop_path"), _BELOW_1),
}


def check(asked: Any) -> None:
    """Refuses numbers out of range.

    Args:
        asked: a dataclass: one of those above, or flags that are named like what `RANGES` knows.

    Raises:
        ValueError: one sentence with the flag, its range, and what came.
    """
    values = {field.name: getattr(asked, field.name) for field in fields(asked)}
    for name, value in values.items():
        several = value if isinstance(value, tuple) else (value,)
        wanted, fits = RANGES.get(name, ("", lambda _: True))
        if not all(map(fits, several)) or (name in ("k", "optimizers") and not several):
            raise ValueError(f"eval: --{name.replace('_', '-')} must be {wanted or 'named'}, got {_words(several)}")
    epochs = values.get("epochs")
    for name in ("warmup_epochs", "lr_drops"):
        late = [epoch for epoch in _tuple(values.get(name, ())) if epoch >= epochs]
        if late:
            raise ValueError(f"eval: --{name.replace('_', '-')} must lie before --epochs {epochs}, got {late[0]:g}")
    if values.get("batch_size", 0) % values.get("accumulate", 1):
        raise ValueError(
            f"eval: --batch-size must be divisible by --accumulate {values['accumulate']}, got {values['batch_size']}"
        )


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _words(values: tuple) -> str:
    return " ".join(map(str, values)) or "none"
