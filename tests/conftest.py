"""Fixtures of every test, and the tests that need a GPU."""

import os

import pytest
import torch

from tests.support.fixtures import cache, nan_filled_memory, one_thread, seed  # noqa: F401


def pytest_configure(config):
    """Gives each process of `pytest -n` and those that it starts a core of their own: OpenMP threads that wait for a
    core which another process holds stop all the others."""
    if hasattr(config, "workerinput") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(config.workerinput["workerid"].removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
