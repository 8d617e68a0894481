"""The machine that a command runs on: device, cores, memory, loader engine, installed packages."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping

import torch

import fastssl
from fastssl.data.loader import ENGINES, has_dali
from fastssl.data.timing import cores


def select_device(name: str) -> torch.device:
    """The device named "cuda", "cuda:1", "cpu", or "auto" (cuda if available).

    Raises:
        ValueError: the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name != "cpu" and not (match and int(match[1] or 0) < torch.cuda.device_count()):
        raise ValueError(f"--device must be auto, cpu or an available cuda device, got {name!r}")
    return torch.device(name)


def share_cores(workers: int | None, device: torch.device, ranks: int = 1) -> int:
    """Divides the cores between data loading and computing; returns the number of workers.

    On a CPU torch gets the cores that workers leave. Threads and workers must not share cores: an OpenMP thread that
    waits for a core which a worker holds stops all the others, and a step takes several times as long. With fewer
    than four cores there are therefore no workers by default: the main process loads and computes in turn. torch gets
    at most OMP_NUM_THREADS threads where the user has set it.

    Args:
        workers: number of workers of a rank; None for a default that depends on the machine.
        device: device of the computation.
        ranks: ranks on this machine.
    """
    available = max(1, cores() // ranks)
    if device.type != "cpu":
        return min(8, available) if workers is None else workers
    workers = available // 4 if workers is None else workers
    threads = max(1, available - workers)
    torch.set_num_threads(min(threads, requested_threads(os.environ, ranks) or threads))
    return workers


def requested_threads(environment: Mapping[str, str], ranks: int = 1) -> int | None:
    """The user's OMP_NUM_THREADS, of a list such as 4,2 the first; None if it is not set or is no number above 0.

    torchrun sets it to 1 for several processes on a machine where it is not set, and cannot be told from a user who
    does: there 1 counts as not set, so that the ranks share all cores.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(,.*)?", environment.get("OMP_NUM_THREADS", ""))
    threads = int(match[1]) if match else 0
    by_torchrun = threads == 1 and ranks > 1 and "TORCHELASTIC_RUN_ID" in environment
    return None if by_torchrun else threads or None


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory, as jemalloc and tcmalloc do.

    glibc returns blocks of 32 MB and more to the system at each free, unless its heap has a gap of that size. Getting
    them back takes a page fault per 4 kB, up to ten times as long as filling them, in every step: they are activations
    and gradients. Whether it happens depends on earlier allocations.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: all allocations from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing


def select_engine(name: str, device: torch.device) -> str:
    """The loader engine with this name; for "auto", dali on a GPU if it is installed, else torchvision.

    On a CPU DALI is slower: its resampling takes several times as long as torchvision's.
    """
    if name == "auto":
        return "dali" if device.type == "cuda" and has_dali() else "torchvision"
    return name


def installed_engines() -> tuple[str, ...]:
    """Names of the loader engines that are installed."""
    return tuple(engine for engine in ENGINES if engine != "dali" or has_dali())


def compared_engines() -> tuple[str, ...]:
    """The installed engines that are worth measuring here: "device" only beside a GPU.

    On a CPU it makes the torchvision engine's views in one process instead of in the workers.
    """
    return tuple(engine for engine in installed_engines() if engine != "device" or torch.cuda.is_available())


def available_engine(name: str, device: torch.device) -> str:
    """The loader engine of a run that was started on another machine: torchvision, with a notice, if DALI is missing.

    All engines draw the same augmentations.
    """
    if name == "dali" and not has_dali():
        print("the run's engine dali is not installed: torchvision makes the same views")
        return "torchvision"
    return select_engine(name, device)


def jpeg_decoder() -> str:
    """The package that decodes JPEGs."""
    try:
        from fastssl.data.jpeg import DECODER
    except ImportError:
        return "none: Pillow is not installed"
    return DECODER


def facts() -> dict[str, str]:
    """Versions of packages, processor, kernels, GPU."""
    from fastssl.ops import dispatch
    from fastssl.ops.attention import LONGEST

    level = dispatch.native_level()
    versions = {"fastssl": fastssl.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "triton", "xformers", "nvidia-dali-cuda130"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["jpeg decoder"] = jpeg_decoder()
    versions["processor"] = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} threads"
    versions["kernels"] = f"native {level}" if level else "none: this build has no native kernels"
    if level:
        from fastssl import _C

        build = _C.build_facts()
        cuda = "with" if build["cuda"] else "without"
        tiles = "with" if build["tiles"] else "without (the compiler does not know them)"
        levels = " ".join(build["levels"])
        versions["build"] = f"{build['compiler']}, levels {levels}, {tiles} tiles (AMX), {cuda} CUDA"
    has_xformers = versions["xformers"] != "not installed"
    fallback = "xformers on GPUs where it supports the call, else torch" if has_xformers else "torch"
    versions["attention"] = f"kernels up to {LONGEST} tokens, beyond that {fallback}"
    versions["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return versions
