"""Checks that apply to every public op, whatever it computes."""

import contextlib
import math
import mmap
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.ops import dispatch
from tests.support.close import assert_same


def tensors_of(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def plain(op, *args) -> list[Tensor]:
    """Results of the op's plain-torch body."""
    with dispatch.reference():
        return tensors_of(op(*args))


def equals_body(op, *args) -> list[Tensor]:
    """The results of the op, after a check that they equal those of its plain-torch body bit for bit."""
    results = tensors_of(op(*args))
    for i, (result, expected) in enumerate(zip(results, plain(op, *args), strict=True)):
        assert_same(result, expected, f"{op.name()}, result {i}")
        assert result.is_contiguous()
    return results


def sparse(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros spread over more memory than the machine has: only the pages that are accessed take memory."""
    numel = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    memory = mmap.mmap(-1, math.ceil(numel * dtype.itemsize / mmap.PAGESIZE) * mmap.PAGESIZE)
    return torch.frombuffer(memory, dtype=dtype, count=numel).as_strided(shape, strides)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@torch_threads(1)
def gradcheck(function: Callable, *inputs) -> None:
    """Analytic against numerical gradient in float64, for every floating input that requires one."""
    assert torch.autograd.gradcheck(
        lambda *args: [t for t in tensors_of(function(*args)) if t.requires_grad], inputs, fast_mode=False
    )


def refuses_second_derivative(function: Callable, x: Tensor) -> None:
    """A gradient that a kernel computed is a constant to autograd, so differentiating it must raise, also where the
    upstream gradient is a constant, as that of a loss is."""
    result = tensors_of(function(x))[0]
    for loss in (result.square().sum(), result.sum()):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        try:
            dx.square().sum().backward()
        except RuntimeError as error:
            assert "its gradient cannot be differentiated again (create_graph=True)" in str(error)
        else:
            raise AssertionError("a second derivative was returned")


@torch_threads(1)
def compiles(function: Callable, *inputs) -> None:
    """Compiled with dynamic shapes, the function is one graph with the same values and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    results = [tensors_of(f(*inputs)) for f in (function, compiled)]
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager)
    if leaves:
        gradients = [
            torch.autograd.grad(sum(t.double().square().sum() for t in r if t.requires_grad), leaves) for r in results
        ]
        for eager, traced in zip(*gradients):
            torch.testing.assert_close(traced, eager)


@torch_threads(1)
def opcheck(op, *inputs) -> None:
    """torch's own check of schema, fake tensors and AOT dispatch. The gradient belongs to the public function."""
    torch.library.opcheck(op, [x.detach() if isinstance(x, Tensor) else x for x in inputs])


def refused(sentence: str, error: type[Exception], function: Callable, *args, **kwargs) -> None:
    """Raises `error` with exactly this one sentence."""
    try:
        function(*args, **kwargs)
    except error as raised:
        assert str(raised) == sentence, f"\n got: {raised}\nwant: {sentence}"
    else:
        raise AssertionError(f"accepted, but should say: {sentence}")


def rejects(op: str, argument: str, value: str, error: type[Exception], function: Callable, *args, **kwargs) -> None:
    """Raises `error` with one sentence that names the op, the argument and the value it got; the wording is free.

    For all but one sentence of a family of errors, whose exact words `refused` checks.
    """
    try:
        function(*args, **kwargs)
    except error as raised:
        sentence = str(raised)
        named = sentence.startswith(f"{op}: ") and re.search(rf"\b{re.escape(argument)}\b", sentence)
        assert named and re.search(rf"got {re.escape(value)}(?=$|[ ,;:])", sentence), (
            f"{op}, {argument} and {value} must be named: {sentence}"
        )
    else:
        raise AssertionError(f"accepted, but {op} should refuse {argument} = {value}")
