"""The choice of what multiplies bfloat16 in the C++ kernels."""

import contextlib

import pytest

from fastssl.ops import dispatch

# With the fixture `products` of tests/ops/conftest.py.
EVERY_PRODUCT = pytest.mark.parametrize("products", dispatch.BF16_PRODUCTS, indirect=True)


@contextlib.contextmanager
def multiplying_bfloat16_by(name):
    before = dispatch.bf16_products()
    if reason := dispatch.choose_bf16_products(name):
        pytest.skip(reason)
    try:
        yield
    finally:
        dispatch.choose_bf16_products(before)
