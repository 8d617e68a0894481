"""Speed, processor time and memory of a loader, with the processes that it starts. Linux counts them in /proc."""

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .machine import OtherPrograms

Batches = Iterator[list[Tensor]]  # endless: the views of each batch, normalised floats [B, 3, H, W]


class Cost(NamedTuple):
    """What a loader did and took."""

    images_per_second: float
    cpu_seconds: float  # per 1,000 images, of this process and those it started, without their start
    memory_mb: float  # peak while it ran, beyond what this process and those it had started held before
    others: float  # share of the processors that other programs used meanwhile


def tree() -> list[int]:
    """Ids of this process and of all that descend from it and still run."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [os.getpid()]
    for process in found:  # grows while it is read
        found += children.get(process, [])
    return found


def cpu_seconds(processes: list[int]) -> float:
    """User and system time of these processes."""
    ticks = sum(int(value) for process in processes if (fields := _stat(process)) for value in fields[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb(processes: list[int]) -> float:
    """Resident memory of these processes without the pages of mapped files, which the system can take back.

    What several of them share counts once (Linux's proportional set size).
    """
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1e3


def release_memory() -> None:
    """Gives freed memory back to the system, so that what the next loader takes is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def cost(start: Callable[[], Batches], seconds: float, warm_up: int, turns: int) -> Cost:
    """Runs a loader for about `seconds`.

    Args:
        start: makes a loader and returns its batches.
        seconds: time to measure, after the warm-up.
        warm_up: batches before the measurement, while workers start and what they prefetched is used up.
        turns: batches that are counted at a time: workers take turns, so as many as there are workers.
    """
    release_memory()
    before = memory_mb(tree())  # also of processes that were started before, and live on
    batches, peak = start(), 0.0
    for _ in range(warm_up):
        next(batches)
        peak = max(peak, memory_mb(tree()))
    processes = tree()
    programs, used, began = OtherPrograms(lambda: cpu_seconds(processes)), cpu_seconds(processes), time.perf_counter()
    images, elapsed = 0, 0.0
    while elapsed < seconds or not images:
        for _ in range(turns):
            images += len(next(batches)[0])
        elapsed = time.perf_counter() - began
    used, others = cpu_seconds(processes) - used, programs.share() or 0.0
    peak = max(peak, memory_mb(tree()))
    del batches
    gc.collect()  # ends the workers
    return Cost(images / elapsed, used / images * 1000, max(0.0, peak - before), others)


def _stat(process: int) -> list[str] | None:
    """Fields of /proc/PROCESS/stat behind the name: the state, the parent's id, …"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
