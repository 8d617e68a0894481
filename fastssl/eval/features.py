"""Features of all images of a source."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, evaluation
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.distributed import all_gather, all_gather_object, rank, world_size
from fastssl.nn import ViT


def evaluation_loader(
    source: Source,
    size: tuple[int, int],
    batch_size: int = 256,
    part: tuple[int, int] = (0, 1),
    centre: float | None = None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    **loading: Any,
) -> Loader:
    """A loader of every image that can be decoded, in the source's order, one centre crop each.

    Args:
        source: the images.
        size: (height, width) of the crops in pixels.
        batch_size: images a batch.
        part: (rank, world): the part of the images, which may be empty.
        centre: share of the sides that a crop takes. None: the papers' evaluation, the centre of 224 pixels of a side
            of 256 in proportion for another `size`, and of images no larger than `size` the whole (1.0).
        mean, std: what pixels are normalised by.
        loading: `device`, `workers` and `engine`, as for `Loader`.
    """
    small = source.size is not None and max(source.size) <= max(size)
    augmentation = evaluation(size, centre or (1.0 if small else 0.875), mean, std)
    number, world = part
    return Loader(source, augmentation, batch_size, train=False, rank=number, world=world, max_bad=world, **loading)


@torch.no_grad()
def extract(
    features: Callable[[Tensor], Tensor],
    source: Source,
    size: tuple[int, int],
    *,
    batch_size: int = 256,
    part: tuple[int, int] = (0, 1),
    **loading: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [N, F] float32, labels [N], indices [N]) of every image that can be decoded.

    Args:
        features: normalised images [B, 3, H, W] → [B, F], such as a method's `features` in evaluation mode.
        source: images to extract.
        size: (height, width) in pixels that `features` takes.
        batch_size: images a batch.
        part: (rank, world): the part of the images to extract, which may be empty.
        loading: `centre`, `mean`, `std`, `device`, `workers` and `engine`, as for `evaluation_loader`.

    Raises:
        ValueError: none of the images can be decoded.
    """
    world, device = part[1], loading.get("device", "cpu")
    loader = evaluation_loader(source, size, batch_size, part, **loading)
    parts = [(features(batch.views[0]).float(), batch.label, batch.index) for batch in loader.epoch(0)]
    if not parts and world == 1:
        raise ValueError("features: none of the images can be decoded")
    if not parts:  # an empty table of the right width, for collectives
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return features(torch.zeros(1, 3, *size, device=device))[:0].float(), empty, empty
    return tuple(torch.cat(column) for column in zip(*parts))


def extract_on_all_ranks(
    features: Callable[[Tensor], Tensor], source: Source, size: tuple[int, int], **loading
) -> tuple[Tensor, Tensor]:
    """(features, labels) of all images on every rank, in the source's order; each rank extracts its part.

    Args:
        features, source, size: as for `extract`.
        loading: as for `extract`.
    """
    table = extract(features, source, size, part=(rank(), world_size()), **loading)
    x, labels, index = map(all_gather_uneven, table)
    if not len(x):
        raise ValueError("features: none of the images can be decoded")
    order = index.argsort()
    return x[order], labels[order]


def all_gather_uneven(x: Tensor) -> Tensor:
    """Rows [B, …] of every rank, where B may differ between ranks, in rank order; no gradient."""
    sizes = all_gather_object(len(x))
    if len(sizes) == 1:
        return x
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    return torch.cat([part[:size] for part, size in zip(all_gather(padded).chunk(len(sizes)), sizes)])


def vit_of(module: nn.Module) -> ViT | None:
    """The `ViT` that a method's encoder is, or the module itself; None for another encoder."""
    encoder = getattr(module, "encoder", module)
    return encoder if isinstance(encoder, ViT) else None


def block_features(method: nn.Module, blocks: tuple[int, ...]) -> tuple[dict[str, int], Callable[[Tensor], Tensor]]:
    """Kinds of features of a ViT's last blocks, as DINO's and DINOv2's linear evaluations compare them.

    For each number n of `blocks`: the class tokens of the last n blocks, and these with the mean of the last block's
    patch tokens; for a ViT without class token the means of the patch tokens of the last n blocks.

    Args:
        method: its encoder is a `ViT`.
        blocks: numbers of blocks, each 1 to the depth.

    Returns: ({name of a kind: its width F}, function images [B, 3, H, W] → all kinds side by side [B, Σ F]).

    Raises:
        ValueError: the encoder is not a `ViT`, or has fewer blocks.

    Source: Caron et al., 2021 (DINO), `eval_linear.py`; Oquab et al., 2024 (DINOv2), section B.3.
    """
    encoder = vit_of(method)
    if encoder is None:
        raise ValueError(f"eval: --blocks is for ViTs, and the encoder of {type(method).__name__} is not one")
    depth, width = len(encoder.blocks), encoder.embed_dim
    if max(blocks) > depth:
        raise ValueError(f"eval: --blocks must be at most the {depth} blocks of the encoder, got {max(blocks)}")
    with_token, prefix = encoder.cls_token is not None, encoder.num_prefix_tokens
    kinds = {}
    for n in blocks:
        last = "last block" if n == 1 else f"last {n} blocks"
        if with_token:
            kinds |= {f"class token of {last}": n * width, f"class token of {last}, patch mean": (n + 1) * width}
        else:
            kinds[f"patch mean of {last}"] = n * width

    def features(images: Tensor) -> Tensor:
        tokens = encoder.last_tokens(images, max(blocks))
        mean, parts = tokens[-1][:, prefix:].mean(1), []
        for n in blocks:
            if with_token:
                token = torch.cat([x[:, 0] for x in tokens[-n:]], 1)
                parts += [token, token, mean]
            else:
                parts += [x[:, prefix:].mean(1) for x in tokens[-n:]]
        return torch.cat(parts, 1)

    return kinds, features


def features_of(method: nn.Module, pool: str | None = None) -> Callable[[Tensor], Tensor]:
    """The function that computes features: the method's own, or with `pool` that of its ViT encoder with this pooling.

    Raises:
        ValueError: `pool` is given and the encoder is not a `ViT`.
    """
    if pool is None:
        return method.features
    encoder = vit_of(method)
    if encoder is None:
        raise ValueError(f"eval: --pool is for ViTs, and the encoder of {type(method).__name__} is not one")
    return functools.partial(encoder.features, pool=pool)
