"""Pixels of more than 8 bits as bytes.

Values are scaled by the smallest of these ranges that holds all of them, so that larger values never become darker, and
images of one kind keep one scale:

    0 to 1          floats and booleans       times 255
    0 to 255        8 bits                    as they are
    0 to 4,095      12 bits                   divided by 16
    0 to 65,535     16 bits                   divided by 256 (floats by 257)
    own range       a value is negative or above 65,535: the smallest becomes 0, the largest 255

NaN becomes the lowest value of the range, infinities its ends; they don't count for the choice. Where a format states
the range of its values (PGM, JPEG 2000), there is nothing to choose.
"""

from typing import NamedTuple

import numpy as np

BITS = {255: 8, 4_095: 12, 65_535: 16}  # largest value of a range: its bits
HIGHEST = 65_535


class Values(NamedTuple):
    """Values of an image's pixels as stored, and the rule that makes bytes of them."""

    low: float  # smallest finite value
    high: float  # largest finite value
    rule: str  # "8 bits", "12 bits", "16 bits", "0 to 1" or "own range"


def find_values(values: np.ndarray) -> Values | None:
    """The range of an array of any shape and the rule for it, None if no value is finite.

    Args:
        values: booleans, integers or floats, at least one.
    """
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
        if not values.size:
            return None
    low, high = values.min().item(), values.max().item()
    return Values(low, high, choose_rule(low, high, values.dtype))


def choose_rule(low: float, high: float, dtype: np.dtype) -> str:
    """Name of the range for values from `low` to `high`."""
    if dtype.kind == "b" or (dtype.kind == "f" and low >= 0 and high <= 1):
        return "0 to 1"
    if low < 0 or high > HIGHEST:
        return "own range"
    return f"{next(bits for largest, bits in BITS.items() if high <= largest)} bits"


def to_bytes(values: np.ndarray, scale: Values) -> np.ndarray:
    """Scales values to bytes; those outside of the scale's range become its ends.

    Args:
        values: booleans, integers or floats of any shape.
        scale: its rule, and for "own range" its ends, are applied.

    Returns:
        uint8 of the same shape.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    low, high = find_ends(scale)
    if values.dtype.kind in "iu" and scale.rule.endswith("bits"):
        return (np.clip(values, 0, high) >> (int(high).bit_length() - 8)).astype(np.uint8)
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # in float64, where neither the difference of two float32 nor an int64 overflows; halved, as two float64 would
    halves = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low).clip(low, high) / 2
    return np.rint((halves - low / 2) / (high / 2 - low / 2) * 255).astype(np.uint8)


def find_ends(scale: Values) -> tuple[float, float]:
    """The values that become black and white."""
    if scale.rule == "own range":
        return scale.low, scale.high
    return 0, 1 if scale.rule == "0 to 1" else next(high for high, bits in BITS.items() if scale.rule == f"{bits} bits")
