"""What chance decides about a sample, from (seed, epoch, index, view) alone: every engine makes views of these numbers.

So neither the engine, nor the batch, nor the number of workers or ranks has a part in an augmentation, and a run goes
on without the state of any generator. The generator is SplitMix64 (Steele, Lea and Flood, 2014) by counter, whole
batches at a time.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from .augmentation import View

ATTEMPTS = 10  # at a window that fits into the image; then its middle, as torchvision's RandomResizedCrop does
ASPECT = (3 / 4, 4 / 3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws(NamedTuple):
    """Of one view of B samples: three for `windows`, then `colours`, the arguments of `fastssl.ops.augment_`."""

    area: np.ndarray  # [B, ATTEMPTS] float64, share of the image's area
    aspect: np.ndarray  # [B, ATTEMPTS] float64, width / height
    place: np.ndarray  # [B, 2] float64 in [0, 1), of the room above and to the left of the window
    jitter: np.ndarray  # [B, 4] float32, factors of brightness, contrast, saturation; turn of the hue
    order: np.ndarray  # [B, 4] int64, of the four
    grey: np.ndarray  # [B] bool
    sigma: np.ndarray  # [B] float32, pixels; 0 for no blur
    solarize: np.ndarray  # [B] bool
    flip: np.ndarray  # [B] bool

    @property
    def colours(self) -> tuple[np.ndarray, ...]:
        """What `augment_` takes."""
        return self.jitter, self.order, self.grey, self.sigma, self.solarize, self.flip

    def take(self, rows) -> "Draws":
        """Those of some of the samples."""
        return Draws(*(column[rows] for column in self))


def mix(*numbers) -> np.ndarray:
    """Seeds [B] int64 ≥ 0 from several integers or arrays of them: neighbours get unrelated streams."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _finalised(state + np.asarray(number).astype(np.uint64) + _GOLDEN)
    return (state & np.uint64(2**63 - 1)).astype(np.int64)


def _finalised(state: np.ndarray) -> np.ndarray:
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def draw(view: View, number: int, seeds: np.ndarray) -> Draws:
    """The draws of view `number` of the samples with these seeds [B]."""
    counter = np.arange(1, 2 * ATTEMPTS + 14, dtype=np.uint64) * _GOLDEN
    streams = mix(seeds, number).astype(np.uint64)
    uniform = (_finalised(streams[:, None] + counter) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    area, aspect, place, strength, rest = np.split(uniform, np.cumsum((ATTEMPTS, ATTEMPTS, 2, 4)), axis=1)
    jittered, grey, blurred, sigma, solarize, flip, shuffle = rest.T
    return Draws(
        area=_between(area, *(view.crop or (1, 1))),
        aspect=np.exp(_between(aspect, *np.log(ASPECT))),
        place=place,
        jitter=np.where((jittered < view.jitter_p)[:, None], _jitter(view, strength), (1, 1, 1, 0)).astype(np.float32),
        order=_orders()[(shuffle * 24).astype(np.int64)],
        grey=grey < view.grayscale_p,
        sigma=np.where(blurred < view.blur_p, _between(sigma, *view.blur_sigma), 0).astype(np.float32),
        solarize=solarize < view.solarize_p,
        flip=flip < view.flip_p,
    )


def _between(uniform: np.ndarray, low, high) -> np.ndarray:
    return low + (high - low) * uniform


def _jitter(view: View, uniform: np.ndarray) -> np.ndarray:
    """Factors in [max(0, 1 − strength), 1 + strength], the hue in [−strength, strength]: torchvision's ColorJitter."""
    strengths = np.asarray(view.jitter)
    middle = np.array([1, 1, 1, 0])
    low = np.where(middle == 1, np.maximum(0, 1 - strengths), -strengths)
    return _between(uniform, low, middle + strengths)


@functools.cache
def _orders() -> np.ndarray:
    return np.array(list(itertools.permutations(range(4))))


def windows(view: View, draws: Draws, sizes: np.ndarray) -> np.ndarray:
    """[B, 4] int64: top, left, height and width, in pixels, of what the view shows of images of these sizes [B, 2]."""
    if view.crop is not None:
        return _random_windows(draws, sizes)
    shown = sizes
    if view.centre is not None:  # the largest window of the view's aspect, and that share of its sides
        fit = (sizes / np.asarray(view.size)).min(axis=1, keepdims=True)
        shown = np.clip(np.rint(view.centre * fit * np.asarray(view.size)), 1, sizes).astype(np.int64)
    return np.concatenate([(sizes - shown) // 2, shown], axis=1)


def _random_windows(draws: Draws, sizes: np.ndarray) -> np.ndarray:
    """torchvision's RandomResizedCrop: the first of ten windows that fits, else the middle, cut to the aspect."""
    height, width = sizes.T[:, :, None]
    area = draws.area * height * width
    wide, tall = np.rint(np.sqrt(area * draws.aspect)), np.rint(np.sqrt(area / draws.aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.argmax(axis=1)[:, None]
    shown = np.concatenate([np.take_along_axis(side, first, 1) for side in (tall, wide)], axis=1)
    widest = np.concatenate(
        [np.minimum(height, np.rint(width / ASPECT[0])), np.minimum(width, np.rint(height * ASPECT[1]))], axis=1
    )
    found = fits.any(axis=1, keepdims=True)
    shown = np.where(found, shown, np.maximum(widest, 1)).astype(np.int64)
    corner = np.where(found, draws.place * (sizes - shown + 1), (sizes - shown) // 2).astype(np.int64)
    return np.concatenate([corner, shown], axis=1)
