"""Sizes at which the preset `small` of each method on two views takes milliseconds, for tests of every method."""

CONTRASTIVE_AND_REDUNDANCY = {
    "simclr_v1": {"hidden": 32, "dim": 16},
    "simclr_v2": {"hidden": 32, "dim": 16},
    "byol": {"hidden": 32, "dim": 16},
    "simsiam": {"hidden": 8, "dim": 16},
    "barlow_twins": {"dim": 16},
    "vicreg": {"dim": 16},
    "instdisc": {"images": 96, "nce_k": 32, "dim": 16, "softmax": False},
    "cmc": {"images": 96, "nce_k": 32, "dim": 16},
    "invaspread": {"dim": 16},
}
