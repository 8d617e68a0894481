"""Which implementation serves an op: the only file that knows backends.

An op is a `torch.library.custom_op` whose body is plain torch. `serve` gives it a faster kernel for a device; torch's
own dispatcher then picks by the device of the tensors. Nothing falls back in silence: a Triton file that fails to
import raises, and a build without native kernels says so once.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

LEVELS = ("baseline", "avx2", "avx512")  # instruction sets that setup.py builds for, lowest first
_TORCH_LEVELS = {"AVX2": "avx2", "AVX512": "avx512"}  # what torch calls them; anything else is its baseline

_ops: dict[str, "torch.library.CustomOpDef"] = {}
_served: dict[tuple[str, str], str] = {}  # (op, device) -> "native avx512", "triton", …


def op(name: str, mutates_args=()) -> Callable[[Callable], "torch.library.CustomOpDef"]:
    """Makes a function of plain torch the op `fastssl::<name>` and its default implementation on every device.

    The body computes in the dtypes it is given: autocast is off inside it, as it is inside a compiled kernel.
    """

    def make(body):
        @functools.wraps(body)
        def without_autocast(*args, **kwargs):
            with contextlib.ExitStack() as stack:
                for device in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(device):
                        stack.enter_context(torch.autocast(device, enabled=False))
                return body(*args, **kwargs)

        _ops[name] = torch.library.custom_op(f"fastssl::{name}", without_autocast, mutates_args=mutates_args)
        return _ops[name]

    return make


def first_order(backward: Callable) -> Callable:
    """Marks a gradient that was computed in the forward pass, or by a kernel: differentiating it again raises."""
    return torch.autograd.function.once_differentiable(backward)


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an op computes and sums: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def serve(op: "torch.library.CustomOpDef", **kernels: Callable | None) -> None:
    """Lets a kernel serve the op on a device: `serve(info_nce_fwd, cpu=native("info_nce_fwd"), cuda=…)`."""
    for device, kernel in kernels.items():
        if kernel is not None:
            op.register_kernel(device)(kernel)
            is_native = isinstance(kernel, torch._ops.OpOverloadPacket)
            _served[_name(op), device] = f"native {native_level()}" if is_native else "triton"


def serves(op: "torch.library.CustomOpDef", device: str) -> bool:
    """True where a kernel, not the plain-torch body, runs the op on that device now."""
    return (_name(op), device) in _served and not _reference_depth


def native(name: str) -> Callable | None:
    """The C++ kernel of that name, or None in a build without native kernels."""
    return getattr(torch.ops.fastssl_native, name) if native_level() else None


def triton(module: str, name: str) -> Callable | None:
    """The launcher `fastssl.kernels.<module>.<name>`, or None where Triton is not installed (CPU builds of torch)."""
    if importlib.util.find_spec("triton") is None:
        return None
    return getattr(importlib.import_module(f"fastssl.kernels.{module}"), name)


_reference_depth = 0


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Runs every op by its plain-torch body: for tests and as the baseline of benchmarks."""
    global _reference_depth
    with contextlib.ExitStack() as stack:
        for name, device in _served:
            stack.enter_context(_ops[name].set_kernel_enabled(device, enabled=False))
        _reference_depth += 1
        try:
            yield
        finally:
            _reference_depth -= 1


def table() -> list[tuple[str, str, str]]:
    """(op, device, implementation) of every op: what `fastssl env` prints."""
    return [(name, device, _served.get((name, device), "plain torch")) for name in _ops for device in ("cpu", "cuda")]


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


def _name(op: "torch.library.CustomOpDef") -> str:
    return op._qualname.removeprefix("fastssl::")
