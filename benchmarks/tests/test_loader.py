"""benchmarks/loader.py at a size that takes seconds."""

import pytest

from benchmarks import loader
from fastssl.data.loader import has_dali

ENGINES = ["torchvision", *(["dali"] if has_dali() else [])]


@pytest.mark.slow
def test_every_contestant_has_a_row(tmp_path, monkeypatch):
    """All contestants read the same images, from a folder and from tar shards."""
    pytest.importorskip("skimage")
    pytest.importorskip("webdataset")
    for name, value in {"ROUNDS": 1, "SECONDS": 0.05, "BATCH": 8, "COPIES": 4, "SHARDED": 32, "WORKERS": 1}.items():
        monkeypatch.setattr(loader, name, value)
    rows = list(loader.measure(32, ("moco_v2",)))
    assert [(row["augmentation"], row["source"], row["side"]) for row in rows] == [
        ("moco_v2", "folder", 32),
        ("moco_v2", "webdataset", 32),
    ]
    for row in rows:
        assert set(row["images_per_second"]) == {*ENGINES, "baseline"}
        assert set(row["ratio"]) == set(ENGINES)
        assert min(row["images_per_second"].values()) > 0
        assert loader._cells(row)[:2] == ["`moco_v2`", f"`{row['source']}`, 32"]
