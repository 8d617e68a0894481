"""Sizes at which the preset `small` of each method takes milliseconds, for tests of every method."""

from typing import Any

import torch
from torch import Tensor

from tests.support.tokenizers import tokenizer_file

SMALL = {  # beside MAE, and the MoCos and DenseCL, whose sizes depend on the test
    "simclr_v1": {"hidden": 32, "dim": 16},
    "simclr_v2": {"hidden": 32, "dim": 16},
    "byol": {"hidden": 32, "dim": 16},
    "simsiam": {"hidden": 8, "dim": 16},
    "barlow_twins": {"dim": 16},
    "vicreg": {"dim": 16},
    "cpc": {"hidden": 16},
    "instdisc": {"images": 96, "nce_k": 32, "dim": 16, "softmax": False},
    "cmc": {"images": 96, "nce_k": 32, "dim": 16},
    "invaspread": {"dim": 16},
    "dino": {"prototypes": 48, "hidden": 16, "bottleneck": 8},
    "ibot": {"prototypes": 48, "hidden": 16, "bottleneck": 8},
    # without what a rank does with its part of the batch alone: KoLeo, the choice of masked crops, the patches' centre
    "dinov2": {
        **{"prototypes": 48, "hidden": 16, "bottleneck": 8, "separate_head": True, "patch_prototypes": 24},
        **{"koleo_weight": 0.0, "mask_probability": 1.0, "mask_ratio": (0.3, 0.3), "centering": "sinkhorn_knopp"},
    },
    "swav": {"prototypes": 12, "hidden": 16, "dim": 8, "queue_size": 64, "queue_start": 0},
    "clip": {"vocabulary": 60},
    "siglip": {"vocabulary": 60},
    "deepcluster": {"clusters": 6, "components": 8},
    "deepcluster_v2": {"prototypes": (6, 5), "hidden": 16, "dim": 8},
    "igpt": {"image_size": (8, 8), "colours": 9},
    "beit": {"tokenizer": tokenizer_file(), "image_size": (16, 16), "mask_patches": 6, "mask_min": 4},
    "simmim": {"image_size": (16, 16)},
    "dvae": {"network": "dalle", "width": 4, "codes": 24, "inner": 6},
}


def extras_of(config: Any, images: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What a batch has beside its views: token ids for a method of images and text."""
    text = getattr(config, "text", None)
    if text is None:
        return {}
    return {"tokens": torch.randint(config.vocabulary, (images, text.length)).to(device)}
