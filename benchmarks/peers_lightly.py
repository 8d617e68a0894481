"""MoCo, SimCLR, BYOL, SimSiam, DINO and MAE of lightly's parts, as its documentation puts them together.

Heads, losses, masks, momentum updates and transforms are lightly's; the encoders are torchvision's and timm's modules
with the initial weights of ours; the numbers are those of our `Config`. A step is that of a plain training loop:

    peer.before_step(step, steps)
    peer.loss(views).backward()
    peer.after_backward(epochs)
    optimizer.step()

What stays lightly's own: initial weights of the heads and which of their layers have biases, a momentum network that
starts as a copy (ours of BYOL starts at random, as the paper's), and one forward pass for each view, so that batch
norms see one view at a time. With the same weights, losses and gradients are ours: the tests compare them.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM, heads
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    MAETransform,
    MoCoV2Transform,
    SimCLRTransform,
    SimSiamTransform,
)
from lightly.utils.scheduler import cosine_schedule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.transforms import v2

from fastssl.data.augmentation import View
from fastssl.nn.vit import SIZES


class ResNetMini(resnet.ResNet):
    """torchvision's ResNet of one block a stage and half the width: the network of `fastssl.nn.resnet.ResNetMini`,
    with the same names, of torch's modules alone. 256 features."""

    def __init__(self):
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1])
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1, self.maxpool, self.fc = nn.BatchNorm2d(32), nn.Identity(), nn.Identity()

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = 32
        return super()._make_layer(block, planes // 2, *args, **kwargs)


def plain_resnet(config: Any, encoder: nn.Module) -> nn.Module:
    """The encoder of a method of ours as a network of torchvision's modules, with its weights.

    In channels-last layout, in which torch's convolutions on CPUs take four fifths of the time.
    """
    if config.backbone != "resnet_mini":
        raise ValueError(f"learning_peers: the backbone must be resnet_mini, got {config.backbone}")
    network = ResNetMini()
    network.load_state_dict(encoder.state_dict())
    return network.to(memory_format=torch.channels_last)


def plain_vit(config: Any, encoder: nn.Module, patch: int | None = None, **options: Any) -> VisionTransformer:
    """The encoder of a method of ours as timm's ViT, with its weights; `options` of timm's."""
    dim, depth, heads, own = SIZES[config.backbone]
    size = {"img_size": config.image_size, "patch_size": patch or own}
    network = VisionTransformer(**size, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0, **options)
    network.load_state_dict(encoder.state_dict())
    return network


class Peer(nn.Module):
    """A model of lightly's parts around an encoder."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def before_step(self, step: int, steps: int) -> None:
        """Update momentum networks, before the forward pass."""

    def loss(self, views: list[Tensor]) -> Tensor:
        """The loss of a batch of views, each [B, 3, H, W]."""
        raise NotImplementedError

    def after_backward(self, epochs: float) -> None:
        """Change gradients before the optimizer's step, after so many epochs."""

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F] of normalised images [B, 3, H, W]."""
        return self.backbone(images)


class MoCo(Peer):
    """Both directions in one call of the loss, so that the memory bank is read before the step's keys are written."""

    def __init__(self, config: Any, encoder: nn.Module):
        super().__init__(plain_resnet(config, encoder))
        self.head = heads.MoCoProjectionHead(WIDTH, WIDTH, config.dim)
        self.momentum_backbone, self.momentum_head = map(frozen_copy, (self.backbone, self.head))
        self.criterion = NTXentLoss(config.tau, memory_bank_size=(config.queue_size, config.dim))
        self.momentum = config.ema_momentum
        self.momentum_end = config.ema_momentum if config.ema_momentum_end is None else config.ema_momentum_end
        self.symmetric = config.symmetric

    def before_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step, steps, self.momentum, self.momentum_end)
        utils.update_momentum(self.backbone, self.momentum_backbone, momentum)
        utils.update_momentum(self.head, self.momentum_head, momentum)

    def loss(self, views: list[Tensor]) -> Tensor:
        first, second = views
        queries, keys = ([first, second], [second, first]) if self.symmetric else ([first], [second])
        with torch.no_grad():
            z = torch.cat([self.momentum_head(self.momentum_backbone(view)) for view in keys])
        return self.criterion(torch.cat([self.head(self.backbone(view)) for view in queries]), z)


class SimCLR(Peer):
    """The loss has the factor of ours, for which the learning rate is."""

    def __init__(self, config: Any, encoder: nn.Module):
        super().__init__(plain_resnet(config, encoder))
        self.head = heads.SimCLRProjectionHead(WIDTH, config.hidden, config.dim, num_layers=config.layers)
        self.criterion, self.scale = NTXentLoss(config.tau), config.loss_scale

    def loss(self, views: list[Tensor]) -> Tensor:
        z1, z2 = (self.head(self.backbone(view)) for view in views)
        return self.scale * self.criterion(z1, z2)


class BYOL(Peer):
    """The loss is the sum of both directions' 2 − 2 cos but for a constant, as in ours and in the paper."""

    def __init__(self, config: Any, encoder: nn.Module):
        super().__init__(plain_resnet(config, encoder))
        self.head = heads.BYOLProjectionHead(WIDTH, config.hidden, config.dim)
        self.predictor = heads.BYOLPredictionHead(config.dim, config.hidden, config.dim)
        self.momentum_backbone, self.momentum_head = map(frozen_copy, (self.backbone, self.head))
        self.criterion = NegativeCosineSimilarity()
        self.momentum = config.ema_momentum, config.ema_momentum_end

    def before_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step, steps, *self.momentum)
        utils.update_momentum(self.backbone, self.momentum_backbone, momentum)
        utils.update_momentum(self.head, self.momentum_head, momentum)

    def loss(self, views: list[Tensor]) -> Tensor:
        p1, p2 = (self.predictor(self.head(self.backbone(view))) for view in views)
        with torch.no_grad():
            z1, z2 = (self.momentum_head(self.momentum_backbone(view)) for view in views)
        return 2 * (self.criterion(p1, z2) + self.criterion(p2, z1))


class SimSiam(Peer):
    def __init__(self, config: Any, encoder: nn.Module):
        super().__init__(plain_resnet(config, encoder))
        self.head = heads.SimSiamProjectionHead(WIDTH, WIDTH, config.dim)
        self.predictor = heads.SimSiamPredictionHead(config.dim, config.hidden, config.dim)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views: list[Tensor]) -> Tensor:
        z1, z2 = (self.head(self.backbone(view)) for view in views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return 0.5 * (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach()))


class DINO(Peer):
    """Evaluated by its teacher, as ours. Gradients are clipped one by one, as in the code of the paper."""

    def __init__(self, config: Any, encoder: nn.Module):
        super().__init__(plain_vit(config, encoder, config.patch_size, dynamic_img_size=True))
        training = config.training
        sizes = self.backbone.embed_dim, config.hidden, config.bottleneck, config.prototypes, config.bn_in_head
        self.head = heads.DINOProjectionHead(*sizes, training.freeze_epochs, config.norm_last_layer)
        self.teacher_backbone = frozen_copy(self.backbone)
        self.teacher_head = heads.DINOProjectionHead(*sizes, norm_last_layer=config.norm_last_layer)
        self.teacher_head.load_state_dict(self.head.state_dict())
        utils.deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(
            config.prototypes,
            config.warmup_teacher_temp,
            config.teacher_temp,
            int(config.warmup_teacher_temp_epochs),
            config.tau,
            config.center_momentum,
        )
        self.momentum, self.clip = (config.ema_momentum, config.ema_momentum_end), training.clip_parameter_norm

    def before_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step, steps, *self.momentum)
        utils.update_momentum(self.backbone, self.teacher_backbone, momentum)
        utils.update_momentum(self.head, self.teacher_head, momentum)

    def loss(self, views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        return self.criterion(teacher, [self.head(self.backbone(view)) for view in views])

    def after_backward(self, epochs: float) -> None:
        self.head.cancel_last_layer_gradients(epochs)
        if self.clip:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norms = torch._foreach_norm(gradients)
            torch._foreach_mul_(gradients, [(self.clip / (norm + 1e-6)).clamp(max=1.0) for norm in norms])

    def features(self, images: Tensor) -> Tensor:
        return self.teacher_backbone(images)


class MAE(Peer):
    def __init__(self, config: Any, encoder: nn.Module):
        vit = plain_vit(config, encoder)
        patch, width = vit.patch_embed.patch_size[0], config.decoder_dim
        vit.pos_embed.requires_grad_(False)
        as_it_is = {"weight_initialization": "skip", "pos_embed_initialization": "skip"}
        super().__init__(MaskedVisionTransformerTIMM(vit, **as_it_is))
        sizes = {"embed_dim": width, "depth": config.decoder_depth, "num_heads": config.decoder_heads}
        self.decoder_embed = nn.Linear(vit.embed_dim, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, **sizes)
        self.decoder_pred = nn.Linear(width, patch**2 * 3)
        self.criterion, self.mask_ratio, self.patch, self.norm_pix = (
            nn.MSELoss(),
            config.mask_ratio,
            patch,
            config.norm_pix,
        )

    def loss(self, views: list[Tensor]) -> Tensor:
        (images,) = views
        size = len(images), self.backbone.sequence_length
        keep, masked = utils.random_token_mask(size, self.mask_ratio, device=images.device)
        encoded = self.decoder_embed(self.backbone.encode(images, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, size), keep, encoded)
        predicted = self.decoder_pred(utils.get_at_index(self.decoder(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)  # without the class token
        if self.norm_pix:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return self.criterion(predicted, target)


WIDTH = 256  # features of ResNetMini


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters get no gradient."""
    copied = copy.deepcopy(module)
    utils.deactivate_requires_grad(copied)
    return copied


def symmetric_views(transform: Callable[..., Any]) -> Callable[[Any], Any]:
    """Two views by one law, of a transform with SimCLR's arguments."""

    def make(config: Any) -> Any:
        view, _ = config.augmentation.views
        made = transform(gaussian_blur=view.blur_p, **_arguments(view))
        return _adjusted(made, config)

    return make


def byol_views(config: Any) -> BYOLTransform:
    made = [
        transform(gaussian_blur=view.blur_p, solarization_prob=view.solarize_p, **_arguments(view))
        for transform, view in zip((BYOLView1Transform, BYOLView2Transform), config.augmentation.views)
    ]
    return _adjusted(BYOLTransform(*made), config)


def dino_views(config: Any) -> DINOTransform:
    large, second, *local = views = config.augmentation.views
    arguments = {name: value for name, value in _arguments(large).items() if name not in ("input_size", "min_scale")}
    for name in ("cj_bright", "cj_contrast", "cj_sat", "cj_hue"):
        arguments[name] *= 2  # the transform halves them, those of the second view at any cj_strength
    small = local[0] if local else large
    made = DINOTransform(
        global_crop_size=large.size[0],
        global_crop_scale=large.crop,
        local_crop_size=small.size[0],
        local_crop_scale=small.crop,
        n_local_views=len(local),
        gaussian_blur=(large.blur_p, second.blur_p, small.blur_p),
        solarization_prob=second.solarize_p,
        **{**arguments, "cj_strength": 0.5},
    )
    assert len(made.transforms) == len(views)
    return _adjusted(made, config)


def mae_views(config: Any) -> MAETransform:
    (view,) = config.augmentation.views
    made = MAETransform(view.size[0], _smallest(view), {"mean": list(view.mean), "std": list(view.std)})
    return _adjusted(made, config)


def _arguments(view: View) -> dict[str, Any]:
    """Arguments that most of lightly's transforms have."""
    bright, contrast, saturation, hue = view.jitter
    return {
        "input_size": view.size[0],
        "cj_prob": view.jitter_p,
        "cj_strength": 1.0,
        "cj_bright": bright,
        "cj_contrast": contrast,
        "cj_sat": saturation,
        "cj_hue": hue,
        "min_scale": _smallest(view),
        "random_gray_scale": view.grayscale_p,
        "sigmas": view.blur_sigma,
        "hf_prob": view.flip_p,
        "normalize": {"mean": list(view.mean), "std": list(view.std)},
    }


def _smallest(view: View) -> float:
    """The smallest area of a crop."""
    if view.crop is None or view.size[0] != view.size[1]:
        raise ValueError(f"learning_peers: lightly's transforms make square random crops, got {view}")
    return view.crop[0]


def _adjusted(transform: Any, config: Any) -> Any:
    """The transform with the interpolation and flips of our views, for which lightly's may have no arguments."""
    parts = getattr(transform, "transforms", [transform])
    for view, part in zip(config.augmentation.views, parts):
        for step in part.transform.transforms:
            if isinstance(step, v2.RandomResizedCrop):
                step.interpolation = v2.InterpolationMode(view.interpolation)
            if isinstance(step, v2.RandomHorizontalFlip):
                step.p = view.flip_p
    return transform


# name of our method: the model of lightly's parts, and its views
PEERS: dict[str, tuple[type[Peer], Callable[[Any], Any]]] = {
    "moco_v2": (MoCo, symmetric_views(MoCoV2Transform)),
    "simclr_v1": (SimCLR, symmetric_views(SimCLRTransform)),
    "byol": (BYOL, byol_views),
    "simsiam": (SimSiam, symmetric_views(SimSiamTransform)),
    "dino": (DINO, dino_views),
    "mae": (MAE, mae_views),
}


def parameter_groups(name: str, config: Any) -> Callable[[nn.Module], list[dict]] | None:
    """Groups for the optimizer where ours has some: SimSiam's predictor, with a constant learning rate."""
    if name != "simsiam":
        return None

    def groups(peer: SimSiam) -> list[dict]:
        trained: Iterator[nn.Parameter] = (p for part in (peer.backbone, peer.head) for p in part.parameters())
        predictor = {"params": list(peer.predictor.parameters()), "constant_lr": config.fix_predictor_lr}
        return [{"params": list(trained)}, predictor]

    return groups
