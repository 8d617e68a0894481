"""What a ViT looks at, and what it sees: attention of its last block, and patch features as colours."""

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from fastssl.eval.features import vit_of
from fastssl.eval.reconstruction import as_bytes, first_images, pixels

from .feature_map import principal_components
from .images import COLUMNS, numbered
from .parts import Text, Tiles
from .pictures import tiles
from .run_data import RunData

MOST_HEADS = 6  # largest number of heads with a row of their own
FEWEST_PATCHES = 16  # smallest map that is shown


def attention(run: RunData) -> list[Text | Tiles]:
    """Attention of the class token to the patches in the last block: mean over the heads, then the first heads.

    For a ViT without class token it is the mean over the patches' queries. [] for another encoder, or a small map.
    """
    vit = vit_of(run.method)
    if vit is None or run.test_source is None or np.prod(_grid(vit, run.size)) < FEWEST_PATCHES:
        return []
    images = first_images(run.test_source, run.size, COLUMNS, **run.run.normalisation)
    maps = attention_of_last_block(vit, images.to(next(vit.parameters()).device))
    grid, heads = _grid(vit, run.size), maps.shape[1]
    rows = [
        ("input", as_bytes(pixels(images, **run.run.normalisation))),
        ("mean", heat(maps.mean(1).unflatten(1, grid), run.size)),
    ]
    rows += [(f"head {h + 1}", heat(maps[:, h].unflatten(1, grid), run.size)) for h in range(min(heads, MOST_HEADS))]
    shown = f" The first {MOST_HEADS} of {heads} heads." if heads > MOST_HEADS else ""
    token = "class token" if vit.cls_token is not None else "mean of the patches"
    text = Text(f"Attention of the {token}; each map from its smallest value, dark, to its largest, bright.{shown}")
    return [text, tiles((name, row, numbered(name, row)) for name, row in rows)]


def patch_colours(run: RunData) -> list[Text | Tiles]:
    """Patch features of held-out images as colours: similar patches have similar colours. [] for a small map."""
    if run.test_source is None:
        return []
    images = first_images(run.test_source, run.size, COLUMNS, **run.run.normalisation)
    features = feature_maps(run.method.encoder, images.to(next(run.method.parameters()).device))
    if features is None or features.shape[1] * features.shape[2] < FEWEST_PATCHES:
        return []
    colours, share = principal_colours(features)
    rows = [("input", as_bytes(pixels(images, **run.run.normalisation))), ("features", _enlarge(colours, run.size))]
    text = Text(f"The first three principal components, {share:.0%} of the variance, as red, green and blue.")
    return [text, tiles((name, row, numbered(name, row)) for name, row in rows)]


@torch.no_grad()
def attention_of_last_block(vit: nn.Module, images: Tensor) -> Tensor:
    """Attention to the patches in a ViT's last block: [N, heads, L], of the class token, or the mean over the patches.

    Args:
        vit: a `ViT`.
        images: [N, 3, H, W], normalised.
    """
    module, inputs = vit.blocks[-1].attn, []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.extend(args))
    try:
        vit.forward_features(images)
    finally:
        handle.remove()
    tokens, bias = [*inputs, None][:2]  # only BEiT's blocks give a bias
    queries = slice(1) if vit.cls_token is not None else slice(vit.num_prefix_tokens, None)
    weights = module.weights(tokens, queries, bias)
    return weights[..., vit.num_prefix_tokens :].mean(2).cpu()


@torch.no_grad()
def feature_maps(encoder: nn.Module, images: Tensor) -> Tensor | None:
    """Features of the places of an image [N, rows, columns, F]: patch tokens of a ViT, or the last map of a ResNet.

    None for another encoder.
    """
    vit = vit_of(encoder)
    if vit is not None:
        tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        return tokens.float().unflatten(1, _grid(vit, images.shape[2:])).cpu()
    if not isinstance(getattr(encoder, "avgpool", None), nn.Module):
        return None
    maps: list[Tensor] = []
    handle = encoder.avgpool.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    try:
        encoder(images)
    finally:
        handle.remove()
    return maps[0].float().permute(0, 2, 3, 1).cpu() if maps and maps[0].ndim == 4 else None


def principal_colours(features: Tensor) -> tuple[np.ndarray, float]:
    """(colours uint8 [N, rows, columns, 3], share of the variance) of features [N, rows, columns, F].

    Each of three principal components runs from its 2nd percentile to its 98th over all places of all images.
    """
    components, share = principal_components(features.flatten(0, 2).double(), 3)
    low, high = components.quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    scaled = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(*features.shape[:3], 3)
    return (255 * scaled).round().to(torch.uint8).numpy(), share


def heat(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Maps [N, rows, columns] as images uint8 [N, H, W, 3], each from its smallest value to its largest."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = ((maps - low) / (high - low).clamp_min(1e-12)).numpy()
    colours = matplotlib.colormaps["inferno"](scaled)[..., :3]
    return _enlarge((255 * colours).round().astype(np.uint8), size)


def _enlarge(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Images [N, rows, columns, 3] in pixels [N, H, W, 3], without interpolation."""
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, images.shape[1:3]))
    return images[:, rows][:, :, columns]


def _grid(vit: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // vit.patch_size, size[1] // vit.patch_size
