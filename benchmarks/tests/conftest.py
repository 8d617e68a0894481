"""Fixtures of the tests of the benchmarks: those of tests/. Without Triton there are no kernels to compile."""

import importlib.util

from tests.support.fixtures import cache, nan_filled_memory, one_thread, seed  # noqa: F401

if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_static.py"]
