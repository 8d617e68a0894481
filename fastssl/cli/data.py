"""`fastssl data check` and `fastssl data show`: facts about a source of images, and its augmented views."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from fastssl.data.contact_sheet import make_contact_sheet
from fastssl.data.findings import Findings, scan
from fastssl.data.source import open_source
from fastssl.data.timing import Throughput, cores
from fastssl.machine import installed_engines
from fastssl.run import find_augmentation

from .bench import loader_speed
from .flags import parse

NAMED_BAD = 20  # bad files that are printed; --bad-files FILE names all


@dataclasses.dataclass
class CheckFlags:
    """Decodes every image of a source: counts, sizes, formats, bad files; then images/s of each loader engine."""

    source: tyro.conf.Positional[str]
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    split: Literal["train", "test"] = "train"
    """split of the source"""
    workers: Annotated[int, NOT_NEGATIVE] = min(2, cores())
    """processes that decode"""
    seconds: Annotated[float, NOT_NEGATIVE] = 5.0
    """seconds to measure each engine with the augmentation of MoCo v2; 0 to skip it"""
    bad_files: Path | None = None
    """file to write the names of all bad files to"""


@dataclasses.dataclass
class ShowFlags:
    """Contact sheet of the views that a method gets: one row per image, with several draws of the augmentation."""

    source: tyro.conf.Positional[str]
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    augmentation: str = "moco_v2"
    """augmentation: a method, multi_crop or evaluation"""
    engine: str = "torchvision"
    """loader engine: torchvision or dali"""
    rows: Annotated[int, AT_LEAST_1] = 4
    """number of images"""
    columns: Annotated[int, AT_LEAST_1] = 4
    """number of draws for each image"""
    image_size: Annotated[tuple[int, int] | None, AT_LEAST_1] = None
    """height and width of a view in pixels, those of the augmentation by default"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """random seed of the draws"""
    to: Path = Path("views.png")
    """file to write"""


def command(words: list[str]) -> None:
    """fastssl data check SOURCE | fastssl data show SOURCE --augmentation AUGMENTATION"""
    commands = {"check": _check, "show": _show}
    if words in (["-h"], ["--help"]):
        print(command.__doc__)
        return
    if not words or words[0] not in commands:
        raise ValueError(f"data: name a command: {', '.join(commands)}, got {words[0] if words else 'nothing'}")
    commands[words[0]](words[1:])


def _check(words: list[str]) -> None:
    flags = parse(CheckFlags, words, "fastssl data check")
    check_ranges(flags, "data")
    if flags.bad_files:
        flags.bad_files.write_text("")  # raises now rather than after the whole scan
    console, source = Console(highlight=False), open_source(flags.source, flags.split)
    start = time.perf_counter()
    findings = scan(source, flags.workers)
    seconds = time.perf_counter() - start
    for name, value in _facts(findings, len(source), flags.split, seconds):
        console.print(f"{name:<12} {value}", soft_wrap=True, markup=False)
    for line in findings.bad[:NAMED_BAD]:
        console.print(f"bad          {line}", soft_wrap=True, markup=False)
    if len(findings.bad) > NAMED_BAD:
        console.print(f"bad          … and {len(findings.bad) - NAMED_BAD} more: --bad-files FILE names all")
    if flags.bad_files:
        flags.bad_files.write_text("".join(f"{line}\n" for line in findings.bad))
    if flags.seconds and findings.good:
        augmentation, batch_size = find_augmentation("moco_v2", source), min(64, len(source))
        for engine in installed_engines():
            measured = loader_speed(source, augmentation, engine, batch_size, flags.workers, flags.seconds)
            text = f"{_speed_text(measured)} with the augmentation of MoCo v2, {flags.workers} workers"
            console.print(f"{engine:<12} {text}", soft_wrap=True)


def _facts(findings: Findings, total: int, split: str, seconds: float) -> Iterator[tuple[str, str]]:
    """(name, value) of each line that describes the result of a scan."""
    bad = len(findings.bad)
    yield "images", f"{total:,} of the {split} split, {bad:,} bad; scanned {total / seconds:,.0f} per second"
    if findings.good:
        classes = len(findings.labels) - (-1 in findings.labels)
        counts = [count for label, count in findings.labels.items() if label >= 0]
        yield "classes", f"{classes:,}, of {min(counts):,} to {max(counts):,} images" if counts else "no labels"
        yield "formats", ", ".join(f"{name} {count:,}" for name, count in findings.formats.most_common())
        for name, sides in (("heights", findings.heights), ("widths", findings.widths)):
            low, median, high = np.percentile(sides, (0, 50, 100)).astype(int)
            yield name, f"{low:,} to {high:,} pixels, median {median:,}"
        yield "size", f"{findings.bytes / 1e6:,.1f} MB, {findings.bytes / findings.good / 1e3:,.1f} KB per image"


def _show(words: list[str]) -> None:
    flags = parse(ShowFlags, words, "fastssl data show")
    check_ranges(flags, "data")
    source = open_source(flags.source)
    augmentation = find_augmentation(flags.augmentation, source, flags.image_size)
    if not flags.to.absolute().parent.is_dir():
        raise ValueError(f"data: --to must be in a folder that exists, got {flags.to}")
    make_contact_sheet(source, augmentation, flags.engine, flags.rows, flags.columns, flags.seed).save(flags.to)
    print(flags.to)


def _speed_text(measured: Throughput) -> str:
    return f"{measured.images_per_second:,.0f} images/s, {measured.cpu_seconds:,.2f} processor seconds per 1,000"
