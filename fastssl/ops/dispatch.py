"""Which implementation serves an op: the only file that knows backends.

An op is a schema `fastssl::<name>` in torch's dispatcher whose default implementation is plain torch. A kernel for one
device goes beside it: C++ registers itself when its library is loaded, Triton through `serve`; torch then picks by the
device of the tensors. Nothing falls back in silence: a Triton file that fails to import raises, and a build without
native kernels says so once.

`torch.library.custom_op` would do the same with three layers of Python around each call, 5 to 20 µs more than the
2 µs that the C++ kernels of small tensors take.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch._ops import OpOverload

LEVELS = ("baseline", "avx2", "avx512")  # instruction sets that setup.py builds for, lowest first
_TORCH_LEVELS = {"AVX2": "avx2", "AVX512": "avx512"}  # what torch calls them; anything else is its baseline

_library = torch.library.Library("fastssl", "DEF")
_bodies: dict[str, Callable] = {}  # of every op, its plain torch
_served: dict[tuple[str, str], str] = {}  # (op, device) -> "native avx2", "triton"
_launchers: dict[str, Callable] = {}  # of every op that Triton serves


def op(name: str, mutates_args=()) -> Callable[[Callable], OpOverload]:
    """Makes a function of plain torch the op `fastssl::<name>` and its default implementation on every device.

    The body computes in the dtypes it is given: autocast is off inside it, as it is inside a compiled kernel. It has no
    gradient of its own: a `torch.autograd.Function` calls it. What it returns never shares memory with its arguments.
    """

    def make(body: Callable) -> OpOverload:
        @functools.wraps(body)
        def without_autocast(*args, **kwargs):
            with contextlib.ExitStack() as stack:
                for device in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(device):
                        stack.enter_context(torch.autocast(device, enabled=False))
                return body(*args, **kwargs)

        schema = torch.library.infer_schema(body, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, without_autocast, "CompositeExplicitAutograd")
        _bodies[name] = without_autocast
        return getattr(torch.ops.fastssl, name).default

    return make


def fake(op: OpOverload) -> Callable[[Callable], Callable]:
    """Marks the function that gives shapes and dtypes of the op's results to torch.compile, without computing."""
    return torch.library.register_fake(op, lib=_library)


def first_order(backward: Callable) -> Callable:
    """Marks a gradient that was computed in the forward pass, or by a kernel: differentiating it again raises."""
    return torch.autograd.function.once_differentiable(backward)


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an op computes and sums: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


# Of other devices, as meta, one may not even ask whether autocast is on. Found once: torch 2.11 does not compile that.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast would convert x for a matrix product; None where it is off, or x is float64."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def serve(op: OpOverload, **kernels: Callable | None) -> None:
    """Lets a Python function that launches a kernel serve the op on a device: `serve(op, cuda=triton(…))`."""
    for device, kernel in kernels.items():
        if kernel is not None:
            name = op.name().removeprefix("fastssl::")
            _library.impl(name, kernel, device.upper())
            _served[name, device], _launchers[name] = "triton", kernel


def serves(name: str, device: str) -> bool:
    """True where a kernel, not the plain-torch body, runs the op on that device now."""
    return (name, device) in _served and not _reference_depth


def triton(module: str, name: str) -> Callable | None:
    """The launcher `fastssl.kernels.<module>.<name>`, or None where Triton is not installed (CPU builds of torch).

    The file is imported at the first call: who has no GPU does not wait for it. Triton launches on the current device,
    so the device of the first tensor is made that.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    if importlib.util.find_spec(f"fastssl.kernels.{module}") is None:
        raise ModuleNotFoundError(f"fastssl: there is no file kernels/{module}.py with a kernel {name}")

    @functools.cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(f"fastssl.kernels.{module}"), name)

    def launch(x: torch.Tensor, *args):
        with torch.cuda.device_of(x):
            return launcher()(x, *args)

    return launch


_reference_depth = 0


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Runs every op by its plain-torch body: for tests and as the baseline of benchmarks."""
    global _reference_depth
    with torch.library._scoped_library("fastssl", "IMPL") as library:
        for name, device in _served:
            library.impl(name, _bodies[name], device.upper(), allow_override=True)
        _reference_depth += 1
        try:
            yield
        finally:
            _reference_depth -= 1


def table() -> list[tuple[str, str, str]]:
    """(op, device, implementation) of every op: what `fastssl env` prints."""
    return [
        (name, device, _served.get((name, device), "plain torch")) for name in _bodies for device in ("cpu", "cuda")
    ]


def product_is_ours(dtype: torch.dtype) -> bool:
    """Whether large matrix products of a dtype are made by our kernels on this CPU, not by torch's libraries."""
    return dtype in _our_products


def better_products(level: str | None, maker: str) -> set[torch.dtype]:
    """The dtypes for which ours are taken, by instruction set and maker of the processor.

    On Intel's processors torch has Intel's own library for 32 and 64 bits, and for 16 bits, from those with bfloat16
    instructions on, tiles (AMX) that our kernels lack. Elsewhere that library is no faster than ours. For 16 bits torch
    emulates what AVX2 lacks; with AVX-512's bf16 dot product its products alone are as fast as ours or faster, and
    ours save the casts, the GELU and the bias around them.
    """
    if level in (None, "baseline"):
        return set()
    half = {torch.bfloat16, torch.float16}
    if maker == "intel":
        return half if level == "avx2" else set()
    return half | {torch.float32, torch.float64}


_our_products: set[torch.dtype] = set()


def load_native() -> None:
    """Loads the C++ kernels, which register themselves with torch; called once, when all ops are defined."""
    if level := native_level():
        from fastssl import _C

        _our_products.update(better_products(level, _C.processor_maker()))
        for device, part in (("cpu", level), *([("cuda", "cuda")] if native_cuda() else [])):
            for name in _bodies:
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl::{name}", device.upper()):
                    _served.setdefault((name, device), f"native {part}")


@functools.cache
def native_level() -> str | None:
    """Loads the C++ kernels of the best instruction set and names it; None in a build without them.

    The best is the highest that was built, that the processor has, and that torch itself uses: torch's variable
    ATEN_CPU_CAPABILITY (default, avx2, avx512) therefore lowers ours too.
    """
    if importlib.util.find_spec("fastssl._C") is None:
        warnings.warn(
            "fastssl: this build has no native kernels, every op runs in plain torch "
            "(FASTSSL_BUILD was none, or the extension was not compiled: run `pip install -e .` again to build it)",
            UserWarning,
            stacklevel=2,
        )
        return None
    from fastssl import _C

    limits = (_C.processor_level(), _TORCH_LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline"))
    allowed = LEVELS[: min(map(LEVELS.index, limits)) + 1]
    level = [name for name in allowed if name in _C.build_facts()["levels"]][-1]
    library = next(Path(_C.__file__).parent.glob(f"_native_{level}.*"))
    torch.ops.load_library(library)
    return level


@functools.cache
def native_cuda() -> bool:
    """Loads the kernels in CUDA C++; False where they were not built, or where torch itself has no CUDA."""
    from fastssl import _C

    if not (_C.build_facts()["cuda"] and torch.version.cuda):  # the file may still lie there from an earlier build
        return False
    folder = Path(_C.__file__).parent
    try:
        library = next(folder.glob("_native_cuda.*"), folder / "_native_cuda.so")
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"fastssl: the CUDA part of this build could not be loaded ({error.__cause__ or error}), so its ops run in "
            "plain torch on GPUs, while those on CPUs are as ever: run `pip install -e .` again to build it for this "
            "torch, or with FASTSSL_BUILD=cpu to build without it",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
