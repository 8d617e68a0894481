"""Throughput of a loader: images per second and processor time."""

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Throughput(NamedTuple):
    """Speed and cost of a loader."""

    images_per_second: float
    cpu_seconds: float  # per 1,000 images, of this process and its workers, their start included


def measure_throughput(start: Callable[[], Iterator[int]], seconds: float, warm_up: int = 4) -> Throughput:
    """Runs a loader for about `seconds`.

    Args:
        start: makes a loader and returns an endless iterator over the sizes of its batches.
        seconds: time to measure, after the warm-up.
        warm_up: number of batches before the measurement, while workers start and prefetched batches are used up.
    """
    cpu_before = _cpu_seconds()
    batches = start()
    warm_up_images = sum(next(batches) for _ in range(warm_up))
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not images:
        images += next(batches)
        elapsed = time.perf_counter() - started
    del batches  # ends the workers, whose processor time is counted only then
    return Throughput(images / elapsed, (_cpu_seconds() - cpu_before) / (warm_up_images + images) * 1000)


def cores() -> int:
    """Number of processor cores that this process may use, which a container or a batch job can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])
