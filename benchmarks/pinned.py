"""Work in several processes, each with one thread on a core of its own, so that its seconds are seconds of one core."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")


def run_pinned(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[tuple[T, R]]:
    """(item, function of it) of every item as it ends, in so many processes.

    An error, or an end before the last item, drops what has not begun.

    Args:
        function: of a module, so that other processes can import it.
        items: hashable and picklable arguments.
        processes: number of processes; of more than there are cores some share one.
    """
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    first = os.getpid()  # two commands with a process each may get different cores
    for number in range(first, first + processes):
        cores.put(available[number % len(available)])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_pin, initargs=(cores,)) as pool:
        pending = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pin(cores: Any) -> None:
    """Gives this process one of the cores, so that commands choose one thread and no workers."""
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
