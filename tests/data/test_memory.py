"""Loading takes no more memory in the twentieth epoch than in the fifth."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.data.loader import Loader
from fastssl.data.recipe import Recipe, View
from fastssl.data.source import open_source
from tests.data.test_loader import engines

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what processes share")


def held() -> float:
    """MB of this process and its children; what they share is counted once."""
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    kilobytes = 0
    for pid in (os.getpid(), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1e3


@linux
@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_memory_is_flat_over_twenty_epochs(tmp_path, engine, workers):
    """An epoch's views and files are 6 MB here, so if one in ten were kept, ten epochs would show it."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    for i in range(96):
        Image.fromarray(np.roll(pixels, i, 0)).save(tmp_path / f"{i}.jpg")
    recipe = Recipe((View((64, 64), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5, flip_p=0.5),) * 2)
    loader = Loader(open_source(f"folder:{tmp_path}"), recipe, 32, workers=workers, engine=engine)
    after = []
    for epoch in range(20):
        for batch in loader.epoch(epoch):
            del batch
        after.append(held())
    assert min(after[15:]) - max(after[5:12]) < 6  # what the allocator holds for the moment comes and goes
