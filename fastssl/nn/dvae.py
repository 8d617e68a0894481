"""Discrete variational autoencoder: images as grids of codes, and back. Names of weights are those of DALL-E's code.

Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021 (DALL-E), section 2.1 and appendix A. There is no
normalisation and no attention; a residual branch starts small, by a constant factor.
"""

import functools
import hashlib
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import check
from fastssl.text import printable
from fastssl.train import checkpoint
from fastssl.weight_files import read_file

from .beit_dvae import BEiTVAE
from .gumbel import relax

EPS = 0.1  # pixels from 0 to 1 become values from EPS to 1 − EPS, whose logits are finite
MAPPED_MEAN, MAPPED_STD = (-0.125,) * 3, (1.25,) * 3  # the same as a normalisation: (x + 0.125) / 1.25 = 0.8·x + 0.1


class Conv2d(nn.Module):
    """A convolution with odd kernel, stride 1 and the same size; its weights are called `w` and `b`.

    Args:
        inputs, outputs: channels.
        kernel: side of the kernel.
        low_precision: follow autocast; else it is computed in float32.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, low_precision: bool = True):
        super().__init__()
        self.padding, self.low_precision = (kernel - 1) // 2, low_precision
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.low_precision or not torch.is_autocast_enabled(x.device.type):
            return F.conv2d(x, self.w, self.b, padding=self.padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.padding)


class Block(nn.Module):
    """x + gain · residual(x), with a 1×1 convolution on x where the widths differ.

    Args:
        inputs, outputs: channels; a quarter of `outputs` inside.
        kernels: sides of the four convolutions' kernels.
        gain: factor of the residual branch.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = (inputs, *[outputs // 4] * 3, outputs)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _groups(
    inputs: int, widths: list[int], blocks: int, kernels: tuple[int, int, int, int], between: nn.Module
) -> OrderedDict[str, nn.Module]:
    """Groups of blocks by their names, and `between` after each but the last."""
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    gain = 1 / (len(widths) * blocks) ** 2
    for g, width in enumerate(widths):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for b in range(blocks):
            layers[f"block_{b + 1}"] = Block(inputs if b == 0 else width, width, kernels, gain)
        if g + 1 < len(widths):
            layers["between"] = between
        groups[f"group_{g + 1}"], inputs = nn.Sequential(layers), width
    return groups


def _output(inputs: int, outputs: int, low_precision: bool = True) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(inputs, outputs, 1, low_precision)))


class Encoder(nn.Module):
    """Images → logits of the codes of their places, and the tokenizer that takes the largest.

    Args:
        width: channels of the first group, a multiple of 4; each group has twice as many as the one before.
        vocabulary: number of codes.
        groups: number of groups of blocks; the images are halved after each but the last, so that the stride is
            2^(groups − 1).
        blocks: blocks of a group.
        mean, std: normalisation of the images that are given, of red, green and blue. By default 0.8·x + 0.1 of pixels
            x from 0 to 1, as DALL-E maps them.

    Source: openai/DALL-E, whose public weights have width 256, 8,192 codes and 4 groups of 2 blocks.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        width: int = 256,
        vocabulary: int = 8192,
        groups: int = 4,
        blocks: int = 2,
        mean: tuple[float, float, float] = MAPPED_MEAN,
        std: tuple[float, float, float] = MAPPED_STD,
    ):
        super().__init__()
        self.vocabulary, self.stride, self.mean, self.std = vocabulary, 2 ** (groups - 1), mean, std
        widths = [width * 2**g for g in range(groups)]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, width, 7))
        layers |= _groups(width, widths, blocks, (3, 3, 3, 1), nn.MaxPool2d(2))
        layers["output"] = _output(widths[-1], vocabulary, low_precision=False)
        self.blocks = nn.Sequential(layers)
        self.num_features = widths[-1]
        self.decoder: Any = None  # a `Decoder`, of a tokenizer whose file has one
        scale = torch.tensor(std) / torch.tensor(MAPPED_STD)
        shift = (torch.tensor(mean) - torch.tensor(MAPPED_MEAN)) / torch.tensor(MAPPED_STD)
        self.is_mapped = (tuple(mean), tuple(std)) == (MAPPED_MEAN, MAPPED_STD)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def mapped(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] as values from 0.1 to 0.9."""
        return images if self.is_mapped else torch.addcmul(self.shift, images, self.scale)

    def unmapped(self, values: Tensor) -> Tensor:
        """Values from 0.1 to 0.9 as normalised images."""
        return values if self.is_mapped else (values - self.shift) / self.scale

    def hidden(self, images: Tensor) -> Tensor:
        """What the last convolution gets: [B, 2^(groups − 1) · width, h, w], at least 0."""
        check.tensor("Encoder", "images", images, "B 3 H W", **{"3": 3})
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            got = f"{images.shape[2]}×{images.shape[3]}"
            raise ValueError(f"Encoder: height and width of images must be divisible by {self.stride}, got {got}")
        x = self.mapped(images)
        for layer in self.blocks[:-1]:
            x = layer(x)
        return x.relu()

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, V, h, w] of normalised images [B, 3, H, W]."""
        output: Any = self.blocks[-1]
        return output.conv(self.hidden(images))

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Codes [B, h, w] int64 of normalised images [B, 3, H, W], those of the largest logits."""
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def pixels(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W] from 0 to 1 that the tokenizer's decoder makes of codes [B, h, w] int64."""
        if self.decoder is None:
            raise ValueError("tokenizer: decoder must be in its file to make pixels of codes, got an encoder alone")
        return unmap_pixels(self.decoder.pixels(codes))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F]: the mean over the places of what the last convolution gets."""
        return self.hidden(images).mean((2, 3))


class Decoder(nn.Module):
    """Codes, as one-hot vectors or as their relaxation → three means and three logarithms of scales for each pixel.

    Args:
        width, vocabulary, groups, blocks: those of the `Encoder`.
        inner: channels of the first convolution.
    """

    def __init__(self, width: int = 256, vocabulary: int = 8192, groups: int = 4, blocks: int = 2, inner: int = 128):
        super().__init__()
        self.vocabulary = vocabulary
        widths = [width * 2**g for g in reversed(range(groups))]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(vocabulary, inner, 1, low_precision=False))
        layers |= _groups(inner, widths, blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2, mode="nearest"))
        layers["output"] = _output(width, 6)
        self.blocks = nn.Sequential(layers)

    def forward(self, codes: Tensor) -> Tensor:
        """Statistics [B, 6, H, W] of codes [B, V, h, w]."""
        return self.blocks(codes)

    def pixels(self, codes: Tensor) -> Tensor:
        """The most likely pixels [B, 3, H, W], values from 0.1 to 0.9, of codes [B, h, w] int64."""
        first: Any = self.blocks[0]
        table = first.w[:, :, 0, 0].T  # a product with one-hot vectors picks its rows
        x = F.embedding(codes, table).permute(0, 3, 1, 2) + first.b[:, None, None]
        for layer in self.blocks[1:]:
            x = layer(x)
        return x[:, :3].sigmoid()


class DiscreteVAE(nn.Module):
    """Encoder and decoder: images → logits → codes → pixels."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def tokenizer(self) -> Encoder:
        """The part that makes codes."""
        return self.encoder

    @torch.no_grad()
    def autoencode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] as their codes show them, normalised alike."""
        return self.encoder.unmapped(self.decoder.pixels(self.encoder.codes(images)))

    def losses(self, images: Tensor, gumbel: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the negative logarithms of the pixels' densities; mean divergence of the codes of a place from
        uniform ones; and the most likely codes [B, h, w].

        Args:
            images: [B, 3, H, W], normalised.
            gumbel: noise [B, V, h, w] of `relax`, which overwrites it.
            tau: temperature.
        """
        logits = self.encoder.logits(images)
        relaxed, divergence = relax(logits, gumbel.to(logits.dtype), tau)
        values = self.encoder.mapped(images).clamp(EPS, 1 - EPS)  # pixels outside 0 … 1 have no density
        nll = logit_laplace_nll(self.decoder(relaxed), values)
        return nll.mean(), divergence.mean(), logits.detach().argmax(1)


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 1 as values from EPS to 1 − EPS."""
    return (1 - 2 * EPS) * pixels + EPS


def unmap_pixels(values: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped to 0 … 1."""
    return ((values - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_nll(statistics: Tensor, values: Tensor) -> Tensor:
    """Negative logarithm of the logit-Laplace density of each value, [B, 3, H, W].

    −ln f(x) = |logit(x) − μ| / b + ln b + ln 2 + ln(x·(1 − x)).

    Args:
        statistics: [B, 6, H, W] μ and ln b of the three channels. Gradient.
        values: [B, 3, H, W] x, above 0 and below 1.

    Source: Ramesh et al., 2021 (DALL-E), appendix A.3.
    """
    location, log_scale = statistics.chunk(2, 1)
    location, log_scale, values = (x.double() if x.dtype == torch.float64 else x.float() for x in (
        location, log_scale, values))  # fmt: skip
    base = (values * (1 - values)).log() + math.log(2)
    return (torch.logit(values) - location).abs() * (-log_scale).exp() + log_scale + base


def load_tokenizer(path: str | Path) -> nn.Module:
    """A frozen tokenizer, in evaluation mode, on the CPU.

    ``tokenizer.codes(images)`` gives the codes [B, h, w] int64 of images [B, 3, H, W] that are normalised by
    ``tokenizer.mean`` and ``tokenizer.std``; H and W are ``tokenizer.stride`` times h and w; codes are below
    ``tokenizer.vocabulary``. Where the run or file has a decoder, ``tokenizer.pixels(codes)`` makes images of codes;
    else ``tokenizer.decoder`` is None.

    Args:
        path: folder of a run of the method `dvae`, whose averaged weights are taken; or a weights file of one, of
            DALL-E's encoder (alone or with its decoder) or of BEiT's own autoencoder, as .safetensors or for
            ``torch.load(weights_only=True)``.

    Raises:
        ValueError: there is no such run or file, or its weights are not those of a tokenizer.
    """
    path = Path(path)
    name = printable(path)
    if path.is_dir():
        try:
            state = checkpoint.load(path / "checkpoints", "dvae")["model"]
        except ValueError as error:
            raise ValueError(f"tokenizer: {name} must be a run of dvae with a checkpoint ({error})") from error
    elif path.is_file():
        state = read_file(path, own_names=True).state
    else:
        raise ValueError(
            f"tokenizer: {name} is neither the folder of a run of dvae nor a weights file: name one, or put it back "
            "there to resume a run that was started with it"
        )
    for prefix in ("ema.", ""):
        if f"{prefix}codebook.weight" in state:
            weights = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(BEiTVAE.parts(prefix))}
            return _frozen(BEiTVAE(*BEiTVAE.sizes(weights)), weights, name)
    for prefix in ("ema.encoder.", "encoder.", ""):
        if f"{prefix}blocks.output.conv.w" in state:
            weights = _part(state, prefix)
            decoded = _part(state, prefix.replace("encoder.", "decoder.")) if prefix else {}
            break
    else:
        raise ValueError(
            f"tokenizer: {name} has no encoder of DALL-E's discrete autoencoder (blocks.output.conv.w): name the "
            "folder of a run of dvae, or the public encoder converted as docs/methods.md describes"
        )
    sizes = _sizes(weights)
    tokenizer = _frozen(Encoder(*sizes), weights, name)
    if "blocks.input.w" in decoded:
        tokenizer.decoder = _frozen(Decoder(*sizes, inner=decoded["blocks.input.w"].shape[0]), decoded, name)
    return tokenizer


def tokenizer_checksum(tokenizer: nn.Module) -> str:
    """16 hexadecimal digits of the weights of a tokenizer from which its codes follow."""
    digest = hashlib.sha256()
    for name, x in sorted(tokenizer.state_dict().items()):
        if not name.startswith(("decoder.", "codebook.")):
            digest.update(f"{name} {list(x.shape)}".encode())
            digest.update(x.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


class TokenizerImages(NamedTuple):
    """What images a tokenizer takes."""

    stride: int  # pixels of a code's place, along a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def tokenizer_images(path: str | Path) -> TokenizerImages:
    """What images the tokenizer of a run or file takes. It is loaded once, until its file changes; see
    `load_tokenizer`."""
    path = Path(path)
    read = [path] if path.is_file() else checkpoint.files(path / "checkpoints")
    return _tokenizer_images(path, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in read))


@functools.lru_cache(maxsize=8)
def _tokenizer_images(path: Path, files: tuple[tuple[str, int, int], ...]) -> TokenizerImages:
    tokenizer: Any = load_tokenizer(path)
    return TokenizerImages(tokenizer.stride, tokenizer.mean, tokenizer.std)


def _frozen(network: nn.Module, weights: dict[str, Tensor], name: str) -> nn.Module:
    """The network with these weights, which never change."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = printable(str(error).splitlines()[-1].strip())
        raise ValueError(f"tokenizer: {name} does not fit {type(network).__name__}: {reason}") from error
    return network.requires_grad_(False).eval()


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a network, without the prefix of their names."""
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(f"{prefix}blocks.")}


def _sizes(weights: dict[str, Tensor]) -> tuple[int, int, int, int]:
    """Width, vocabulary, groups, and blocks of a group, of an encoder's weights."""
    groups = len({name.split(".")[1] for name in weights if name.startswith("blocks.group_")}) or 1
    blocks = len({name.split(".")[2] for name in weights if name.startswith("blocks.group_1.")}) or 1
    output = weights["blocks.output.conv.w"]
    return output.shape[1] // 2 ** (groups - 1), output.shape[0], groups, blocks
