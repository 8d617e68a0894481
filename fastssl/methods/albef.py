"""ALBEF: images and captions are contrasted with queues of momentum keys, then fused, matched and completed; ViT, BERT.

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", 2021,
arXiv:2107.07651. Names and layouts in the state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, BELOW_1, COEFFICIENT, NOT_NEGATIVE, PROBABILITY, SHARE, Range
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.text import TextInput
from fastssl.distributed import world_size
from fastssl.methods.clip import MEAN, STD, tokens_of
from fastssl.milestones import MILESTONE
from fastssl.nn.bert import BERT_SIZES, PAD, VOCABULARY, BertForMaskedLM
from fastssl.nn.fusion import Encoded, FusionNetwork, raise_gain
from fastssl.nn.masking import seeded_noise
from fastssl.nn.pairs import PairQueue, distilled_contrast, hard_negatives
from fastssl.nn.sharing import save_as_scalar, save_child_unprefixed, shared_copy
from fastssl.nn.token_masks import IGNORED, mask_tokens
from fastssl.nn.vit import DINO_SIZES, ViT, dino_vit
from fastssl.train.config import Training, check_images_at_once

OFFICIAL = "albef"  # layout of the reference checkpoint
LOWEST, HIGHEST = 0.001, 0.5  # bounds of the trained temperature
NEGATIVES, TOKENS = 1, 2  # streams of random numbers of a sample


@dataclass
class Config:
    """ALBEF as in its paper (section 3.4) and code: 30 epochs, batch 512, of image-text pairs."""

    backbone: str = "vit_base"
    """image encoder: vit_mini, vit_tiny, vit_small, vit_base or vit_large"""
    patch_size: Annotated[int | None, AT_LEAST_1] = None
    """side of the ViT's patches in pixels, which divides the sides of the image; by default 16, for vit_mini 4"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (256, 256)
    """height and width of the images in pixels"""
    text_model: str = "bert_base"
    """text and multimodal encoder: bert_mini or bert_base, whose upper half of layers reads the image"""
    text_length: Annotated[int, Range(2, 512)] = 25
    """most tokens of a caption"""
    dim: Annotated[int, AT_LEAST_1] = 256
    """dimension of the embeddings that are contrasted"""
    queue_size: Annotated[int, AT_LEAST_1] = 65536
    """number of pairs in the queue"""
    tau: Annotated[float, COEFFICIENT] = 0.07
    """temperature at the start; it is trained, between 0.001 and 0.5"""
    alpha: Annotated[float, PROBABILITY] = 0.4
    """share α of the momentum encoders' softmax in the targets"""
    alpha_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 1
    """epochs over which α grows from 0 along a line"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.995
    """momentum coefficient of the momentum encoders"""
    mlm_probability: Annotated[float, BELOW_1] = 0.15
    """probability with which a token is masked"""
    itm_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of image-text matching; with 0 it is not computed"""
    mlm_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of masked language modelling; with 0 it is not computed"""
    dropout: Annotated[float, BELOW_1] = 0.1
    """probability of dropout in the text model and its momentum encoder"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a crop covers"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip; captions are not mirrored"""
    random_augment: bool = True
    """change views twice with probability 1/2: contrast, brightness, sharpness, or a shear, shift or rotation"""
    training: Training = field(
        default_factory=lambda: Training(
            30, 512, "adamw", lr=5e-5, weight_decay=0.02, warmup_lr=5e-6, lr_end=5e-6, warmup_stair=100
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop. Captions name sides and sizes, so
        crops are nearly whole. At this pace a longer queue teaches nothing: old keys are told from fresh by age."""
        training = Training(14, 64, "adamw", lr=4e-3, weight_decay=0.02, warmup_epochs=1)
        views = {"image_size": (32, 32), "patch_size": 8, "crop_min": 0.9, "flip_p": 0.0, "random_augment": False}
        sizes = {"text_model": "bert_mini", "text_length": 32, "dim": 128, "queue_size": 16}
        pace = {"ema_momentum": 0.9, "alpha": 0.0, "dropout": 0.0}
        return cls("vit_mini", **views, **sizes, **pace, training=training)

    @property
    def augmentation(self) -> Augmentation:
        crop = (self.crop_min, 1.0)
        steps = {"flip_p": self.flip_p, "random_augment": self.random_augment}
        view = View(self.image_size, crop, interpolation="bicubic", mean=MEAN, std=STD, **steps)
        return Augmentation((view,))

    @property
    def text(self) -> TextInput:
        return TextInput("bert", self.text_length, separator=False, clean=True)


def build(config: Config) -> "ALBEF":
    if config.backbone not in DINO_SIZES:
        raise ValueError(f"albef: unknown backbone {config.backbone!r}, there are {', '.join(DINO_SIZES)}")
    if config.text_model not in BERT_SIZES:
        raise ValueError(f"albef: unknown --text-model {config.text_model!r}, there are {', '.join(BERT_SIZES)}")
    patch, (height, width) = config.patch_size or DINO_SIZES[config.backbone][-1], config.image_size
    if height % patch or width % patch:
        sizes = f"the patch size {patch} of {config.backbone}, got {height} {width}"
        raise ValueError(f"albef: --image-size must be divisible by {sizes}")
    reason = "a negative is another pair of the same micro-batch and rank"
    check_images_at_once(config.training, 2 * world_size(), "albef", reason)
    how: dict[str, Any] = {"dynamic_img_size": False, "pos_offset": 0.0, "pos_antialias": True, "global_pool": ""}
    vit = dino_vit(config.backbone, config.image_size, patch, **how)
    text = BertForMaskedLM(vit.embed_dim, *BERT_SIZES[config.text_model], dropout=config.dropout)
    raise_gain(vit, vit.embed_dim)
    raise_gain(text, text.dim)
    return (MatchingALBEF if config.itm_weight else ALBEF)(vit, text, config)


def parameter_groups(method: "ALBEF") -> list[dict]:
    """All but biases and parameters of one dimension are decayed: also the temperature, the class token and the
    positions, as in the official code."""
    groups: tuple[list, list] = [], []
    for name, p in method.named_parameters():
        groups[(p.ndim == 1 and name != "temp") or name.endswith(".bias")].append(p)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay_scale": 0.0}]


class ALBEF(FusionNetwork):
    """`FusionNetwork` with the three losses, a trained temperature, and a queue of pairs of momentum keys."""

    def __init__(self, visual_encoder: ViT, text_encoder: BertForMaskedLM, config: Config):
        super().__init__(visual_encoder, text_encoder, config.dim, config.ema_momentum)
        self.config = config
        self.temp = nn.Parameter(torch.tensor([config.tau]))  # FSDP2 refuses scalars
        save_as_scalar(self, "temp")
        self.queue = PairQueue(config.dim, config.queue_size)
        save_child_unprefixed(self, "queue")
        self.register_buffer("alpha", torch.tensor(0.0), persistent=False)
        unused = [] if config.mlm_weight else [text_encoder.cls]
        unused += [] if config.itm_weight else [self.itm_head]
        unused += [] if config.itm_weight or config.mlm_weight else text_encoder.fusion_layers
        for part in unused:  # DistributedDataParallel would wait for their gradients
            part.requires_grad_(False)
        self.pending: list[tuple[Tensor, Tensor]] = []  # momentum keys of images and texts of each micro-batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of contrast, matching and masked tokens. Negatives are pairs of this rank's micro-batch
        and, for the contrast, of the queue."""
        (images,), tokens = batch.views, tokens_of(batch, "albef")
        config, is_token = self.config, tokens != PAD
        seeds = batch.seeds()
        corrupted, masked = self.mask(tokens, seeds) if config.mlm_weight else (None, None)
        student = self.encode(images, tokens, corrupted)
        with torch.no_grad():
            twin = self.encode(images, tokens, corrupted if config.alpha else None, twin=True)
        if torch.is_grad_enabled():
            self.pending.append((twin.image_z, twin.text_z))
        with record_function("loss"):
            loss = self.contrast(student, twin)
        metrics = {"temp": self.temp.detach()[0].clone(), "loss_itc": loss.detach()}
        negatives = self.negatives(student, twin, seeds) if config.itm_weight else None
        matched, completed = self.fuse(student, is_token, negatives)
        if matched is not None:
            is_pair = torch.arange(len(matched), device=tokens.device) < len(tokens)
            loss_itm = F.cross_entropy(matched, is_pair.long())
            loss = loss + config.itm_weight * loss_itm
            metrics |= {"loss_itm": loss_itm.detach(), "itm_accuracy": (matched.argmax(1) == is_pair).float().mean()}
        if masked is not None:
            target = tokens.where(masked, IGNORED)
            loss_mlm, right = self.token_loss(completed, twin, is_token, target, self.alpha, config.mlm_probability)
            loss = loss + config.mlm_weight * loss_mlm
            metrics |= {"loss_mlm": loss_mlm.detach(), "mlm_accuracy": right}
        return loss, metrics

    def contrast(self, student: Encoded, twin: Encoded) -> Tensor:
        """Mean of the contrasts of images with texts and of texts with images."""
        image_keys, text_keys = self.queue.columns(twin.image_z, twin.text_z)
        to_text = distilled_contrast(student.image_z, twin.image_z, text_keys, self.temp, self.alpha)
        to_image = distilled_contrast(student.text_z, twin.text_z, image_keys, self.temp, self.alpha)
        return (to_text + to_image) / 2

    def mask(self, tokens: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] with masks, and which are masked, drawn from the samples' seeds."""
        noise = seeded_noise(3 * tokens.shape[1], TOKENS, seeds).unflatten(1, (-1, 3))
        return mask_tokens(tokens, noise, self.config.mlm_probability, VOCABULARY)

    def negatives(self, student: Encoded, twin: Encoded, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Another image for each text and another text for each image [B], drawn from the samples' seeds."""
        noise = seeded_noise(2, NEGATIVES, seeds)
        image_of_text = hard_negatives(student.text_z, twin.image_z, self.temp, noise[:, 0])
        return image_of_text, hard_negatives(student.image_z, twin.text_z, self.temp, noise[:, 1])

    def before_step(self, progress: float) -> None:
        """Keep the temperature in its bounds and set α, as the official code does before its forward pass."""
        with torch.no_grad():
            self.temp.clamp_(LOWEST, HIGHEST)
        epoch, length = progress * self.config.training.epochs, self.config.alpha_epochs
        self.alpha.fill_(self.config.alpha * (min(epoch / length, 1.0) if length else 1.0))

    def after_step(self, progress: float) -> None:
        """Enqueue the step's keys and update the momentum encoders."""
        for image_keys, text_keys in self.pending:
            self.queue.enqueue(torch.cat([image_keys, text_keys], dim=1))
        self.pending = []
        self.update_twins()

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the momentum encoders, which is constant."""
        return self.config.ema_momentum

    @property
    def encoder(self) -> ViT:
        """The image encoder with its class token as features; names of timm."""
        encoder: Any = shared_copy(self.visual_encoder)
        encoder.global_pool = "token"
        return encoder

    def features(self, images: Tensor) -> Tensor:
        """Class tokens of the image encoder [B, W]."""
        return self.visual_encoder(images)[:, 0]


class MatchingALBEF(ALBEF):
    """`ALBEF` whose head for matching is trained."""

    def match(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logarithms of the odds [B] that images [B, 3, H, W] and texts [B, L] match; one image [1, 3, H, W] is
        compared with all texts."""
        return self.log_odds(images, tokens)
