"""ResNets from torchvision, with variants for small images and for one process that trains like many."""

import functools

import torch
from torch import Tensor, nn
from torchvision.models import resnet

NAMES = ("resnet_mini", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build_resnet(name: str, dim: int, small_images: bool = False, bn_splits: int = 1) -> nn.Module:
    """A torchvision ResNet whose last layer `fc` has `dim` outputs.

    Args:
        name: one of `NAMES`; resnet_mini is `ResNetMini`.
        dim: outputs of `fc`.
        small_images: a 3×3 stem without stride and pooling, as is usual for images of 32 pixels.
        bn_splits: parts of the batch that batch norm treats apart, see `SplitBatchNorm2d`.
    """
    if name not in NAMES:
        raise ValueError(f"resnet: unknown backbone {name!r}, there are {', '.join(NAMES)}")
    norm = functools.partial(SplitBatchNorm2d, splits=bn_splits) if bn_splits > 1 else nn.BatchNorm2d
    if name == "resnet_mini":
        model = ResNetMini(dim, norm)
    else:
        model = getattr(resnet, name)(num_classes=dim, norm_layer=norm)
        if small_images:
            model.conv1, model.maxpool = _stem(64, stride=1), nn.Identity()
    return model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs


class ResNetMini(resnet.ResNet):
    """torchvision's ResNet with one block a stage and half the width, for small images and minutes on a CPU.

    A 3×3 stem of stride 2 without pooling, 32, 64, 128 and 256 channels: 1.2 M parameters, 256 features.
    """

    def __init__(self, dim: int, norm_layer):
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        self.conv1, self.bn1, self.maxpool = _stem(32, stride=2), norm_layer(32), nn.Identity()
        self.fc = nn.Linear(256, dim)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = 32
        return super()._make_layer(block, planes // 2, *args, **kwargs)


def _stem(channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(3, channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of each of `splits` parts of the batch.

    On one process this stands for MoCo's shuffled batch norm over as many GPUs: with common statistics a query could
    recognise its key by the company it keeps. The running statistics are the mean over the parts.

    Source: He et al., 2020 (MoCo), section 3.3, "Shuffling BN".
    """

    def __init__(self, num_features: int, splits: int = 1):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if not self.training or batch % self.splits:
            if self.training:
                raise ValueError(f"SplitBatchNorm2d: the batch must be divisible by splits={self.splits}, got {batch}")
            return super().forward(x)
        parts = x.reshape(batch // self.splits, self.splits * channels, height, width)
        mean, var = (stat.repeat(self.splits) for stat in (self.running_mean, self.running_var))
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        out = nn.functional.batch_norm(parts, mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.copy_(mean.view(self.splits, channels).mean(0))
            self.running_var.copy_(var.view(self.splits, channels).mean(0))
        return out.view(batch, channels, height, width)


def features_before_fc(encoder: nn.Module, images: Tensor) -> Tensor:
    """What the encoder hands to its last layer `fc`: the features that evaluation uses."""
    taken: list[Tensor] = []
    hook = encoder.fc.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    try:
        encoder(images)
    finally:
        hook.remove()
    return taken[0]
