"""Convolutional networks of DeepCluster: AlexNet and VGG-16 with batch norms, behind a fixed Sobel filter."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.extras import need

NAMES = ("alexnet", "vgg16")


class SobelNet(nn.Module):
    """AlexNet or VGG-16 with batch norms, whose input are the two gradients of the grey image.

    Calls give the 4096 features of the last hidden layer after its ReLU, `before_relu` those before it. Names in the
    state dict are `sobel`, `features` and `classifier`, as in the official code.

    Args:
        name: one of `NAMES`.
        image_size: (height, width) in pixels of the images.
        sobel: filter the images; else the network takes their three colours.

    Raises:
        ValueError: the name is unknown, or images are too small for the network's strides.

    Source: Caron et al., 2018 (DeepCluster), section 4.1 and its code; Krizhevsky et al., 2012; Simonyan and Zisserman,
        2014.
    """

    def __init__(self, name: str, image_size: tuple[int, int] = (224, 224), sobel: bool = True):
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"SobelNet: unknown backbone {name!r}, there are {', '.join(NAMES)}")
        least = 63 if name == "alexnet" else 32
        if min(image_size) < least:
            raise ValueError(
                f"SobelNet: {name} needs images of at least {least} pixels, got {' '.join(map(str, image_size))}"
            )
        self.sobel = _sobel() if sobel else nn.Identity()
        channels = 2 if sobel else 3
        self.features = _alexnet(channels) if name == "alexnet" else _vgg16(channels)
        _initialise(self.features)
        with torch.no_grad():
            width = self.features.eval()(torch.zeros(1, channels, *image_size)).numel()
        self.features.train()
        self.classifier = _alexnet_classifier(width) if name == "alexnet" else _vgg16_classifier(width)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def before_relu(self, images: Tensor) -> Tensor:
        """Features [B, 4096] of images [B, 3, H, W], as DeepCluster clusters them."""
        return self.classifier(self.features(self.sobel(images)).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.before_relu(images).relu()


def _sobel() -> nn.Sequential:
    """Mean of the colours, then horizontal and vertical gradient; fixed."""
    grey, gradients = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1)
    layers = nn.Sequential(grey, gradients)
    horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
        grey.weight.fill_(1 / 3)
        gradients.weight.copy_(torch.stack([horizontal, horizontal.T])[:, None])
    return layers.requires_grad_(False)


def _alexnet(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, kernel, stride, padding, pools in (
        (96, 11, 4, 2, True),
        (256, 5, 1, 2, True),
        (384, 3, 1, 1, False),
        (384, 3, 1, 1, False),
        (256, 3, 1, 1, True),
    ):
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] * pools
        channels = width
    return nn.Sequential(*layers)


def _alexnet_classifier(width: int) -> nn.Sequential:
    relu, dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
    return nn.Sequential(dropout, nn.Linear(width, 4096), relu, nn.Dropout(0.5), nn.Linear(4096, 4096))


def _vgg16(channels: int) -> nn.Sequential:
    vgg: Any = need("torchvision.models.vgg", what="fastssl.nn.sobel", extra="train", distribution="torchvision")
    layers = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    layers[0] = nn.Conv2d(channels, layers[0].out_channels, 3, padding=1)
    return layers


def _vgg16_classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, 4096))


def _initialise(module: nn.Module) -> None:
    """Convolutions from normal(0, √(2 / (kernel area · output channels))), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
