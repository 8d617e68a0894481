"""Facts about the machine and the software of a measurement, and the machine's memory bandwidth and arithmetic rate."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastssl.machine import keep_freed_memory as keep_freed_memory
from fastssl.ops import dispatch
from fastssl.ops.products import product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

GPU_SIZE = {"condition": DEVICE.type == "cpu", "reason": "a size that takes minutes on a CPU"}  # for mark.skipif

BUSY = 0.1  # share of the processors used by other programs above which a measurement is void


def wait() -> None:
    """Waits until the GPU has finished its work; returns at once on a CPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def machine(processor: str) -> dict:
    """The hardware: name, processor, cores, device. The slug names the file of results."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{processor}, {cores} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return {"slug": slug, "name": name, "processor": processor, "cores": cores, "device": DEVICE.type}


def environment() -> dict:
    """The software: versions, commit, instruction-set level, and which implementation serves each op."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "fastssl": importlib.metadata.version("fastssl-engine"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "level": dispatch.native_level() or "no native kernels",
        "threads": torch.get_num_threads(),
        "served": {
            op: kind for op, device, kind in dispatch.table() if device == DEVICE.type and kind != "plain torch"
        },
    }


def implementation(kernel: str) -> str:
    """Implementation of the op `fastssl::<kernel>` on the device of the benchmarks: "native avx2", "plain torch", …"""
    return {(op, device): kind for op, device, kind in dispatch.table()}[kernel, DEVICE.type]


class OtherPrograms:
    """Share of the processors that other programs use while this object exists. Only Linux counts it. Time that a
    hypervisor gives to other machines is included.

    Args:
        ours: gives the seconds of processor time that are not other programs'.
    """

    def __init__(self, ours: Callable[[], float] = time.process_time):
        self._ours = ours
        self._start = self._counts()

    def share(self) -> float | None:
        """0 on a quiet machine, 1 if other programs use all of it, None if unknown."""
        now = self._counts()
        if now is None:
            return None
        busy, available, ours = (after - before for before, after in zip(self._start, now))
        return max(0.0, (busy - ours) / available) if available else 0.0

    def _counts(self) -> tuple[float, float, float] | None:
        """Busy seconds, all seconds and our seconds, of the processors that this process may use."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return None
        busy = available = 0
        for name, *ticks in map(str.split, lines):
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in os.sched_getaffinity(0):
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])
                busy += user + nice + system + irq + softirq + steal
                available += user + nice + system + irq + softirq + steal + idle + iowait
        second = os.sysconf("SC_CLK_TCK")
        return busy / second, available / second, self._ours()


def limit(bytes_moved: int, operations: int, dtype: torch.dtype) -> tuple[float, str]:
    """Lower bound of the time on this machine in ms, and its reason: the bytes at the measured bandwidth or the
    floating-point operations at the measured matrix-product rate, whichever takes longer."""
    reasons = []
    if bytes_moved:
        reasons.append((bytes_moved / bandwidth(), f"{bytes_moved / 1e6:.3g} MB at {bandwidth() / 1e9:.3g} GB/s"))
    if operations:
        rate = max(product_rate(dtype), product_rate(torch.float32))
        reasons.append((operations / rate, f"{operations / 1e9:.3g} GFLOP at {rate / 1e9:.3g} GFLOP/s"))
    seconds, reason = max(reasons)
    return seconds * 1e3, reason


@functools.cache
def bandwidth() -> float:
    """Bytes per second of main memory, on buffers larger than any cache: the best of a sum, a copy and an addition in
    place, which move one, two and three bytes for each byte (a copy on a CPU may also read its target)."""
    x, y = torch.ones(2, 2**26, device=DEVICE).unbind()
    functions = {1: x.sum, 2: lambda: y.copy_(x), 3: lambda: y.add_(x)}
    return max(moved * x.nbytes / _best(function) for moved, function in functions.items())


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product. On a CPU, that of the fastest of `@`, a 1×1
    convolution and the library that `linear` uses, whose speeds differ widely on some processors."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    a, b = torch.ones(2, n, n, device=DEVICE, dtype=dtype).unbind()
    seconds = _best(lambda: a @ b)
    if DEVICE.type == "cuda" and dtype == torch.float32:
        # Three tf32 products of split operands are about as exact, and often faster.
        torch.set_float32_matmul_precision("high")
        seconds = min(seconds, 3 * _best(lambda: a @ b))
        torch.set_float32_matmul_precision("highest")
    if DEVICE.type == "cpu":
        pixels = b.reshape(1, n, 32, n // 32).to(memory_format=torch.channels_last)
        kernel = a.reshape(n, n, 1, 1)
        seconds = min(seconds, _best(lambda: F.conv2d(pixels, kernel)), _best(lambda: product(a, b)))
    return 2 * n**3 / seconds


def _best(run: Callable[[], object], window_s: float = 0.3, windows: int = 10) -> float:
    """Seconds of the fastest call in windows of time, up to the first window in which the machine was quiet."""
    run()
    best = float("inf")
    for _ in range(windows):
        programs, end = OtherPrograms(), time.perf_counter() + window_s
        while time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            run()
            wait()
            best = min(best, time.perf_counter() - start)
        if (programs.share() or 0) <= BUSY:
            break
    return best


def _commit() -> str:
    """The measured commit, with "-dirty" if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
