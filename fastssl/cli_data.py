"""The commands that look at data: `fastssl data check`, `fastssl data show`, `fastssl bench --data`."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastssl.data import augmentation as augmentations
from fastssl.data.augmentation import Augmentation
from fastssl.data.contact_sheet import make_contact_sheet
from fastssl.data.findings import scan
from fastssl.data.loader import ENGINES, Loader, has_dali
from fastssl.data.source import Source, open_source
from fastssl.data.timing import Throughput, cores, measure_throughput
from fastssl.run import method_module, method_names

OTHER_AUGMENTATIONS = ("multi_crop", "evaluation")
SHOWN_BAD = 20  # bad files that are named; all of them go into the file that --bad-files names


def data(words: list[str]) -> None:
    """fastssl data check SOURCE | fastssl data show SOURCE --augmentation AUGMENTATION"""
    commands = {"check": _check, "show": _show}
    if words in (["-h"], ["--help"]):
        print(data.__doc__)
        return
    if not words or words[0] not in commands:
        raise ValueError(f"data: name a command: {', '.join(commands)}, got {words[0] if words else 'nothing'}")
    commands[words[0]](words[1:])


def _check(words: list[str]) -> None:
    @dataclasses.dataclass
    class Flags:
        """Decodes every image of a source: counts, sizes, formats, bad files; then images/s of each engine."""

        source: tyro.conf.Positional[str]
        """folder:PATH, webdataset:SHARDS, …"""
        split: Literal["train", "test"] = "train"
        """which part of it"""
        workers: int = min(2, cores())
        """processes that decode"""
        seconds: float = 5.0
        """to time each engine for, with the augmentation of MoCo v2; 0 for not at all"""
        bad_files: Path | None = None
        """file to write the names of all bad files to"""

    flags = tyro.cli(Flags, args=words, prog="fastssl data check")
    _at_least(0, workers=flags.workers, seconds=flags.seconds)
    if flags.bad_files:
        flags.bad_files.write_text("")  # refused now rather than after the whole scan
    console, source = Console(highlight=False), open_source(flags.source, flags.split)
    began = time.perf_counter()
    found = scan(source, flags.workers)
    took = time.perf_counter() - began
    for name, value in _facts(found, len(source), flags.split, took):
        console.print(f"{name:<12} {value}", soft_wrap=True, markup=False)
    for line in found.bad[:SHOWN_BAD]:
        console.print(f"bad          {line}", soft_wrap=True, markup=False)
    if len(found.bad) > SHOWN_BAD:
        console.print(f"bad          … and {len(found.bad) - SHOWN_BAD} more: --bad-files FILE names all")
    if flags.bad_files:
        flags.bad_files.write_text("".join(f"{line}\n" for line in found.bad))
    if flags.seconds and found.good:
        augmentation = augmentation_of("moco_v2", source)
        for engine in engines():
            seen = measured(source, augmentation, engine, min(64, len(source)), flags.workers, flags.seconds)
            said = f"{_said(seen)} with the augmentation of MoCo v2, {flags.workers} workers"
            console.print(f"{engine:<12} {said}", soft_wrap=True)


def _facts(found, total: int, split: str, took: float):
    yield "images", f"{total:,} of the {split} split, {len(found.bad):,} bad; looked at {total / took:,.0f} a second"
    if found.good:
        classes = len(found.labels) - (-1 in found.labels)
        counts = [count for label, count in found.labels.items() if label >= 0]
        yield "classes", f"{classes:,}, of {min(counts):,} to {max(counts):,} images" if counts else "no labels"
        yield "formats", ", ".join(f"{name} {count:,}" for name, count in found.formats.most_common())
        for name, sides in (("heights", found.heights), ("widths", found.widths)):
            low, middle, high = np.percentile(sides, (0, 50, 100)).astype(int)
            yield name, f"{low:,} to {high:,} pixels, the median {middle:,}"
        yield "size", f"{found.bytes / 1e6:,.1f} MB, {found.bytes / found.good / 1e3:,.1f} KB an image"


def _show(words: list[str]) -> None:
    @dataclasses.dataclass
    class Flags:
        """A contact sheet: each row an image, several draws of the augmentation's views, as a method would see them."""

        source: tyro.conf.Positional[str]
        """folder:PATH, webdataset:SHARDS, …"""
        augmentation: str = "moco_v2"
        """a method, multi_crop or evaluation"""
        engine: str = "torchvision"
        """torchvision or dali"""
        rows: int = 4
        """images"""
        columns: int = 4
        """draws of each"""
        image_size: tuple[int, int] | None = None
        """height and width of a view, the augmentation's own if not given"""
        seed: int = 0
        """of the draws"""
        to: Path = Path("views.png")
        """file to write"""

    flags = tyro.cli(Flags, args=words, prog="fastssl data show")
    _at_least(1, rows=flags.rows, columns=flags.columns, image_size=min(flags.image_size or (1, 1)))
    _at_least(0, seed=flags.seed)
    source = open_source(flags.source)
    augmentation = augmentation_of(flags.augmentation, source, flags.image_size)
    if not flags.to.absolute().parent.is_dir():
        raise ValueError(f"data: there is no folder {flags.to.absolute().parent} to write {flags.to.name} into")
    make_contact_sheet(source, augmentation, flags.engine, flags.rows, flags.columns, flags.seed).save(flags.to)
    print(flags.to)


def bench(words: list[str]) -> None:
    """fastssl bench --data SOURCE"""

    @dataclasses.dataclass
    class Flags:
        """Images/s and processor seconds of each augmentation and engine, in turn."""

        data: str
        """folder:PATH, webdataset:SHARDS, …"""
        augmentation: tuple[str, ...] = ("mae", "moco_v2", "moco_v3", "evaluation")
        """methods, multi_crop, evaluation"""
        engine: tuple[str, ...] = engines()
        """torchvision, dali"""
        workers: int = min(2, cores())
        """processes, or threads of DALI"""
        batch_size: int = 64
        """images"""
        seconds: float = 5.0
        """for each"""

    flags = tyro.cli(Flags, args=words, prog="fastssl bench")
    _at_least(0, workers=flags.workers, seconds=flags.seconds)
    _at_least(1, batch_size=flags.batch_size, augmentation=len(flags.augmentation), engine=len(flags.engine))
    source = open_source(flags.data)
    augmentations_by_name = {name: augmentation_of(name, source) for name in flags.augmentation}
    for engine in flags.engine:
        Loader(source, next(iter(augmentations_by_name.values())), 1, engine=engine)  # refuses one that is not there
    how = f"{flags.workers} workers, batch {flags.batch_size}, {flags.seconds:g} s each, {len(source):,} images"
    table = Table("augmentation", "engine", "images/s", "CPU s / 1,000 images", title=how)
    for (name, augmentation), engine in itertools.product(augmentations_by_name.items(), flags.engine):
        seen = measured(source, augmentation, engine, min(flags.batch_size, len(source)), flags.workers, flags.seconds)
        table.add_row(name, engine, f"{seen.images_per_second:,.0f}", f"{seen.cpu_seconds:,.2f}")
    Console().print(table)


def _at_least(least: int, **flags: float) -> None:
    for name, value in flags.items():
        if not least <= value < 2**63:
            raise ValueError(f"data: --{name.replace('_', '-')} must be at least {least}, got {value}")


def measured(
    source: Source, augmentation: Augmentation, engine: str, batch_size: int, workers: int, seconds: float
) -> Throughput:
    """Of a loader, epoch after epoch, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def start():
        loader = Loader(source, augmentation, batch_size, workers=workers, engine=engine, device=device, max_bad=1.0)
        return (len(batch.index) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return measure_throughput(start, seconds, warm_up=2 * max(1, workers) + 2)


def augmentation_of(name: str, source: Source, size: tuple[int, int] | None = None) -> Augmentation:
    """The augmentation of a method (its preset `small` for small images), or another of `data.augmentation`."""
    if name in OTHER_AUGMENTATIONS:
        return getattr(augmentations, name)(size or (224, 224))
    if name not in method_names():
        raise ValueError(
            f"data: unknown augmentation {name!r}, there are {', '.join((*method_names(), *OTHER_AUGMENTATIONS))}"
        )
    config = method_module(name).Config
    small = source.size is not None and max(source.size) <= 64
    chosen = config.small() if small else config.paper()
    return (dataclasses.replace(chosen, image_size=size) if size else chosen).augmentation


def engines() -> tuple[str, ...]:
    """Those that are installed."""
    return tuple(engine for engine in ENGINES if engine != "dali" or has_dali())


def _said(seen: Throughput) -> str:
    return f"{seen.images_per_second:,.0f} images/s, {seen.cpu_seconds:,.2f} processor seconds for 1,000"
