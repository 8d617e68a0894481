"""Memory of a loader over a hundred epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from tests.support.loaders import engines

ROOT = Path(__file__).parent.parent.parent
linux = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which reports the memory that processes share"
)


def memory() -> float:
    """MB of this process and its children, without what lies in files too; shared memory is counted once.

    Pages of files, such as the code of libraries, come and go with the memory that the machine has free.
    """
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    kilobytes = 0
    for pid in (os.getpid(), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(own))
    return kilobytes / 1e3


def trend(folder: str, engine: str, workers: int, keep: bool, kind: str) -> list[float]:
    """MB after each of a hundred epochs, where every tenth epoch's batches are kept on request."""
    augmentation = Augmentation(
        (View((64, 64), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5, flip_p=0.5),) * 2
    )
    loader = Loader(open_source(f"folder:{folder}"), augmentation, 32, workers=workers, engine=engine, worker_kind=kind)
    kept, after = [], []
    for epoch in range(100):
        for batch in loader.epoch(epoch):
            if keep and epoch % 10 == 0:
                kept.append(batch)
            del batch
        after.append(memory())
    return after


def measure(folder: Path, engine: str, workers: int, keep: bool = False, kind: str = "process") -> list[float]:
    """`trend` in a new process: forked from a large one, workers copy its memory page by page, which looks like growth
    for a long time."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    for i in range(96):
        Image.fromarray(np.roll(pixels, i, 0)).save(folder / f"{i}.jpg")
    call = f"trend({str(folder)!r}, {engine!r}, {workers}, {keep}, {kind!r})"
    script = f"import json; from tests.data.test_memory import trend; print(json.dumps({call}))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def least_growth(after: list[float]) -> float:
    """The least growth in MB from one fifth of the epochs to the next.

    A leak grows in every fifth: one epoch in ten, of 9 MB (96 images of 2 views of 48 kB), adds 18 MB. What the
    allocator takes or returns, up to 30 MB at once, changes a fifth or two and leaves the others as they are.
    """
    fifths = np.median(np.reshape(after, (5, -1)), axis=1)
    return float(np.diff(fifths).min())


@linux
@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
@engines
def test_memory_is_flat(tmp_path, engine, workers):
    assert least_growth(measure(tmp_path, engine, workers)) < 6


@linux
@pytest.mark.exhaustive
def test_memory_of_threads_is_flat(tmp_path):
    assert least_growth(measure(tmp_path, "torchvision", 2, kind="thread")) < 6


@linux
@pytest.mark.slow
def test_kept_epochs_are_seen(tmp_path):
    assert least_growth(measure(tmp_path, "torchvision", 0, keep=True)) > 12
