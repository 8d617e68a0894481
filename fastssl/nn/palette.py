"""Palettes: a few colours that stand for all, as a buffer of a module, by k-means over pixels or from a file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.distributed import all_gather_object

from .kmeans import k_means, nearest_centroid
from .masking import seeded_noise

PIXELS = 2**17  # of all images together, that k-means takes
ROUNDS = 12  # of k-means, after centres that are already spread
_PLACES = 0x70616C65747465  # keeps these draws independent of others from the same numbers


class Palette(nn.Module):
    """V colours, and the codes of images in them.

    Until `prepare` they are spread evenly over all colours.

    Args:
        colours: V.
        mean, std: of normalised images, for red, green and blue in 0 … 1.
        file: .npy file of the colours; None for k-means over pixels of the images.
    """

    clusters: Tensor
    is_set: Tensor

    def __init__(self, colours: int, mean: tuple[float, ...], std: tuple[float, ...], file: str | None = None):
        super().__init__()
        self.register_buffer("clusters", spread_colours(colours))  # [V, 3], −1 … 1
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))
        self.mean, self.std, self.file = mean, std, file

    def check_file(self) -> None:
        """Check that the file, if there is one, can be read.

        Raises:
            ValueError: as by `read_palette`.
        """
        if self.file is not None:
            read_palette(self.file, len(self.clusters))

    @torch.no_grad()
    def prepare(self, images: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        """Take the colours of the file, or of `fit_palette` over some pixels of the images.

        Args:
            images: this rank's part of the images, normalised [B, 3, H, W], with their numbers [B] int64.
            count: number of all images.
        """
        if self.file is not None:
            clusters = read_palette(self.file, len(self.clusters))
        else:
            none = self.clusters.new_empty(0, 3, dtype=torch.float64)
            parts = [self.sample(batch, index, count) for batch, index in images]
            clusters = fit_palette(torch.cat([none, *parts]), len(self.clusters))
        self.clusters.copy_(clusters)
        self.is_set.fill_(True)

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Numbers [B, H·W] int64 of the nearest colours of normalised images [B, 3, H, W], line by line.

        Pixels are rounded to bytes; of equally near colours the first is taken.

        Memory: distances of a tile of the pixels, see `nearest_centroid`.

        Source: Chen et al., 2020 (iGPT), its code.
        """
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.bytes(images) / 127.5 - 1
            nearest = nearest_centroid(pixels.reshape(-1, 3), self.clusters.to(pixels.dtype), spherical=False)
        return nearest.view(len(images), -1)

    def images(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised images [B, 3, H, W] of codes [B, H·W]; their colours are rounded to bytes."""
        pixels = (127.5 * (self.clusters[codes] + 1)).round() / 255
        pixels = (pixels - pixels.new_tensor(self.mean)) / pixels.new_tensor(self.std)
        return pixels.transpose(1, 2).unflatten(2, size)

    def bytes(self, images: Tensor) -> Tensor:
        """Colours [B, H·W, 3] from 0 to 255 of normalised images, line by line, rounded."""
        mean, std = (images.new_tensor(numbers).view(3, 1) for numbers in (self.mean, self.std))
        return ((images.flatten(2) * std + mean) * 255).round().transpose(1, 2)

    def sample(self, images: Tensor, index: Tensor, count: int) -> Tensor:
        """Some pixels [M, 3] of images, from 0 to 255 in float64: of all `count` images about `PIXELS` together, and
        all pixels where they have no more.

        Args:
            images: [B, 3, H, W] normalised.
            index: [B] int64, numbers of the images. The pixels depend on them alone.
            count: number of all images.
        """
        chosen = index % -(-count // PIXELS) == 0
        pixels, index = self.bytes(images[chosen]).double(), index[chosen]
        if (many := max(1, PIXELS // count)) >= pixels.shape[1]:
            return pixels.reshape(-1, 3)
        places = seeded_noise(many, _PLACES, index).double() * pixels.shape[1]
        return pixels.gather(1, places.long()[..., None].expand(-1, -1, 3)).reshape(-1, 3)


def spread_colours(count: int) -> Tensor:
    """Colours [count, 3] in −1 … 1 that fill the cube evenly.

    Source: Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018: the sequence R3.
    """
    ratio = 1.2207440846057596  # the root of x⁴ = x + 1
    steps = torch.arange(1, count + 1, dtype=torch.float64)[:, None] * torch.tensor([1 / ratio, ratio**-2, ratio**-3])
    return (2 * (steps + 0.5).remainder(1) - 1).float()


def fit_palette(pixels: Tensor, colours: int) -> Tensor:
    """Colours [V, 3] in −1 … 1 by k-means over the pixels of all ranks: equal on all of them and on any number.

    Sums of bytes in float64 are exact, so their order does not matter. The first centres are drawn one after another,
    far from each other (k-means++), with a fixed seed. With fewer different colours than V some are left over.

    Args:
        pixels: [M, 3] float64 of this rank, whole numbers from 0 to 255; M may be 0 on some ranks.
        colours: V.

    Raises:
        ValueError: no rank has a pixel.

    Source: Chen et al., 2020 (iGPT), section 3.2; Arthur and Vassilvitskii, "k-means++", 2007.
    """
    gathered = np.concatenate(all_gather_object(pixels.to(torch.uint8).cpu().numpy()))
    if not len(gathered):
        raise ValueError("palette: k-means needs pixels, got none: no image could be decoded")
    different, counts = np.unique(gathered, axis=0, return_counts=True)
    first = torch.from_numpy(_spread_centres(different.astype(np.float64), counts, colours))
    centres, _ = k_means(pixels, first.to(pixels), ROUNDS, spherical=False)
    return (centres / 127.5 - 1).clamp(-1, 1)


def _spread_centres(points: np.ndarray, counts: np.ndarray, number: int) -> np.ndarray:
    """Centres [number, 3] among points, each drawn with a probability ∝ its count times its squared distance from the
    centres before it; where all points are centres, evenly spread ones follow."""
    centres = (spread_colours(number).double().numpy() + 1) * 127.5
    uniform = np.random.default_rng(0).random(number)
    distances = np.ones(len(points))
    for i in range(number):
        cumulative = np.cumsum(counts * distances)
        if cumulative[-1] == 0:
            break
        centres[i] = points[np.searchsorted(cumulative, uniform[i] * cumulative[-1], side="right")]
        squares = ((points - centres[i]) ** 2).sum(1)
        distances = squares if i == 0 else np.minimum(distances, squares)
    return centres


def read_palette(path: str, colours: int) -> Tensor:
    """Colours [V, 3] in −1 … 1 of a .npy file, as kmeans_centers.npy of iGPT.

    Raises:
        ValueError: the file is missing or damaged, or does not hold V such colours.
    """
    try:
        clusters = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is no .npy file of numbers"
        raise ValueError(f"palette: {path} cannot be read ({reason}): name a .npy file with [{colours}, 3]") from error
    fits = isinstance(clusters, np.ndarray) and clusters.shape == (colours, 3) and clusters.dtype.kind == "f"
    if not fits or not (np.abs(clusters) <= 1).all():  # false for NaN
        found = f"{clusters.dtype} {list(clusters.shape)}" if isinstance(clusters, np.ndarray) else "several arrays"
        found += f" from {clusters.min():g} to {clusters.max():g}" if fits else ""
        raise ValueError(
            f"palette: {path} must hold {colours} colours (--colours), floats [{colours}, 3] in -1 ... 1, got {found}"
        )
    return torch.from_numpy(clusters.astype(np.float32))
