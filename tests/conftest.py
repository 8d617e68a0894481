"""Fixtures of every test, and the tests that need a GPU."""

import pytest
import torch

from tests.support.fixtures import cache, nan_filled_memory, one_thread, seed  # noqa: F401


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
