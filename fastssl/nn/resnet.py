"""torchvision's ResNets with batch norm, addition and ReLU in one pass, and with variants for small images."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.extras import need

from .norm import SplitBatchNorm2d, norm_relu

resnet: Any = need("torchvision.models.resnet", what="fastssl.nn.resnet", extra="train", distribution="torchvision")

NAMES = ("resnet_mini", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build_resnet(
    name: str, dim: int, small_images: bool = False, bn_splits: int = 1, zero_init_residual: bool = False
) -> nn.Module:
    """A torchvision ResNet whose last layer `fc` has `dim` outputs.

    Args:
        name: one of `NAMES`; resnet_mini is `ResNetMini`.
        dim: number of outputs of `fc`.
        small_images: use a 3×3 stem without stride and pooling, as is usual for images of 32 pixels.
        bn_splits: number of parts of the batch with batch statistics of their own, see `SplitBatchNorm2d`.
        zero_init_residual: start every block as the identity (MoCo v3).

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"resnet: unknown backbone {name!r}, there are {', '.join(NAMES)}")
    norm = functools.partial(SplitBatchNorm2d, splits=bn_splits)
    if name == "resnet_mini":
        model = ResNetMini(dim, norm, zero_init_residual)
    else:
        model = ResNet(*_BLOCKS[name], num_classes=dim, norm_layer=norm, zero_init_residual=zero_init_residual)
        if small_images:
            model.conv1, model.maxpool = _stem(64, stride=1), nn.Identity()
    return model.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs and GPUs


class BasicBlock(resnet.BasicBlock):
    """torchvision's `BasicBlock` with batch norm, addition and ReLU in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), identity)


class Bottleneck(resnet.Bottleneck):
    """torchvision's `Bottleneck` with batch norm, addition and ReLU in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(self.bn3, self.conv3(out), identity)


_BLOCKS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class ResNet(resnet.ResNet):
    """torchvision's `ResNet`, for the blocks above."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ResNetMini(ResNet):
    """A ResNet with one block a stage and half the width, for small images and minutes on a CPU.

    It has a 3×3 stem of stride 2 without pooling, and 32, 64, 128 and 256 channels: 1.2 M parameters, 256 features.
    """

    def __init__(self, dim: int, norm_layer, zero_init_residual: bool = False):
        super().__init__(BasicBlock, [1, 1, 1, 1], zero_init_residual=zero_init_residual, norm_layer=norm_layer)
        self.conv1, self.bn1, self.maxpool = _stem(32, stride=2), norm_layer(32), nn.Identity()
        self.fc = nn.Linear(256, dim)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = 32
        return super()._make_layer(block, planes // 2, *args, **kwargs)


class HalfResNet(ResNet):
    """A ResNet of half the width, for images of any number of channels (CMC's encoders of L and of ab).

    Args:
        name: one of `NAMES`; resnet_mini is half of `ResNetMini`.
        channels: number of channels of the images.
        dim: number of outputs of `fc`.
        small_images: use a 3×3 stem without stride and pooling.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str, channels: int, dim: int, small_images: bool = False):
        if name not in NAMES:
            raise ValueError(f"resnet: unknown backbone {name!r}, there are {', '.join(NAMES)}")
        is_mini = name == "resnet_mini"
        block: Any
        block, layers = (BasicBlock, [1, 1, 1, 1]) if is_mini else _BLOCKS[name]
        self.divisor = 4 if is_mini else 2
        super().__init__(block, layers, norm_layer=SplitBatchNorm2d)
        width = 64 // self.divisor
        if small_images or is_mini:
            self.conv1, self.maxpool = _stem(width, 2 if is_mini else 1, channels), nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = SplitBatchNorm2d(width)
        self.fc = nn.Linear(8 * width * block.expansion, dim)
        self.to(memory_format=torch.channels_last)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = 64 // self.divisor
        return super()._make_layer(block, planes // self.divisor, *args, **kwargs)


def _stem(channels: int, stride: int, channels_in: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
