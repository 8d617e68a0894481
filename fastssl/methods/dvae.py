"""dVAE: a discrete variational autoencoder, whose encoder turns images into grids of codes: a tokenizer of one's own.

Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021 (DALL-E), arXiv:2102.12092, section 2.1 and appendix A. Names
in the state dict are those of the public encoder and decoder, and `ema.` before those of their averages.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, Range
from fastssl.contract import Batch
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastssl.distributed import all_sum, rank
from fastssl.nn.beit_dvae import BEiTVAE
from fastssl.nn.dvae import Decoder, DiscreteVAE, Encoder
from fastssl.nn.gumbel import gumbel_noise
from fastssl.nn.momentum import MomentumEncoder
from fastssl.train.config import Training
from fastssl.train.schedule import cosine_schedule

UPDATES = 3_000_000  # of the paper's run, on which its schedules depend
NORMALISED = IMAGENET_MEAN, IMAGENET_STD
LOW_USAGE = 0.1  # share of the codes below which a sentence tells that they collapse


@dataclass
class Config:
    """dVAE as in appendix A.2 of DALL-E's paper, as long as its 3 million steps on images of ImageNet's number."""

    network: Literal["dalle", "beit"] = "dalle"
    """dalle, or beit: that of BEiT's code (customized), with a codebook and the mean squared error of the pixels"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (256, 256)
    """height and width of the images in pixels, divisible by the stride 2^(groups - 1)"""
    codes: Annotated[int, Range(2, 2**20)] = 8192
    """number of codes, the tokenizer's vocabulary"""
    width: Annotated[int, Range(4, 4096)] = 256
    """channels of the encoder's first and the decoder's last group, a multiple of 4; they double from group to group.
    beit: of all layers"""
    inner: Annotated[int, AT_LEAST_1] = 128
    """channels of the decoder's first layer; beit: of the codebook"""
    groups: Annotated[int, Range(1, 8)] = 4
    """groups of blocks, between which images are halved: a code stands for 8 by 8 pixels with 4, 4 by 4 with 3"""
    blocks: Annotated[int, Range(1, 64)] = 2
    """blocks of a group; beit has one"""
    tau: Annotated[float, POSITIVE] = 1.0
    """temperature of the relaxation at the start"""
    tau_end: Annotated[float, POSITIVE] = 1 / 16
    """temperature of the relaxation, reached along a cosine"""
    tau_share: Annotated[float, SHARE] = 150_000 / UPDATES
    """share of the training after which it is reached"""
    kl_weight: Annotated[float, NOT_NEGATIVE] = 6.6
    """weight of the divergence of an image's codes from uniform ones; both terms are divided by its number of values"""
    kl_share: Annotated[float, SHARE] = 5_000 / UPDATES
    """share of the training over which this weight grows from 0, along a line"""
    kl_weight_end: Annotated[float | None, NOT_NEGATIVE] = None
    """this weight at the end of training, reached along a cosine; constant if not given (not from the paper)"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.999
    """momentum coefficient of the averaged weights, which make the tokenizer"""
    crop_min: Annotated[float, SHARE] = 0.75
    """smallest fraction of the image area that a training crop covers (not from the paper)"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=1200, batch_size=512, optimizer="adamw", lr=5e-5, weight_decay=1e-4, lr_end=6.25e-7, decay_all=True
        )
    )

    @classmethod
    def paper(cls, backbone: str = "") -> "Config":
        if backbone:
            raise ValueError(f"dvae: --width, --groups and --blocks choose the network, not --backbone {backbone}")
        return cls()

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop. A code stands for 4 by 4 pixels.

        The network is that of BEiT's code. At first the divergence weighs so much that many codes stay in use until the
        decoder can tell them apart, at the end little against the squared error.
        """
        training = Training(12, 16, "adamw", lr=4e-2, weight_decay=1e-4, warmup_epochs=0.5, decay_all=True)
        sizes = {"image_size": (32, 32), "codes": 64, "width": 16, "inner": 32, "groups": 3, "blocks": 1}
        schedules = {"tau_end": 0.25, "tau_share": 1.0, "kl_share": 0.01, "ema_momentum": 0.98}
        schedules |= {"kl_weight": 0.4, "kl_weight_end": 0.02}
        return cls("beit", **sizes, **schedules, flip_p=0.0, training=training)

    @property
    def augmentation(self) -> Augmentation:
        crop = (self.crop_min, 1.0)
        return Augmentation((View(self.image_size, crop=crop, interpolation="bicubic", flip_p=self.flip_p),))


def build(config: Config) -> "DVAE":
    stride = 2 ** (config.groups - 1)
    if config.image_size[0] % stride or config.image_size[1] % stride:
        got = f"got {config.image_size[0]} {config.image_size[1]}"
        raise ValueError(
            f"dvae: --image-size must be divisible by {stride}, the stride of {config.groups} groups, {got}"
        )
    if config.width % 4:
        raise ValueError(f"dvae: --width must be divisible by 4, got {config.width}")
    if config.network == "beit":
        return DVAE(BEiTVAE(config.width, config.codes, config.groups - 1, config.inner, *NORMALISED), config)
    sizes = (config.width, config.codes, config.groups, config.blocks)
    encoder = Encoder(*sizes, *NORMALISED)
    return DVAE(DiscreteVAE(encoder, Decoder(*sizes, config.inner)), config)


class DVAE(nn.Module):
    """The autoencoder, the average of its weights over training, and counts of the codes of the epoch.

    Args:
        dvae: encoder and decoder, a `DiscreteVAE` or a `BEiTVAE`.
        config: schedules.
    """

    def __init__(self, dvae: DiscreteVAE | BEiTVAE, config: Config):
        super().__init__()
        self.config, self.dvae, self.pending = config, dvae, []
        self.ema = MomentumEncoder(dvae, config.ema_momentum)
        self.register_buffer("counts", torch.zeros(config.codes, dtype=torch.int64))
        self.register_buffer("tau", torch.tensor(config.tau), persistent=False)
        self.register_buffer("kl_weight", torch.tensor(0.0), persistent=False)
        self.register_state_dict_post_hook(_official_names)
        self.register_load_state_dict_pre_hook(_own_names)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative evidence lower bound of a value of an image; `nll` is the squared error with the network beit.
        Perplexity and share of used codes are the batch's."""
        (images,) = batch.views
        stride, codes = self.dvae.tokenizer.stride, self.config.codes
        shape = (codes, images.shape[2] // stride, images.shape[3] // stride)
        nll, kl, chosen = self.dvae.losses(images, gumbel_noise(batch.seeds(), shape), self.tau)
        counts = torch.zeros_like(self.counts).index_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        if torch.is_grad_enabled():
            self.pending.append(counts)
        share = counts / chosen.numel()
        metrics = {"nll": nll.detach(), "kl": kl.detach(), "perplexity": share.xlogy(share).sum().neg().exp()}
        metrics |= {"codes_used": (counts > 0).float().mean(), "tau": self.tau.clone()}
        return nll + self.kl_weight * kl / (3 * stride**2), metrics  # a place's share of the values: 3 · stride²

    def before_step(self, progress: float) -> None:
        """Set the temperature and the weight of the divergence."""
        config = self.config
        self.tau.fill_(cosine_schedule(config.tau, config.tau_end, min(progress / config.tau_share, 1)))
        end = config.kl_weight if config.kl_weight_end is None else config.kl_weight_end
        weight = cosine_schedule(config.kl_weight, end, progress)
        self.kl_weight.fill_(weight * min(progress / config.kl_share, 1))

    def after_step(self, progress: float) -> None:
        """Average the weights; count the codes, and at the end of an epoch tell if few are used."""
        self.ema.update(self.dvae, self.config.ema_momentum)
        self.counts += all_sum(torch.stack(self.pending).sum(0))
        self.pending = []
        epoch = progress * self.config.training.epochs
        if abs(epoch - round(epoch)) < 1e-9 * max(1, epoch):
            self._report_usage(round(epoch))
            self.counts.zero_()

    def _report_usage(self, epoch: int) -> None:
        used, codes = int((self.counts > 0).sum()), self.config.codes
        if used < LOW_USAGE * min(codes, int(self.counts.sum())) and rank() == 0:
            print(
                f"dvae: epoch {epoch} used {used:,} of {codes:,} codes: they collapse; a larger --kl-weight, a slower "
                "--tau-share or a smaller --lr keeps more of them in use",
                flush=True,
            )

    def autoencode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] as their codes show them, by the averaged weights."""
        return self.ema.module.autoencode(images)

    @property
    def encoder(self) -> Encoder | BEiTVAE:
        """The averaged encoder, the tokenizer of images normalised as for ImageNet."""
        return self.ema.module.tokenizer

    def features(self, images: Tensor) -> Tensor:
        """Features of the averaged encoder [B, F]: the mean over the places before the last layer."""
        return self.encoder(images)


def _official_names(method: nn.Module, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}dvae.")]:
        state[prefix + name.removeprefix(f"{prefix}dvae.")] = state.pop(name)


def _own_names(method: nn.Module, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(BEiTVAE.parts(prefix))]:
        state[f"{prefix}dvae.{name.removeprefix(prefix)}"] = state.pop(name)
