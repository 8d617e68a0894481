"""Fixtures of the tests of the benchmarks: those of tests/."""

from tests.support.fixtures import cache, nan_filled_memory, one_thread, seed  # noqa: F401
