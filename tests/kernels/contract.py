"""Comparison of a Triton launcher, interpreted, with the plain-torch body of its op."""

from collections.abc import Callable

import pytest
from torch import Tensor

from fastssl.kernels import tile
from tests.kernels.interpreter import watch
from tests.support.close import assert_same
from tests.support.contract import plain, tensors_of

# Every architecture that the kernels have configurations for; one of them in the fast tests.
every_architecture = pytest.mark.parametrize(
    "arch", [arch if arch == "sm_90" else pytest.param(arch, marks=pytest.mark.slow) for arch in tile.ARCHITECTURES]
)


def launched(launcher: Callable, *args) -> tuple[list[Tensor], int]:
    """(results of a launcher in the interpreter, bytes that its programs loaded and stored)."""
    with watch() as seen:
        results = tensors_of(launcher(*args))
    return results, seen.bytes


def same_as_body(launcher: Callable, op, *args) -> list[Tensor]:
    """The launcher's results, after a check that they equal those of the op's plain-torch body bit for bit."""
    results, _ = launched(launcher, *args)
    for i, (result, expected) in enumerate(zip(results, plain(op, *args), strict=True)):
        assert_same(result, expected, f"{launcher.__name__}, result {i}")
        assert result.is_contiguous()
    return results
