"""Images per second of each loader engine on a machine with a GPU, beside the steps that they feed."""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from benchmarks.loader import write_photographs
from benchmarks.machine import DEVICE
from fastssl.data.augmentation import Augmentation
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.data.timing import cores, measure_throughput
from fastssl.machine import installed_engines
from fastssl.method_modules import find_augmentation

from .record import Clock, Record

AUGMENTATIONS = ("mae", "moco_v2", "moco_v3", "multi_crop")
WORKERS = (16, 8, 4)
SIDE, BATCH, SECONDS = 400, 256, 2.0
FED = {"mae": "mae-vit-base", "moco_v2": "moco_v2-resnet50", "moco_v3": "moco_v3-vit-small"}  # augmentation: its step


def loaders(clock: Clock, record: Record, dry: bool) -> None:
    """Rows {augmentation, engine, workers, images_per_second}: DALI first, with its colours and with ours."""
    from .phases import about_machine

    about_machine(record, dry)
    augmentations = AUGMENTATIONS[:1] if dry else AUGMENTATIONS
    batch, seconds = (8, 0.2) if dry else (BATCH, SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photos")
        write_photographs(root, 64 if dry else SIDE, _photographs())
        source = f"folder:{root}"
        for name in augmentations:
            augmentation = find_augmentation(name, open_source(source))
            for engine, workers in _ways(dry):
                if clock.over():
                    return
                loader = _start(source, augmentation, engine, workers, batch)
                measured = measure_throughput(loader, seconds, warm_up=2 * workers + 2)
                row = {"augmentation": name, "engine": engine, "workers": workers, "side": SIDE, "batch": batch}
                record.add(row | {"images_per_second": round(measured.images_per_second, 1)})
    record.note(slower=_slower(record))


def _photographs() -> list[Image.Image]:
    """Two photographs that scikit-learn brings along: a machine that can fetch nothing has them too."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images] * 4


def _ways(dry: bool) -> list[tuple[str, int]]:
    if dry:
        return [("torchvision", 0), ("device", 0)]
    engines = [
        name for name in ("dali", "dali, augment_", "device", "torchvision") if _module(name) in installed_engines()
    ]
    counts = [count for count in WORKERS if count <= cores()] or [cores()]
    return [(engine, count) for engine in engines for count in (counts[:1] if _module(engine) == "dali" else counts)]


def _module(engine: str) -> str:
    """The engine of a row; "dali, augment_" is DALI's without its colours."""
    return engine.partition(",")[0]


def _start(
    source: str, augmentation: Augmentation, engine: str, workers: int, batch: int
) -> Callable[[], Iterator[int]]:
    def start() -> Iterator[int]:
        options = {"workers": workers, "device": DEVICE, "engine": _module(engine)}
        loader = Loader(open_source(source), augmentation, batch, **options)
        if engine == "dali, augment_":
            loader._engine.colours = False
        return (len(batch.index) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return start


def _slower(record: Record) -> dict[str, str]:
    """For each augmentation whose step was measured in the same run: whether the step or the loader is slower."""
    steps = record.path.with_name("steps.json")
    rows = json.loads(steps.read_text())["rows"] if steps.is_file() else []
    rates = {row["case"]: row["images_per_second"]["ours"][1] for row in rows if row.get("precision") == "bf16"}
    slower = {}
    for name, case in FED.items():
        loaded = [row["images_per_second"] for row in record.content["rows"] if row["augmentation"] == name]
        if loaded and case in rates:
            which = "loader" if max(loaded) < rates[case] else "step"
            slower[name] = f"the {which}: step {rates[case]:,.0f}, loader {max(loaded):,.0f} images/s"
    return slower
