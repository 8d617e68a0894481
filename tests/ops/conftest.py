"""Fixtures of the tests of the ops: all threads, because the kernels share their work out among them."""

import pytest

from tests.support.products import multiplying_bfloat16_by


@pytest.fixture(autouse=True)
def one_thread():
    """Takes the place of the fixture that keeps torch to one thread."""


@pytest.fixture
def products(request):
    """What multiplies bfloat16; skips the test where the processor or the library lacks it."""
    with multiplying_bfloat16_by(request.param):
        yield request.param
