"""Large matrix products: the one place that chooses the library which computes them."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .dispatch import fake, op, processor_maker


@op("product")
def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, D] times the transpose of b [N, D], plus the bias [N]; all of one dtype. Forward and backward of `linear`.

    Each product is a library's, chosen by what was measured (docs/measurements.md):

    - GPUs, float64, and Intel's processors: what `F.linear` calls, which is cuBLAS, MKL, and oneDNN for 16 bits, with
      tiles (AMX) where the processor has them.
    - float32 on other processors where `F.linear` calls MKL: oneDNN's inner product. MKL reached the rate of AVX2 on an
      AMD EPYC with AVX-512, half of oneDNN's. Where AVX2 is the most, MKL stays for products with a transposed matrix,
      which oneDNN packs slowly there.
    - bfloat16 on these processors with AVX-512: oneDNN's inner product, except for gradients of weights, for which
      `F.linear` is faster.
    - 16 bits that torch's library does not support natively, such as bfloat16 with AVX2: a float32 product between
      conversions. torch would emulate each operation.
    """
    if a.device.type != "cpu" or a.dtype == torch.float64:
        return F.linear(a, b, bias)
    if not is_native(a.dtype):
        return product(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)
    if has_inner_product(a.dtype) and _prefers_inner_product(a, b):
        bias = None if bias is None else bias.contiguous()  # it ignores the strides of the bias
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


@fake(product)
def _(a, b, bias=None):
    return a.new_empty(a.shape[0], b.shape[0])


FEWEST = 64  # rows below which packing b takes oneDNN's inner product longer than the product


def _prefers_inner_product(a: Tensor, b: Tensor) -> bool:
    rows_lie_in_order = a.stride(1) == 1
    if a.shape[0] < FEWEST or not b.numel() or not a.numel():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return a.dtype == torch.float32 and rows_lie_in_order and b.stride(1) == 1
    return a.dtype == torch.float32 or rows_lie_in_order


def has_inner_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN's inner product computes large products of a dtype on this CPU."""
    return dtype in _inner_product_dtypes


_inner_product_dtypes: set[torch.dtype] = set()  # a set, not a cached function, because torch.compile traces its use


def choose_library() -> None:
    """Finds out which library computes large products on this CPU; called once, when the kernels are loaded."""
    _inner_product_dtypes.update(inner_product_dtypes(processor_maker()))


def inner_product_dtypes(maker: str | None) -> set[torch.dtype]:
    """Dtypes of which oneDNN's inner product computes large products, by the maker of the CPU.

    None on Intel's, where torch has no MKL (on ARM, of which nothing was measured), and in a torch without this op,
    which is none of its public ones.
    """
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if maker in (None, "intel") or not has_both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return set()
    return {torch.float32, torch.bfloat16} if is_native(torch.bfloat16) else {torch.float32}


@functools.cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether torch's CPU library multiplies this dtype by instructions of its own, without emulation."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    supports = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, supports)())


class RoundedWeights:
    """16-bit copies of float32 weights, made once a step instead of for each product: ``with rounded_weights:``.

    Inside the context `linear` takes copies of parameters from here; a weight that is computed, or detached as in a
    block that is recomputed, is rounded for each product. `refresh` rounds the parameters again. Between two calls of
    it torch's version counter and the address show that a parameter was changed or replaced. The counter leaves out
    writes through ``.data`` and those of fused optimizers: call `refresh` after them. The copies take 2 bytes per
    weight and belong to no module, so no state dict holds them.

    Args:
        keep: False keeps no copies, for weights that are sharded over ranks and exist during their products alone.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._copies: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}  # id(weight) → weight, copy, its state
        self._used: set[int] = set()  # ids since the last refresh
        self._outer: list[RoundedWeights | None] = []  # what was current before each entry

    def __enter__(self) -> "RoundedWeights":
        global _current
        self._outer.append(_current)
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._outer.pop()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the weights again that were used since the last call, and forgets others."""
        used = [entry for key, entry in self._copies.items() if key in self._used]
        self._copies.clear()
        self._used.clear()
        for weight, copy, (_, address) in used:
            if address == weight.data_ptr():
                self._copies[id(weight)] = weight, copy.copy_(weight), _state(weight)

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of a weight in a dtype; made if there is none, or the weight has changed."""
        entry = self._copies.get(id(weight))
        if entry is None or entry[1].dtype != dtype or entry[2] != _state(weight):
            with torch.inference_mode(False):  # a tensor made in inference mode could not be rounded into again
                entry = weight, weight.detach().to(dtype), _state(weight)
            if self.keep:
                self._copies[id(weight)] = entry
        self._used.add(id(weight))
        return entry[1]


_current: RoundedWeights | None = None


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype: itself, a copy of `RoundedWeights`, or a new one."""
    if weight.dtype == dtype:
        return weight
    if torch.compiler.is_compiling() or _current is None or type(weight) is not Parameter or weight.is_inference():
        return weight.to(dtype)
    return _current.get(weight, dtype)
