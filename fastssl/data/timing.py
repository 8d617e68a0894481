"""How fast a loader is: images and processor time."""

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Speed(NamedTuple):
    images_per_second: float
    cpu_seconds: float  # a thousand images, of this process and its workers, with what it takes to start them


def speed(start: Callable[[], Iterator[int]], seconds: float, warm_up: int = 4) -> Speed:
    """Runs a loader for about `seconds`.

    Args:
        start: makes a loader and returns an endless iterator of its batches' sizes.
        seconds: measured, after the warm-up.
        warm_up: batches before the clock starts: workers are started, and what they prefetched meanwhile is used up.
    """
    before = _cpu()
    batches = start()
    first = sum(next(batches) for _ in range(warm_up))
    started, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds or not images:
        images += next(batches)
        passed = time.perf_counter() - started
    del batches  # ends the workers, whose time counts from then on
    return Speed(images / passed, (_cpu() - before) / (first + images) * 1000)


def cores() -> int:
    """Those that this process may use, which in a container or a batch job are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> float:
    return sum(os.times()[:4])  # user and system; of this process, and of children that have ended
