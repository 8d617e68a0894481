"""Fixtures of the tests of the ops: all threads, because the kernels share their work out among them."""

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Takes the place of the fixture that keeps torch to one thread."""
