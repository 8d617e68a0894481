"""The cores of the machine: how they are divided, and OMP_NUM_THREADS."""

import pytest
import torch

from fastssl import machine

CPU = torch.device("cpu")


@pytest.fixture
def chosen(monkeypatch):
    """Eight cores, without variables; numbers of threads that torch is given."""
    threads: list[int] = []
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return threads


def test_torch_gets_the_cores_that_workers_leave(chosen):
    assert [machine.share_cores(workers, CPU) for workers in (None, 0, 5, 9)] == [2, 0, 5, 9]
    assert machine.share_cores(None, CPU, ranks=2) == 1
    assert chosen == [6, 8, 3, 1, 3]


@pytest.mark.parametrize(
    "value, threads", [("1", 1), ("3", 3), (" 2,1", 2), ("64", 8), ("0", 8), ("-1", 8), ("many", 8), ("", 8)]
)
def test_the_number_of_threads_that_the_user_has_set(value, threads, chosen, monkeypatch):
    """It is an upper bound, since threads and workers must not share cores; what is no number is ignored."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    machine.share_cores(0, CPU)
    machine.share_cores(7, CPU)
    assert chosen == [threads, 1]


def test_one_thread_is_the_default_of_torchrun_with_several_processes(chosen, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for value, ranks in (("1", 2), ("2", 2), ("1", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        machine.share_cores(0, CPU, ranks)
    assert chosen == [4, 2, 1]
