"""Random draws of an augmentation: a function of (seed, epoch, index, view) alone.

Every engine makes its views from these numbers. So an augmentation does not depend on the engine, the batch, or the
number of workers or ranks, and a run resumes without the state of a generator. The generator is SplitMix64 (Steele, Lea
and Flood, 2014) in counter mode, for a whole batch at a time.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from .augmentation import Augmentation, View
from .random_augment import COUNT, draw_changes

ATTEMPTS = 10  # number of random windows to try before the centre is taken, as in torchvision's RandomResizedCrop
ASPECT = (3 / 4, 4 / 3)  # range of width / height
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws(NamedTuple):
    """Random numbers for one view of B samples: three fields for `windows`, arguments of `augment_`, and changes."""

    area: np.ndarray  # [B, ATTEMPTS] float64, share of the image's area
    aspect: np.ndarray  # [B, ATTEMPTS] float64, width / height
    place: np.ndarray  # [B, 2] float64 in [0, 1), position of the window between top and bottom, left and right
    jitter: np.ndarray  # [B, 4] float32, factors of brightness, contrast and saturation, and rotation of the hue
    order: np.ndarray  # [B, 4] int64, order of these four steps
    grey: np.ndarray  # [B] bool
    sigma: np.ndarray  # [B] float32, pixels; 0 for no blur
    solarize: np.ndarray  # [B] bool
    flip: np.ndarray  # [B] bool
    changes: np.ndarray  # [B, 2] int64, of `random_augment_`; 0 for none

    @property
    def colours(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `fastssl.ops.augment_`, as arrays."""
        return self.jitter, self.order, self.grey, self.sigma, self.solarize, self.flip

    def take(self, rows: list[int]) -> "Draws":
        """The draws of the samples in these rows."""
        return Draws(*(column[rows] for column in self))


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Seeds [B] int64 ≥ 0 from several integers or arrays of integers; neighbouring numbers give unrelated seeds."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _scramble(state + np.asarray(number).astype(np.uint64) + _GOLDEN)
    return (state & np.uint64(2**63 - 1)).astype(np.int64)


def _scramble(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function."""
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def draw_views(augmentation: Augmentation, seeds: np.ndarray) -> list[Draws]:
    """Draws of each view of an augmentation for the samples with these seeds [B]."""
    return [draw(view, number, seeds) for view, number in zip(augmentation.views, augmentation.sources)]


def windows_of_views(augmentation: Augmentation, draws: list[Draws], sizes: np.ndarray) -> list[np.ndarray]:
    """The windows [B, 4] of each view, see `windows`."""
    found: list[np.ndarray] = []
    for view, drawn in zip(augmentation.views, draws):
        found.append(found[-1] if view.same_crop else windows(view, drawn, sizes))
    return found


def draw(view: View, number: int, seeds: np.ndarray) -> Draws:
    """Draws of view `number` of an augmentation for the samples with these seeds [B]."""
    numbers = 2 * ATTEMPTS + 13 + 3 * COUNT * view.random_augment
    counter = np.arange(1, numbers + 1, dtype=np.uint64) * _GOLDEN
    streams = mix(seeds, number).astype(np.uint64)
    uniform = (_scramble(streams[:, None] + counter) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    area, aspect, place, strength, rest, more = np.split(uniform, np.cumsum((ATTEMPTS, ATTEMPTS, 2, 4, 7)), axis=1)
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
        changes=draw_changes(more) if view.random_augment else np.zeros((len(seeds), COUNT), np.int64),
    )


def _between(uniform: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _jitter(view: View, uniform: np.ndarray) -> np.ndarray:
    """Factors of torchvision's ColorJitter: in [max(0, 1 − strength), 1 + strength], the hue's in ±strength."""
    strengths = np.asarray(view.jitter)
    identity = np.array([1, 1, 1, 0])
    low = np.where(identity == 1, np.maximum(0, 1 - strengths), -strengths)
    return _between(uniform, low, identity + strengths)


@functools.cache
def _orders() -> np.ndarray:
    """The 24 orders of four steps."""
    return np.array(list(itertools.permutations(range(4))))


def windows(view: View, draws: Draws, sizes: np.ndarray) -> np.ndarray:
    """The windows that a view takes from images of these sizes [B, 2]: top, left, height, width in pixels, [B, 4]."""
    if view.crop is not None:
        return _random_windows(draws, sizes)
    window = sizes
    if view.centre is not None:  # a share of the sides of the largest window with the view's aspect
        scale = (sizes / np.asarray(view.size)).min(axis=1, keepdims=True)
        window = np.clip(np.rint(view.centre * scale * np.asarray(view.size)), 1, sizes).astype(np.int64)
    return np.concatenate([(sizes - window) // 2, window], axis=1)


def _random_windows(draws: Draws, sizes: np.ndarray) -> np.ndarray:
    """Windows of torchvision's RandomResizedCrop: the first of ten that fits, else the middle, cut to the aspect."""
    height, width = sizes.T[:, :, None]
    area = draws.area * height * width
    widths, heights = np.rint(np.sqrt(area * draws.aspect)), np.rint(np.sqrt(area / draws.aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)[:, None]
    window = np.concatenate([np.take_along_axis(side, first, 1) for side in (heights, widths)], axis=1)
    middle = np.concatenate(
        [np.minimum(height, np.rint(width / ASPECT[0])), np.minimum(width, np.rint(height * ASPECT[1]))], axis=1
    )
    any_fits = fits.any(axis=1, keepdims=True)
    window = np.where(any_fits, window, np.maximum(middle, 1)).astype(np.int64)
    corner = np.where(any_fits, draws.place * (sizes - window + 1), (sizes - window) // 2).astype(np.int64)
    return np.concatenate([corner, window], axis=1)
