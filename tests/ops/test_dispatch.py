from typing import ClassVar

import pytest
import torch

from fastssl import _C
from fastssl.ops import dispatch


def implementations(device):
    return {op: name for op, where, name in dispatch.table() if where == device}


def test_table_names_every_op_on_every_device():
    assert implementations("cpu").keys() == implementations("cuda").keys() >= {"info_nce_fwd", "enqueue_"}
    assert implementations("cpu")["enqueue_"] == f"native {dispatch.native_level()}"
    assert implementations("cuda")["ema_update_"] == ("native cuda" if dispatch.native_cuda() else "plain torch")


def test_the_cuda_part_is_loaded_where_build_and_torch_have_cuda():
    assert dispatch.native_cuda() == bool(_C.build_facts()["cuda"] and torch.version.cuda)


def test_a_cuda_library_of_an_earlier_build_is_not_loaded(monkeypatch):
    def never(path):
        raise AssertionError(f"loaded {path}")

    monkeypatch.setattr(torch.ops, "load_library", never)
    monkeypatch.setattr(_C, "build_facts", lambda: {"cuda": False})
    assert not dispatch.native_cuda.__wrapped__()
    monkeypatch.setattr(_C, "build_facts", lambda: {"cuda": True})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not dispatch.native_cuda.__wrapped__()


def test_a_cuda_part_that_does_not_load_warns(monkeypatch):
    def broken(path):
        raise OSError(f"Could not load this library: {path}") from OSError("libcudart.so.99: no")

    monkeypatch.setattr(torch.ops, "load_library", broken)
    monkeypatch.setattr(_C, "build_facts", lambda: {"cuda": True})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(UserWarning, match=r"could not be loaded \(libcudart.so.99: no\), .* FASTSSL_BUILD=cpu"):
        assert not dispatch.native_cuda.__wrapped__()


@pytest.fixture
def processor_with_tiles(monkeypatch):
    """native_level on a processor with tiles, of which the answer of their library is made up."""
    monkeypatch.setattr(_C, "processor_level", lambda: "amx")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(dispatch, "load_cpu_library", lambda path: None)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)

    def level(reason):
        monkeypatch.setattr(dispatch, "choose_bf16_products", lambda name: reason)
        return dispatch.native_level.__wrapped__()

    return level


def test_tiles_are_the_level_amx(processor_with_tiles):
    assert processor_with_tiles(None) == "amx"


def test_tiles_that_cannot_be_used_warn(processor_with_tiles):
    with pytest.warns(UserWarning, match=r"has tiles \(AMX\), but they cannot be used: not permitted; .*AVX-512"):
        assert processor_with_tiles("not permitted") == "avx512"


@pytest.mark.parametrize("capability, level", [("avx512", "avx512"), ("avx2", "avx2")])
def test_torch_s_limit_leaves_tiles_out(processor_with_tiles, monkeypatch, capability, level):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", capability.upper)
    assert processor_with_tiles(None) == level


def test_products_that_do_not_exist_change_nothing():
    before = dispatch.bf16_products()
    for name in dispatch.BF16_PRODUCTS:
        if reason := dispatch.choose_bf16_products(name):
            assert "tiles" in reason or "dot product" in reason
            assert dispatch.bf16_products() == before
        dispatch.choose_bf16_products(before)


def test_a_library_of_an_earlier_build_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(dispatch.ctypes, "CDLL", lambda path: object())
    with pytest.raises(ImportError, match=r"^fastssl: old\.so is older than the Python code: run `pip install -e \.`"):
        dispatch.load_cpu_library("old.so")


def test_has_kernel_and_reference():
    assert dispatch.has_kernel("enqueue_", "cpu")
    assert not dispatch.has_kernel("enqueue_", "mps")
    with dispatch.reference():
        assert not dispatch.has_kernel("enqueue_", "cpu")
        with dispatch.reference():
            pass
        assert not dispatch.has_kernel("enqueue_", "cpu")
    assert dispatch.has_kernel("enqueue_", "cpu")


def test_reference_runs_the_body_and_the_kernel_comes_back():
    """With an op whose kernel and plain-torch body return different values."""

    @dispatch.op("test_which")
    def which(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    try:
        dispatch.register_kernel(which, "cpu", lambda x: torch.ones_like(x))
        assert which(torch.empty(1)).item() == 1
        with dispatch.reference():
            assert which(torch.empty(1)).item() == 0
        assert which(torch.empty(1)).item() == 1
        assert implementations("cpu")["test_which"] == "triton"
        assert implementations("cuda")["test_which"] == "plain torch"
    finally:
        dispatch._bodies.pop("test_which")
        dispatch._kernels.pop(("test_which", "cpu"))


def test_autocast_is_off_inside_a_body():
    seen = []

    @dispatch.op("test_autocast")
    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x @ x

    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert body(torch.eye(2)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
        assert seen == [False]
    finally:
        dispatch._bodies.pop("test_autocast")


def test_every_launcher_exists():
    """Launchers are loaded at the first call on a GPU; a wrong name would show only there."""
    pytest.importorskip("triton")
    assert dispatch._triton_loaders.keys() >= {"info_nce_fwd", "enqueue_", "attention_bwd"}
    for name, load in dispatch._triton_loaders.items():
        assert load().__name__ == name


def test_a_kernel_file_that_fails_to_import_raises():
    """There is no fallback to plain torch."""
    pytest.importorskip("triton")

    def load():
        raise ImportError("no such kernel")

    @dispatch.op("test_broken")
    def body(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        dispatch.register_triton(body, load)
        assert implementations("cuda")["test_broken"] == "triton"
        with pytest.raises(ImportError, match="no such kernel"):
            body.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(1))
    finally:
        dispatch._bodies.pop("test_broken")
        dispatch._kernels.pop(("test_broken", "cuda"))
        dispatch._triton_loaders.pop("test_broken")


class Twice(dispatch.Function):
    """2·x, which counts what it keeps for a gradient, and returns that gradient in float64."""

    recorded: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        Twice.recorded.append(isinstance(ctx, torch.autograd.function.BackwardCFunction))
        return 2 * x

    @staticmethod
    def backward(ctx, upstream):
        return 2 * upstream.double()


@pytest.fixture
def recorded():
    Twice.recorded.clear()
    return Twice.recorded


def test_a_function_without_gradient_is_its_forward_pass_alone(recorded):
    x = torch.ones(2)
    assert not Twice.apply(x).requires_grad
    with torch.no_grad():
        assert not Twice.apply(x.requires_grad_()).requires_grad
    assert recorded == [False, False]


def test_a_function_records_a_gradient_and_autograd_converts_it(recorded):
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    Twice.apply(x).sum().backward()
    assert recorded == [True]
    assert x.grad.dtype == torch.bfloat16 and x.grad.tolist() == [2, 2]


def test_a_function_refuses_forward_mode_derivatives_as_torch_does(recorded):
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(RuntimeError, match="jvp"):
            Twice.apply(dual)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(Twice.apply)(torch.ones(2, 3))


def test_a_call_in_place_is_unknown_to_autograd_and_counts_as_a_change():
    @dispatch.op("test_double_", mutates_args=("x",))
    def double_(x: torch.Tensor, factor: torch.Tensor) -> None:
        x.mul_(factor)

    leaf, factor = torch.ones(2, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)
    version = leaf._version
    dispatch.call_in_place(double_, (leaf,), leaf, factor)
    assert leaf.tolist() == [2, 2] and leaf.is_leaf and leaf._version > version
    assert torch.is_grad_enabled()
