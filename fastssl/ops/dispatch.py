"""Implementations of the ops: which one runs on which device. The only file that deals with backends.

An op is a schema `fastssl::<name>` in torch's dispatcher whose default implementation is plain torch. A kernel for one
device is registered for the same op, C++ when its library is loaded, Triton through `register_triton`; torch then
chooses by the device of the tensors. Nothing falls back silently: a Triton file that fails to import raises, and a
build without native kernels warns once.

`torch.library.custom_op` would do the same with three layers of Python around each call, 3 µs more than the 2 µs that
the C++ kernels of small tensors take, and 5 µs with a gradient (benchmarks/calls.py).
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

# Instruction sets, lowest first. setup.py builds a library for each but "amx": that of AVX-512, with products on tiles.
LEVELS = ("baseline", "avx2", "avx512", "amx")
_TORCH_LEVELS = {"AVX2": "avx2", "AVX512": "amx"}  # torch's names for them; any other name is its baseline
BF16_PRODUCTS = ("float32", "dot", "tiles", "twin")  # what multiplies bfloat16, in the order of csrc/bf16_products.h

_library = torch.library.Library("fastssl", "DEF")
_bodies: dict[str, Callable[..., Any]] = {}  # op -> its plain-torch body
_kernels: dict[tuple[str, str], str] = {}  # (op, device) -> "native avx2", "triton"
_triton_loaders: dict[str, Callable[[], Callable[..., Any]]] = {}  # op -> function that imports its launcher


def op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], OpOverload]:
    """Makes a function of plain torch the op `fastssl::<name>` and its default implementation on every device.

    The body computes in the dtypes of its arguments: autocast is off inside it, as it is inside a compiled kernel. It
    has no gradient; the `Function` that calls the op has. Its results never share memory with its arguments.
    """

    def make(body: Callable[..., Any]) -> OpOverload:
        @functools.wraps(body)
        def without_autocast(*args: Any, **kwargs: Any) -> Any:
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


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks the function that gives torch.compile the shapes and dtypes of the op's results, without computing them."""
    return torch.library.register_fake(op, lib=_library)


class Function(torch.autograd.Function):
    """Gradient of an op: `torch.autograd.Function`, whose cost of 1 to 2 µs a call is paid only for a gradient.

    Where none is recorded, `apply` is `forward` alone. Otherwise, and for transforms of functions and forward-mode
    derivatives, which torch refuses with its own sentence, it is torch's. `backward` may return gradients in another
    dtype: autograd converts each to that of its tensor.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    return super().apply(*arguments)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return cls.forward(_Unrecorded(), *arguments)


class _Unrecorded:
    """The context of a `Function` of which no gradient is recorded: it keeps no tensor."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def call_in_place(op: OpOverload, changed: Sequence[torch.Tensor], *arguments: Any) -> None:
    """Calls an op that changes tensors, outside autograd, and then tells autograd that they changed."""
    outside = torch.no_grad if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd  # 1 µs cheaper
    with outside():
        op(*arguments)
    increment_version(changed)


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a gradient computed in the forward pass or by a kernel: differentiating it again raises a sentence.

    torch's `once_differentiable` raises only where the upstream gradient requires one. That of a loss is the constant
    1, so the derivative of this gradient would be returned without its second-order terms: here every gradient made
    with create_graph=True raises. In torch.compile, AOT autograd refuses second derivatives by itself.
    """
    sentence = (
        f"{op}: its gradient cannot be differentiated again (create_graph=True): for a second derivative write the "
        "formula of its docstring in plain torch"
    )

    def mark(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *upstream: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            several = gradients if isinstance(gradients, tuple) else (gradients,)
            made = [gradient for gradient in several if gradient is not None]
            node = torch._C._functions.DelayedError(sentence.encode(), len(made))
            raising = node(*(gradient.detach().requires_grad_() for gradient in made)) if made else ()
            marked = iter(raising if isinstance(raising, tuple) else (raising,))
            return tuple(None if gradient is None else next(marked) for gradient in several)

        return once

    return mark


def acc_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an op computes and sums: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


# Devices that support autocast; for others, such as meta, `is_autocast_enabled` raises. Computed once here, because
# torch 2.11 does not compile `is_autocast_available`.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast would convert x for a matrix product; None where it is off, or x is float64."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context in which x is multiplied in its own dtype, also on devices without autocast, such as meta."""
    off = autocast_dtype(x) is None
    return contextlib.nullcontext() if off else torch.autocast(x.device.type, enabled=False)


def register_kernel(op: OpOverload, device: str, kernel: Callable[..., Any]) -> None:
    """Registers a Python function as the op's implementation on a device, such as "cuda"."""
    name = op.name().removeprefix("fastssl::")
    _library.impl(name, kernel, device.upper())
    _kernels[name, device] = "triton"


def register_triton(op: OpOverload, load: Callable[[], Callable[..., Any]]) -> None:
    """Registers a Triton kernel for GPUs; does nothing where Triton is not installed (CPU builds of torch).

    Args:
        op: the op.
        load: imports the kernel's file and returns the launcher, a function with the op's signature:
            ``register_triton(_enqueue_, lambda: _kernels().enqueue_)``. It is called at the first call of the op on a
            GPU, so that programs without a GPU need not wait for the import of Triton. Triton launches on the current
            device, which is therefore set to that of the first tensor.
    """
    if importlib.util.find_spec("triton") is None:
        return
    launcher = functools.cache(load)

    def launch(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return launcher()(x, *args)

    register_kernel(op, "cuda", launch)
    _triton_loaders[op.name().removeprefix("fastssl::")] = load


def has_kernel(name: str, device: str) -> bool:
    """True where a kernel, not the plain-torch body, runs the op on that device now."""
    return (name, device) in _kernels and not _reference_depth


_reference_depth = 0


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Runs every op by its plain-torch body: for tests and as the baseline of benchmarks."""
    global _reference_depth
    with torch.library._scoped_library("fastssl", "IMPL") as library:
        for name, device in _kernels:
            library.impl(name, _bodies[name], device.upper(), allow_override=True)
        _reference_depth += 1
        try:
            yield
        finally:
            _reference_depth -= 1


def table() -> list[tuple[str, str, str]]:
    """(op, device, implementation) of every op, as `fastssl env` prints it."""
    return [
        (name, device, _kernels.get((name, device), "plain torch")) for name in _bodies for device in ("cpu", "cuda")
    ]


def processor_maker() -> str | None:
    """Maker of the CPU: "intel", "amd" or "other"; None in a build without native kernels."""
    if native_level() is None:
        return None
    from fastssl import _C

    return _C.processor_maker()


def load_native() -> None:
    """Loads the C++ kernels, which register themselves with torch; called once, when all ops are defined."""
    if level := native_level():
        for device, part in (("cpu", level), *([("cuda", "cuda")] if native_cuda() else [])):
            for name in _bodies:
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl::{name}", device.upper()):
                    _kernels.setdefault((name, device), f"native {part}")


@functools.cache
def native_level() -> str | None:
    """Loads the C++ kernels of the best instruction set and returns its name; None in a build without them.

    The best is the highest that was built, that the processor has, and that torch itself uses: torch's variable
    ATEN_CPU_CAPABILITY (default, avx2, avx512) therefore lowers ours too. Tiles are permitted by the operating system
    and tried with one product first; where that fails, a warning says why and the level is avx512.
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

    highest = _TORCH_LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    if highest == "amx" and "ATEN_CPU_CAPABILITY" in os.environ:
        highest = "avx512"  # torch has no name for a level above it
    allowed = LEVELS[: min(map(LEVELS.index, (_C.processor_level(), highest))) + 1]
    level = [name for name in allowed if name in _C.build_facts()["levels"]][-1]
    load_cpu_library(next(Path(_C.__file__).parent.glob(f"_native_{level}.*")))
    if level != "avx512" or allowed[-1] != "amx":
        return level
    if reason := choose_bf16_products("tiles"):
        warnings.warn(
            f"fastssl: this processor has tiles (AMX), but they cannot be used: {reason}; bfloat16 is multiplied with "
            "AVX-512 instead, which is slower (ATEN_CPU_CAPABILITY=avx512 chooses the same without this warning)",
            UserWarning,
            stacklevel=2,
        )
        return level
    return "amx"


_cpu_library: ctypes.CDLL | None = None


def load_cpu_library(path: str | Path) -> None:
    """Loads a library of C++ kernels, which replace those loaded before.

    Raises:
        ImportError: the library was built from older sources.
    """
    global _cpu_library
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "fastssl_choose_bf16_products"):
        raise ImportError(f"fastssl: {path} is older than the Python code: run `pip install -e .` again to build it")
    library.fastssl_choose_bf16_products.restype = ctypes.c_char_p
    _cpu_library = library


def bf16_products() -> str:
    """What multiplies bfloat16 in the C++ kernels of attention and contrastive losses now, one of BF16_PRODUCTS."""
    return BF16_PRODUCTS[_cpu_library.fastssl_bf16_products()] if _cpu_library else "float32"


def choose_bf16_products(name: str) -> str | None:
    """Chooses what multiplies bfloat16 in the C++ kernels of attention and contrastive losses; None, or why it cannot.

    Args:
        name: "tiles" (AMX), "dot" (AVX-512), "twin" (tiles in plain C++: for tests) or "float32".
    """
    if _cpu_library is None:
        return "no C++ kernels are loaded"
    reason = _cpu_library.fastssl_choose_bf16_products(BF16_PRODUCTS.index(name))
    return reason.decode() if reason else None


@functools.cache
def native_cuda() -> bool:
    """Loads the kernels in CUDA C++; False where they were not built, or where torch itself has no CUDA."""
    from fastssl import _C

    if not (_C.build_facts()["cuda"] and torch.version.cuda):  # a library of an earlier build may still be there
        return False
    folder = Path(_C.__file__).parent
    try:
        library = next(folder.glob("_native_cuda.*"), folder / "_native_cuda.so")
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"fastssl: the CUDA part of this build could not be loaded ({error.__cause__ or error}), so its ops run in "
            "plain torch on GPUs; CPUs are not affected: run `pip install -e .` again to build it for this torch, or "
            "with FASTSSL_BUILD=cpu to build without it",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
