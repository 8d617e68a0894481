"""The plain C++ twin of the tile instructions (csrc/tiles.h), beside the pseudo-code of Intel's manual in numpy."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FLAGS = ["-O2", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
SMALLEST = np.float32(2.0**-126)  # smallest normal number


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    command = [os.environ.get("CXX", "g++"), *FLAGS, HERE / "tiles_on_host.cpp", "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(library)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def flushed(x):
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


def fused(a, b, c):
    """a·b + c rounded once: the product of two bfloat16 numbers and the sum are exact in float64."""
    return flushed((a.astype(np.float64) * b + c).astype(np.float32))


def tdpbf16ps(sums, a, b):
    """sums [rows, columns] += A B of values [rows, depth, 2] and [depth, columns, 2]."""
    a, b = flushed(a), flushed(b)
    parts = np.zeros((2, *sums.shape), np.float32)
    for k in range(a.shape[1]):
        for i in range(2):
            parts[i] = fused(a[:, k, i][:, None], b[k, :, i][None], parts[i])
    return flushed(flushed(sums) + flushed(parts[0] + parts[1]))


def bfloat16(values):
    """Values rounded down to bfloat16, as float32 and as its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
    return (bits << 16).view(np.float32), bits.astype(np.uint16)


def random_values(generator, *shape):
    """Numbers of many sizes; some denormal, some tiny, so that products and sums are denormal too."""
    values = generator.standard_normal(shape) * 2.0 ** generator.integers(-8, 9, shape)
    return np.where(generator.random(shape) < 0.1, values * 2.0**-130, values).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(16, 16, 16), (5, 3, 7), (1, 1, 1), (16, 8, 16)])
@pytest.mark.parametrize("size", [1.0, 2.0**-66, 2.0**40])
def test_product_follows_the_manual(twin, rows, columns, depth, size):
    generator = np.random.default_rng(0)
    a, a_bits = bfloat16(random_values(generator, 16, 16, 2) * np.float32(size))
    b, b_bits = bfloat16(random_values(generator, 16, 16, 2) * np.float32(size))
    sums = np.asarray(random_values(generator, 16, 16) * np.float32(size) ** 2, np.float32)
    expected = sums.copy()
    expected[:rows, :columns] = tdpbf16ps(sums[:rows, :columns], a[:rows, :depth], b[:depth, :columns])
    twin.multiply(pointer(a_bits), pointer(b_bits), pointer(sums), rows, 4 * depth, 4 * columns)
    assert np.array_equal(sums.view(np.uint32), expected.view(np.uint32))


def test_first_and_second_products_of_pairs_are_summed_apart(twin):
    """2^24 + 1 rounds to 2^24 in the first sum; the second sum keeps its ones."""
    a, b, sums = np.zeros((16, 16, 2), np.float32), np.ones((16, 16, 2), np.float32), np.zeros((16, 16), np.float32)
    a[0, 0], a[0, 1:3] = (2.0**24, 1), (1, 1)
    twin.multiply(pointer(bfloat16(a)[1]), pointer(bfloat16(b)[1]), pointer(sums), 16, 64, 64)
    assert sums[0, 0] == np.float32(2.0**24) + np.float32(3)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_block_of_tiles_is_a_product(twin, rows, lanes, accumulate, depth=48):
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, shape).astype(np.float32) for shape in ((rows, depth, 2), (depth, lanes, 2)))
    sums = generator.integers(-8, 9, (rows, lanes)).astype(np.float32)
    expected = np.einsum("rki,kni->rn", a, b) + (sums if accumulate else 0)
    twin.multiply_block(pointer(bfloat16(a)[1]), pointer(bfloat16(b)[1]), pointer(sums), rows, lanes, depth, accumulate)
    assert np.array_equal(sums, expected)


def test_check_of_the_hardware_passes_on_the_twin(twin):
    assert twin.multiplies_correctly()
