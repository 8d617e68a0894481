"""Joins the harness to pytest-benchmark: its clock, a seed for each case, the facts about machine and software."""

from pathlib import Path

import pytest
import torch

from .harness import CLOCK
from .machine import environment, keep_memory, machine


def pytest_sessionstart():
    keep_memory()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastssl"] = {"machine": machine(machine_info["cpu"]["brand_raw"]), "environment": environment()}
