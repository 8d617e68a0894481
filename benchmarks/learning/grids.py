"""What a sweep tries of each method."""


def _either(sgd: tuple[float, ...], adamw: tuple[float, ...], **values: tuple) -> tuple[dict[str, tuple], ...]:
    """One grid for each optimizer: learning rates for a batch of 256."""
    return {"optimizer": ("sgd",), "lr": sgd, **values}, {"optimizer": ("adamw",), "lr": adamw, **values}


# The product of all values, or of several grids; of four trials and more a sweep drops the worse two thirds twice.
GRIDS: dict[str, dict[str, tuple] | tuple[dict[str, tuple], ...]] = {
    "moco_v1": _either((0.6, 1.2), (0.01, 0.02)),
    "moco_v2": _either((0.6, 1.2), (0.01, 0.02)),
    "moco_v3": _either((0.6, 1.2), (0.01, 0.02)),
    "densecl": _either((0.6, 1.2), (0.01, 0.02)),
    "simclr_v1": _either((0.4, 0.8), (0.01, 0.02)),
    "simclr_v2": _either((0.4, 0.8), (0.01, 0.02)),
    "byol": _either((0.4, 0.8), (0.01, 0.02)),
    "simsiam": _either((0.4, 0.8), (0.01, 0.02)),
    "barlow_twins": _either((0.02, 0.06), (0.01, 0.02)),
    "vicreg": _either((0.2, 0.4), (0.01, 0.02)),
    "invaspread": _either((0.3, 0.6), (0.01, 0.02)),
    "instdisc": _either((0.3, 0.6), (0.01, 0.02)),
    "cmc": _either((0.3, 0.6), (0.01, 0.02)),
    "swav": _either((0.4, 0.8), (0.01, 0.02)),
    "deepcluster": _either((0.2, 0.4), (0.01, 0.02)),
    "deepcluster_v2": _either((0.4, 0.8), (0.01, 0.02)),
    "dino": _either((0.8, 1.6), (0.01, 0.02)),
    "cpc": {"lr": (0.008, 0.016, 0.03), "crop_min": (0.4, 0.6)},
    "ibot": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (32, 64), "ema_momentum": (0.95, 0.98)},
    "dinov2": {"lr": (4e-3, 8e-3, 1.6e-2), "batch_size": (32, 64), "ema_momentum": (0.9, 0.98)},
    "mae": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64), "mask_ratio": (0.6, 0.75)},
    "simmim": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64), "layer_scale": (0.0, 0.1)},
    "beit": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64)},
    "dvae": {"lr": (2e-2, 4e-2, 8e-2), "batch_size": (16, 32)},
    "igpt": {"lr": (0.02, 0.04, 0.08), "batch_size": (16, 32), "colours": (16, 32)},
    "clip": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (64, 128)},
    "siglip": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (64, 128)},
    "albef": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (32, 64)},
}
