"""Fixtures of every test: a seed that a failure reports, memory filled with NaN, a cache folder of the test session.

Import this module before `fastssl`: it chooses Triton's interpreter where there is no GPU.
"""

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

SEED_VARIABLE = "FASTSSL_TEST_SEED"

hypothesis.settings.register_profile("fastssl", derandomize=True, deadline=None)  # the same examples in every run
hypothesis.settings.load_profile("fastssl")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Cache folder of the test session for data sources, so that tests do not change the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seed of torch, NumPy and `random` at the start of the test: the environment variable FASTSSL_TEST_SEED, or 0.

    The report of a failed test shows it.
    """
    value = int(os.environ.get(SEED_VARIABLE, "0"))
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002
    random.seed(value)
    request.node.add_report_section("setup", "seed", f"{SEED_VARIABLE}={value}")
    return value


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fills torch.empty with NaN (integers: their maximum), so that elements which no kernel writes are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """One thread for torch: the tensors of tests are small, and on a busy core a second thread makes them slower.

    Commands choose their threads by the number of cores, which is 1 in the tests.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("fastssl.machine.cores", lambda: 1)
    yield
    torch.set_num_threads(threads)
