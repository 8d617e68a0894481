"""The machine that a command runs on: its device, its cores, its loader, and what is installed."""

import contextlib
import ctypes
import importlib.metadata
import platform

import torch

import fastssl
from fastssl.data.loader import has_dali
from fastssl.data.timing import cores


def device_named(name: str) -> torch.device:
    """ "cuda", "cpu", or "auto": cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device must be auto, cpu or a cuda device that is there, got {name!r}")
    return torch.device(name)


def share_cores(workers: int | None, device: torch.device, ranks: int = 1) -> int:
    """Workers that load data, `workers` if given, of each of the `ranks` on this machine; on a CPU torch gets the other
    cores.

    Threads and workers must not share cores: an OpenMP thread that waits for a core which a worker holds stops all
    the others, and a step takes several times as long. So two cores load and compute in turn, without workers.
    """
    available = max(1, cores() // ranks)
    if device.type != "cpu":
        return min(8, available) if workers is None else workers
    workers = available // 4 if workers is None else workers
    torch.set_num_threads(max(1, available - workers))
    return workers


def keep_memory() -> None:
    """Tells the C library to keep what is freed, as jemalloc and tcmalloc do.

    glibc returns blocks of 32 MB and more to the system at each free, unless its heap has a gap of that size, and to
    get them back, one page fault for 4 kB, can take ten times as long as to fill them: activations and gradients of
    every step. Whether it happens depends on what ran before.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for anything
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing


def engine_named(name: str, device: torch.device) -> str:
    """The engine meant by "auto". On a CPU DALI is slower: it resamples in several times torchvision's time."""
    if name == "auto":
        return "dali" if device.type == "cuda" and has_dali() else "torchvision"
    return name


def engine_there(name: str, device: torch.device) -> str:
    """That of a run begun elsewhere; where it is not installed the other, and says so: both draw the same."""
    if name == "dali" and not has_dali():
        print("the engine dali, which the run asks for, is not installed: torchvision makes the same views instead")
        return "torchvision"
    return engine_named(name, device)


def facts() -> dict[str, str]:
    """Versions, processor, kernels."""
    from fastssl.ops import dispatch
    from fastssl.ops.attention import LONGEST

    level = dispatch.native_level()
    found = {"fastssl": fastssl.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "triton", "xformers", "nvidia-dali-cuda130"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["processor"] = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} threads"
    found["kernels"] = f"native {level}" if level else "none: this build has no native kernels"
    if level:
        from fastssl import _C

        build = _C.build_facts()
        cuda = "with" if build["cuda"] else "without"
        found["build"] = f"{build['compiler']}, levels {' '.join(build['levels'])}, {cuda} CUDA"
    beyond = (
        "torch" if found["xformers"] == "not installed" else "xformers on GPUs where it supports the call, else torch"
    )
    found["attention"] = f"kernels up to {LONGEST} tokens, beyond that {beyond}"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found
