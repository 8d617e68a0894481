"""`fastssl bench`: speed of the loaders."""

import dataclasses
import itertools
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from fastssl.data.augmentation import Augmentation
from fastssl.data.loader import Loader
from fastssl.data.source import Source, open_source
from fastssl.data.timing import Throughput, cores, measure_throughput
from fastssl.machine import installed_engines
from fastssl.run import find_augmentation

from .flags import parse


@dataclasses.dataclass
class Flags:
    """Images/s and processor seconds of each augmentation and loader engine."""

    data: str
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    augmentation: tuple[str, ...] = ("mae", "moco_v2", "moco_v3", "evaluation")
    """augmentations: methods, multi_crop, evaluation"""
    engine: tuple[str, ...] = installed_engines()
    """loader engines: torchvision, device, dali"""
    workers: Annotated[int, NOT_NEGATIVE] = min(2, cores())
    """processes (dali: threads) that load data"""
    batch_size: Annotated[int, AT_LEAST_1] = 64
    """images per batch"""
    seconds: Annotated[float, NOT_NEGATIVE] = 5.0
    """seconds to measure each augmentation and engine"""


def command(words: list[str]) -> None:
    """fastssl bench --data SOURCE"""
    flags = parse(Flags, words, "fastssl bench")
    check_ranges(flags, "bench")
    for name in ("augmentation", "engine"):
        if not getattr(flags, name):
            raise ValueError(f"bench: --{name} must name at least one, got none")
    source = open_source(flags.data)
    augmentations = {name: find_augmentation(name, source) for name in flags.augmentation}
    for engine in flags.engine:
        Loader(source, next(iter(augmentations.values())), 1, engine=engine)  # raises now if an engine is not installed
    title = f"{flags.workers} workers, batch {flags.batch_size}, {flags.seconds:g} s each, {len(source):,} images"
    table = Table("augmentation", "engine", "images/s", "CPU s / 1,000 images", title=title)
    batch_size = min(flags.batch_size, len(source))
    for (name, augmentation), engine in itertools.product(augmentations.items(), flags.engine):
        measured = loader_speed(source, augmentation, engine, batch_size, flags.workers, flags.seconds)
        table.add_row(name, engine, f"{measured.images_per_second:,.0f}", f"{measured.cpu_seconds:,.2f}")
    Console().print(table)


def loader_speed(
    source: Source, augmentation: Augmentation, engine: str, batch_size: int, workers: int, seconds: float
) -> Throughput:
    """Throughput of a loader that runs epoch after epoch, with batches on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def start():
        loader = Loader(source, augmentation, batch_size, workers=workers, engine=engine, device=device, max_bad=1.0)
        return (len(batch.index) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return measure_throughput(start, seconds, warm_up=2 * max(1, workers) + 2)
