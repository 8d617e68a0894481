"""Connects the harness to pytest-benchmark: its clock, a seed for each case, the machine and software of a run.

Freed memory stays in the process, as in the trainer. With --default-allocation the C library decides, as in a program
that calls single ops: a process of its own, because what is once kept is not returned.
"""

from pathlib import Path

import pytest
import torch

from .harness import CLOCK
from .machine import environment, keep_freed_memory, machine


def pytest_addoption(parser):
    parser.addoption("--default-allocation", action="store_true", help="leave memory to the C library in benchmarks")


def pytest_collection_modifyitems(config, items):
    benchmarks = [item for item in items if item.path.parent == Path(__file__).parent]
    by_default = config.getoption(
        "--default-allocation", default=False
    )  # pytest may find this file too late for options
    if benchmarks and not by_default:  # not in a session of benchmarks/tests alone
        keep_freed_memory()
    for item in benchmarks:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastssl"] = {"machine": machine(machine_info["cpu"]["brand_raw"]), "environment": environment()}
