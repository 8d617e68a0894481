"""Workers that are killed, and shared memory that is too small: one sentence within seconds, no hang."""

import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.data import workers
from fastssl.data.findings import scan
from fastssl.data.loader import Loader
from fastssl.data.workers import LostWorker, Workers, check_shared_memory
from tests.data.test_loader import Numbers
from tests.support.loaders import indices, plain

KILLED = r"^data: worker process \d+ was killed by SIGKILL, which the system sends when memory runs out: use fewer"


def children():
    """Process ids of the workers."""
    return [process.pid for process in multiprocessing.active_children()]


class Deadly(Numbers):
    """Numbers whose image `deadly` ends the process that reads it."""

    def __init__(self, count, deadly, number):
        super().__init__(count)
        self.deadly, self.signal, self.main = deadly, number, os.getpid()

    def read(self, index):
        if index == self.deadly and os.getpid() != self.main:
            os.kill(os.getpid(), self.signal)
        return super().read(index)


def sentence_of(function, *args):
    """The error of a function, as text: the error itself would keep its loader, and so its workers, alive."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.fixture(autouse=True)
def in_seconds():
    """A hang would be a failure: torch looks for dead workers every five seconds."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 30  # a second or two on a machine that is not busy


@pytest.mark.parametrize("when", ["while it is waited for", "between two batches"])
def test_a_killed_worker_is_one_sentence(when):
    source = Deadly(40, 23, signal.SIGKILL) if when == "while it is waited for" else Numbers(4000)
    batches = Loader(source, plain((8, 8)), 4, workers=2, train=False).epoch(0)
    next(batches)
    if when == "between two batches":
        os.kill(children()[0], signal.SIGKILL)
        time.sleep(0.2)  # the step of a run: torch's error would arrive here
    with pytest.raises(LostWorker, match=KILLED + r".*--workers.*/dev/shm"):
        list(batches)


def test_a_full_shared_memory_that_kills_a_worker_is_named():
    loader = Loader(Deadly(40, 23, signal.SIGBUS), plain((8, 8)), 4, workers=2, train=False)
    with pytest.raises(LostWorker, match="was killed by SIGBUS, which the system sends when /dev/shm is full: use"):
        indices(loader, 0)


def test_a_worker_that_ends_by_itself_is_one_sentence():
    class Ending(Numbers):
        def read(self, index):
            os._exit(3)

    with pytest.raises(LostWorker, match=r"^data: worker process \d+ ended with exit code 3: use fewer --workers"):
        indices(Loader(Ending(8), plain((8, 8)), 4, workers=1), 0)


def test_a_scan_whose_worker_is_killed_is_one_sentence():
    with pytest.raises(LostWorker, match=KILLED):
        scan(Deadly(40, 23, signal.SIGKILL), 2)


def test_a_lost_worker_leaves_other_loaders_alone():
    lost, kept = (Loader(Numbers(40), plain((8, 8)), 4, workers=1, train=False) for _ in range(2))
    before = set(children())
    first = lost.epoch(0)
    (victim,) = set(children()) - before
    second = kept.epoch(0)
    seen = next(second).index.tolist()
    os.kill(victim, signal.SIGKILL)
    seen += [i for batch in second for i in batch.index.tolist()]
    assert seen == list(range(40))
    with pytest.raises(LostWorker):
        list(first)


def test_a_lost_worker_of_somebody_else_is_still_torch_s_error():
    indices(Loader(Numbers(4), plain((8, 8)), 4, workers=1), 0)  # our handler is in place
    before = set(children())
    others = iter(torch.utils.data.DataLoader(range(1000), num_workers=1))
    next(others)
    (victim,) = set(children()) - before
    with pytest.raises(RuntimeError, match=rf"\(pid {victim}\) is killed by signal"):
        os.kill(victim, signal.SIGKILL)
        time.sleep(2)


def test_a_batch_that_does_not_fit_in_shared_memory_is_one_sentence(monkeypatch):
    """torch's own thread would print the error, and the loader would wait for ever."""

    def fail(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nat c10"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked later
    sentence = sentence_of(indices, Loader(Numbers(40), plain((8, 8)), 4, workers=2), 0)
    expected = r"data: a worker has no shared memory for a batch \(unable .*\(28\)\): use fewer --workers .*/dev/shm.*"
    assert re.fullmatch(expected, sentence)  # in one line


def memory(monkeypatch, free, total=64 << 20):
    state = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_blocks=total // 4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: state)


def test_too_small_a_shared_memory_is_refused_at_the_start(monkeypatch):
    memory(monkeypatch, 64 << 20)
    loader, before = Loader(Numbers(4096), plain((224, 224)), 256, workers=4), children()
    sentence = r"^data: 4 workers keep up to 9 batches of 38\.5 MB in /dev/shm, which has 67\.1 MB free: use fewer"
    with pytest.raises(LostWorker, match=sentence):
        loader.epoch(0)
    assert set(children()) <= set(before)  # before a worker is started
    assert len(indices(Loader(Numbers(40), plain((8, 8)), 4, workers=2), 0)) == 40
    loader = Loader(Numbers(4096), plain((224, 224)), 256, workers=0)  # this process needs none
    next(loader.epoch(0))


def test_a_short_epoch_needs_memory_for_its_own_batches_only(monkeypatch):
    memory(monkeypatch, 1 << 20)
    with pytest.raises(LostWorker, match="2 workers keep up to 5 batches"):
        Loader(Numbers(8), plain((400, 400)), 1, workers=2).epoch(0)
    assert len(indices(Loader(Numbers(1), plain((400, 400)), 1, workers=2), 0)) == 1


def test_a_shared_memory_without_limit_or_without_a_folder_is_not_checked(monkeypatch):
    memory(monkeypatch, 0, total=0)
    check_shared_memory(10**12, 9, 4)
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/nowhere")
    monkeypatch.undo()
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/nowhere")
    check_shared_memory(10**12, 9, 4)


def test_errors_at_the_start_of_workers_name_the_ways_out(monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    loader = Workers(range(10), workers=1, batch_size=None)
    monkeypatch.setattr(workers.DataLoader, "__iter__", fail)
    sentence = "data: worker processes can't be started (No space left on device): use fewer --workers"
    with pytest.raises(LostWorker, match=f"^{re.escape(sentence)}"):
        iter(loader)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("error", [ValueError("a: no"), OSError(5, "Input/output error", "a"), MemoryError("large")])
def test_an_error_of_a_source_is_its_own_sentence(count, error):
    """Without the traceback of the worker."""

    class Broken(Numbers):
        def read(self, index):
            raise error

    sentence = sentence_of(indices, Loader(Broken(8), plain((8, 8)), 4, workers=count), 0)
    assert str(error) in sentence
    assert "\n" not in sentence


def test_pixels_arrive_unchanged_through_shared_memory():
    batches = [list(Loader(Numbers(40), plain((8, 8)), 4, workers=count).epoch(0)) for count in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.views[0], b.views[0])
        assert np.array_equal(a.index, b.index)
