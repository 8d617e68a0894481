"""Workers: batches arrive unchanged; one that is killed, or too little memory, is one sentence within seconds."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastssl.data import shared, workers
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.findings import scan
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.data.workers import LostWorker, Workers, check_shared_memory, choose_kind
from tests.data.test_loader import Numbers
from tests.support.loaders import digest, indices, plain

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


def _with_small_slots(build, *args, batch_bytes, **options):
    return build(*args, batch_bytes=1, **options)


def small_ring(monkeypatch):
    """Slots without room for a batch: it goes through /dev/shm."""
    monkeypatch.setattr(
        "fastssl.data.torchvision.Workers", lambda *a, batch_bytes, **k: Workers(*a, batch_bytes=1, **k)
    )
    monkeypatch.setattr(shared, "ROOM", 1)


def test_a_batch_that_does_not_fit_in_shared_memory_is_one_sentence(monkeypatch):
    """torch's own thread would print the error, and the loader would wait for ever."""

    def fail(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nat c10"
        )

    small_ring(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked later
    sentence = sentence_of(indices, Loader(Numbers(4000), plain((8, 8)), 100, workers=2), 0)
    expected = r"data: a worker has no shared memory for a batch \(unable .*\(28\)\): use fewer --workers .*/dev/shm.*"
    assert re.fullmatch(expected, sentence)  # in one line


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_of_a_source_is_not_taken_for_a_full_memory(count):
    class Wrong(Numbers):
        def read(self, index):
            raise RuntimeError("a bug of the source")

    with pytest.raises(RuntimeError, match="a bug of the source") as caught:
        next(Loader(Wrong(8), plain((8, 8)), 4, workers=count).epoch(0))
    assert "/dev/shm" not in str(caught.value)


def memory(monkeypatch, free, total=64 << 20):
    state = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_blocks=total // 4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: state)


def test_too_small_a_shared_memory_is_refused_at_the_start(monkeypatch):
    memory(monkeypatch, 64 << 20)
    samples, before = torch.zeros(4096, 1), children()
    sentence = r"^data: 4 workers keep up to 9 batches of 38\.5 MB in /dev/shm, which has 67\.1 MB free: use fewer"
    with pytest.raises(LostWorker, match=sentence):
        iter(Workers(samples, workers=4, batch_bytes=256 * 3 * 224 * 224, batch_size=256))
    assert set(children()) <= set(before)  # before a worker is started
    assert len(list(Workers(samples, workers=0, batch_bytes=10**9, batch_size=256))) == 16  # this process needs none
    monkeypatch.setattr(workers.multiprocessing, "get_start_method", lambda: "forkserver")
    with pytest.raises(LostWorker, match="2 workers keep up to 5 batches of 38"):
        Loader(Numbers(4096), plain((224, 224)), 256, workers=2).epoch(0)


def test_forked_workers_need_no_folder_of_shared_memory(monkeypatch):
    memory(monkeypatch, 0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", None)  # and make no file in it
    assert len(indices(Loader(Numbers(40), plain((300, 300)), 4, workers=2), 0)) == 40


def test_a_short_epoch_needs_memory_for_its_own_batches_only(monkeypatch):
    memory(monkeypatch, 1 << 20)
    with pytest.raises(LostWorker, match="2 workers keep up to 5 batches"):
        iter(Workers(torch.zeros(8, 1), workers=2, batch_bytes=480_000, batch_size=1))
    assert len(list(Workers(torch.zeros(1, 1), workers=2, batch_bytes=480_000, batch_size=1))) == 1


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


@pytest.mark.parametrize("kind", ["process", "thread"])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("error", [ValueError("a: no"), OSError(5, "Input/output error", "a"), MemoryError("large")])
def test_an_error_of_a_source_is_its_own_sentence(count, error, kind):
    """Without the traceback of the worker."""

    class Broken(Numbers):
        def read(self, index):
            raise error

    sentence = sentence_of(indices, Loader(Broken(8), plain((8, 8)), 4, workers=count, worker_kind=kind), 0)
    assert str(error) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("ring", [True, False])
def test_batches_arrive_unchanged_from_all_workers(ring, monkeypatch):
    """More batches than there are slots, over two epochs, of which the first is left in the middle."""
    view = View((16, 16), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), flip_p=0.5)

    def batches(count, kind):
        loader = Loader(open_source("shapes:count=200"), Augmentation((view, view)), 8, workers=count, worker_kind=kind)
        first = loader.epoch(0)
        begun = [digest(next(first)) for _ in range(3)]
        return begun + [digest(batch) for batch in loader.epoch(1, 2)]

    expected = batches(0, "process")
    if not ring:
        small_ring(monkeypatch)
    assert batches(2, "process") == expected
    assert batches(3, "thread") == expected
    assert len(set(expected)) == 3 + 25 - 2


def test_a_batch_stays_until_the_next_but_one_is_asked_for():
    """The main process may still copy the one before the last to a GPU."""
    loader = Loader(Numbers(400), plain((8, 8)), 4, workers=2, train=False)
    samples = loader._engine.run(0, loader._order.batches(0))
    previous = next(samples)
    for number, current in enumerate(samples, 1):
        time.sleep(0.005)  # workers go on
        for at, held in ((number - 1, previous), (number, current)):
            assert held.index.tolist() == list(range(4 * at, 4 * at + 4))
            assert torch.equal(held.views[0][:, 0, 0, 0], (held.index % 256).to(torch.uint8))
        previous = current


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux, which lists a process's memory")
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_twenty_epochs_take_no_more_files_and_memory_than_two(kind):
    def held():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("/dev/zero" in line or "/dev/shm" in line for line in maps)

    loader, after = Loader(Numbers(40), plain((8, 8)), 4, workers=2, worker_kind=kind), []
    for epoch in range(20):
        assert len(indices(loader, epoch)) == 40
        after.append(held())
    assert after[1] == after[-1]


def test_a_ring_carries_every_dtype_and_shape():
    ring = shared.Ring(2, 1000)
    batch = {
        "a": [torch.arange(6.0).view(2, 3), torch.ones(3, dtype=torch.bfloat16), torch.tensor(7)],
        "b": (torch.zeros(0, 4), torch.arange(12).view(3, 4).T, "text", None),
    }
    for number in (0, 1):
        sent = pickle.loads(pickle.dumps(ring.make(number, lambda: batch)))
        seen = sent.open()
        assert [type(part) for part in seen["b"]] == [torch.Tensor, torch.Tensor, str, type(None)]
        for a, b in zip([*batch["a"], *batch["b"][:2]], [*seen["a"], *seen["b"][:2]], strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)
            assert b.numel() == 0 or b.data_ptr() % shared.ALIGNMENT == 0
    error = ValueError("no")
    assert ring.make(0, lambda: error) is error
    assert shared.empty(2, 3).shape == (2, 3)  # in no slot any more


def test_threads_compute_with_one_thread_each_and_leave_this_one_its_number():
    seen, threads = [], torch.get_num_threads()

    class Counting(Numbers):
        def read(self, index):
            seen.append((threading.get_ident(), torch.get_num_threads()))
            return super().read(index)

    torch.set_num_threads(2)
    try:
        assert len(indices(Loader(Counting(40), plain((8, 8)), 4, workers=2, worker_kind="thread"), 0)) == 40
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {number for _, number in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_threads_stop_with_their_reader():
    """After an error in a step, or Ctrl-C, no batch is begun any more, and the threads end with the loader."""
    source, before = Numbers(4000), threading.active_count()
    read, reads = source.read, []
    source.read = lambda index: (time.sleep(0.002), reads.append(index), read(index))[2]
    loader = Loader(source, plain((8, 8)), 4, workers=2, worker_kind="thread")
    epoch = loader.epoch(0)
    next(epoch)
    del epoch
    time.sleep(0.1)
    stopped = len(reads)
    time.sleep(0.1)
    assert len(reads) == stopped < 100
    del loader
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_ctrl_c_ends_a_process_in_seconds(kind):
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
from fastssl.data.loader import Loader
from tests.data.test_loader import Numbers
from tests.support.loaders import plain
loader = Loader(Numbers(10**6), plain((64, 64)), 64, workers=2, worker_kind={kind!r})
for batch in loader.epoch(0):
    print(len(batch.index), flush=True)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout.readline() == "64\n"
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, errors = run.communicate(timeout=25)
    assert run.returncode in (1, 130, -signal.SIGINT)
    assert "KeyboardInterrupt" in errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_killed_parent(method):
    script = f"""
import multiprocessing
from fastssl.data.loader import Loader
from tests.data.test_loader import Numbers
from tests.support.loaders import plain
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    for batch in Loader(Numbers(10**6), plain((64, 64)), 64, workers=2).epoch(0):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        input()  # until it is killed
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with run:
        alive = [int(pid) for pid in run.stdout.readline().split()]
        assert len(alive) == 2
        run.kill()
        run.wait()
        end = time.monotonic() + 20
        while alive and time.monotonic() < end:
            time.sleep(0.1)
            alive = [pid for pid in alive if _runs(pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    assert not alive


def _runs(pid):
    """Whether a process runs; one that ended may wait for its new parent to notice."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_kind_of_workers(monkeypatch):
    assert choose_kind("thread") == "thread"
    for has_lock, kind in ((True, "process"), (False, "thread")):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda has_lock=has_lock: has_lock, raising=False)
        assert choose_kind("auto") == kind
    with pytest.raises(ValueError, match=r"^data: --worker-kind must be auto, process or thread, got 'fibre'$"):
        Loader(Numbers(8), plain((8, 8)), 4, worker_kind="fibre")
