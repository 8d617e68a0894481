import pytest
import torch

from fastssl.ops import dispatch


def implementations(device):
    return {op: name for op, where, name in dispatch.table() if where == device}


def test_table_names_every_op_on_every_device():
    assert implementations("cpu").keys() == implementations("cuda").keys() >= {"info_nce_fwd", "enqueue_"}
    assert implementations("cpu")["enqueue_"] == f"native {dispatch.native_level()}"


def test_serves_and_reference():
    assert dispatch.serves("enqueue_", "cpu")
    assert not dispatch.serves("enqueue_", "mps")
    with dispatch.reference():
        assert not dispatch.serves("enqueue_", "cpu")
        with dispatch.reference():
            pass
        assert not dispatch.serves("enqueue_", "cpu")
    assert dispatch.serves("enqueue_", "cpu")


def test_reference_runs_the_body_and_the_kernel_comes_back():
    """An op whose kernel and body differ on purpose."""

    @dispatch.op("test_which")
    def which(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    try:
        dispatch.serve(which, cpu=lambda x: torch.ones_like(x), cuda=None)
        assert which(torch.empty(1)).item() == 1
        with dispatch.reference():
            assert which(torch.empty(1)).item() == 0
        assert which(torch.empty(1)).item() == 1
        assert implementations("cpu")["test_which"] == "triton"
        assert implementations("cuda")["test_which"] == "plain torch"
    finally:
        dispatch._bodies.pop("test_which")
        dispatch._served.pop(("test_which", "cpu"))


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


def test_a_kernel_that_does_not_exist_is_no_fallback():
    with pytest.raises(ModuleNotFoundError):
        dispatch.triton("no_such_family", "f")
