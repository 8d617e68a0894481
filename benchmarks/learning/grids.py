"""What a sweep tries of each method: a recipe comes from here, not from somebody's hands."""

# The product of all values, or of each of several grids, such as one for each optimizer; the sweep drops the worse two
# thirds of the trials twice.
GRIDS: dict[str, dict[str, tuple] | tuple[dict[str, tuple], ...]] = {
    "moco_v1": {"lr": (0.3, 0.6, 1.2), "batch_size": (32, 64), "tau": (0.07, 0.2)},
    "moco_v2": {"lr": (0.3, 0.6, 1.2), "batch_size": (32, 64), "tau": (0.1, 0.2)},
    "moco_v3": {"lr": (0.3, 0.6, 1.2), "batch_size": (32, 64), "ema_momentum": (0.95, 0.99)},
    "densecl": {"lr": (0.3, 0.6, 1.2), "batch_size": (32, 64), "dense_weight": (0.2, 0.5)},
    "simclr_v1": {"lr": (0.2, 0.4, 0.8), "batch_size": (64, 128), "tau": (0.1, 0.2)},
    "simclr_v2": {"lr": (0.2, 0.4, 0.8), "batch_size": (64, 128), "tau": (0.1, 0.2)},
    "byol": {"lr": (0.2, 0.4, 0.8), "batch_size": (32, 64), "ema_momentum": (0.95, 0.99)},
    "simsiam": {"lr": (0.2, 0.4, 0.8), "batch_size": (32, 64), "crop_min": (0.25, 0.4)},
    "barlow_twins": {"lr": (0.02, 0.06, 0.2), "batch_size": (64, 128), "redundancy_weight": (0.0051, 0.02)},
    "vicreg": {"lr": (0.2, 0.4, 0.8), "batch_size": (64, 128), "crop_min": (0.25, 0.4)},
    "invaspread": {"lr": (0.1, 0.3, 0.6), "batch_size": (32, 64), "tau": (0.1, 0.2)},
    "instdisc": {"lr": (0.1, 0.3, 0.6), "batch_size": (32, 64), "tau": (0.1, 0.2)},
    "cmc": {"lr": (0.1, 0.3, 0.6), "batch_size": (32, 64), "tau": (0.07, 0.2)},
    "cpc": {"lr": (0.008, 0.016, 0.03), "batch_size": (32, 64), "crop_min": (0.4, 0.6)},
    "swav": {"lr": (0.2, 0.4, 0.8), "batch_size": (32, 64), "tau": (0.1, 0.2)},
    "deepcluster": {"lr": (0.2, 0.4, 0.8), "batch_size": (32, 64), "clusters": (20, 40)},
    "deepcluster_v2": {"lr": (0.4, 0.8, 1.6), "batch_size": (32, 64), "tau": (0.1, 0.2)},
    "dino": {"lr": (0.8, 1.6, 3.2), "batch_size": (32, 64), "teacher_temp": (0.04, 0.06)},
    "ibot": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (32, 64), "ema_momentum": (0.95, 0.98)},
    "dinov2": {"lr": (4e-3, 8e-3, 1.6e-2), "batch_size": (32, 64), "ema_momentum": (0.9, 0.98)},
    "mae": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64), "mask_ratio": (0.6, 0.75)},
    "simmim": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64), "mask_ratio": (0.5, 0.6)},
    "beit": {"lr": (3e-3, 6e-3, 1.2e-2), "batch_size": (32, 64)},
    "dvae": {"lr": (2e-2, 4e-2, 8e-2), "batch_size": (16, 32)},
    "igpt": {"lr": (0.02, 0.04, 0.08), "batch_size": (16, 32), "colours": (16, 32)},
    "clip": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (64, 128)},
    "siglip": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (64, 128)},
    "albef": {"lr": (2e-3, 4e-3, 8e-3), "batch_size": (32, 64)},
}
