"""`fastssl data pack`: the images of a source in one file, or in shards."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from fastssl.data.jpeg import DECODER
from fastssl.data.packing import Encoding, write_pack
from fastssl.data.source import SPLITS, Source, Subset, open_source
from fastssl.data.timing import cores, measure_throughput
from fastssl.method_modules import find_augmentation
from fastssl.text import printable

from .bench import loader_speed
from .data_page import open_splits
from .flags import parse

SAMPLE = 64  # images from which sizes and speeds are estimated
SECONDS = 1.0  # to read each choice
CHOICES = (
    Encoding("copy"),
    Encoding("jpeg", 256),
    Encoding("jpeg", 320),
    Encoding("jpeg", 512),
    Encoding("yuv", 256),
    Encoding("yuv", 320),
    Encoding("rgb", 256),
)
NAMED_BAD = 10  # largest number of undecodable images that are named


@dataclasses.dataclass
class Flags:
    """Writes the images of both splits of a source into a file, pack:FILE, smaller and faster to read."""

    source: tyro.conf.Positional[str]
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    out: Path | None = None
    """file to write, which must not exist; an interrupted one is continued"""
    kind: Literal["jpeg", "yuv", "rgb", "copy"] = "jpeg"
    """jpeg: encoded anew unless small enough; yuv: pixels of 1.5 bytes, which need no decoding; rgb: of 3 bytes; copy:
    the files as they are"""
    side: Annotated[int, AT_LEAST_1] = 320
    """length of the shorter side in pixels that larger images are resized to, except for copy"""
    shards: Annotated[int, AT_LEAST_1] = 1
    """number of files to write, FILE-00000-of-…; pack:FILE opens them all"""
    quality: Annotated[int, AT_LEAST_1] = 90
    """quality of the JPEGs, 1 to 95"""
    workers: Annotated[int, NOT_NEGATIVE] = min(8, cores())
    """processes that decode and encode"""
    estimate: bool = False
    """only estimate size, images/s and time of each choice, from a sample of the images"""


def command(words: list[str]) -> None:
    """fastssl data pack SOURCE --out FILE.pack"""
    flags = parse(Flags, words, "fastssl data pack")
    check_ranges(flags, "data")
    if flags.quality > 95:
        raise ValueError(f"data: --quality must be at most 95, got {flags.quality}")
    if flags.out is None and not flags.estimate:
        raise ValueError("data: --out is needed: the file to write, or --estimate")
    sources, notes = open_splits(flags.source, SPLITS)
    for note in notes:
        print(printable(note))
    if flags.estimate:
        _estimate(sources, flags)
    elif flags.out is not None:
        _pack(sources, flags, flags.out)


def _pack(sources: dict[str, Source], flags: Flags, out: Path) -> None:
    encoding = Encoding(flags.kind, flags.side, flags.quality)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"data: --out must be in a folder that exists, got {printable(out)}")
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, sources.values())))
        packed = write_pack(
            sources,
            out,
            encoding,
            workers=flags.workers,
            name=flags.source,
            progress=lambda done, total: bar.update(task, completed=done),
            shards=flags.shards,
        )
    for line in packed.bad[:NAMED_BAD]:
        print(f"left out: {line}")
    if len(packed.bad) > NAMED_BAD:
        print(f"left out: {len(packed.bad) - NAMED_BAD:,} more images that can't be decoded")
    earlier = f", {packed.continued:,} of them by an interrupted call" if packed.continued else ""
    print(printable(f"{packed.images:,} images, {packed.bytes / 1e9:,.3g} GB{earlier}: pack:{out}"))


def _estimate(sources: dict[str, Source], flags: Flags) -> None:
    """Prints size and speeds of each choice, measured on evenly spaced images of the training split."""
    train, total = sources[SPLITS[0]], sum(map(len, sources.values()))
    sample = Subset(train, range(0, len(train), -(-len(train) // SAMPLE)))
    chosen = Encoding(flags.kind, flags.side, flags.quality)
    choices = list(dict.fromkeys([chosen, *(choice._replace(quality=flags.quality) for choice in CHOICES)]))
    title = f"{total:,} images, estimated from {len(sample)}; views of MoCo v2 on one core; JPEGs by {DECODER}"
    table = Table("choice", "GB", "images/s when read", "minutes to write", title=title)
    table.add_row("the source", "–", f"{_speed(train, sample):,.0f}", "–")
    with tempfile.TemporaryDirectory() as folder:
        for number, choice in enumerate(choices):
            path = Path(folder, f"{number}.pack")
            written = measure_throughput(lambda p=path, c=choice: _write_once(sample, p, c), 0, warm_up=0)
            minutes = total / written.images_per_second / max(1, flags.workers) / 60
            pack = open_source(f"pack:{path}")
            gigabytes = path.stat().st_size / len(pack) * total / 1e9
            table.add_row(_name(choice), f"{gigabytes:,.3g}", f"{_speed(train, pack):,.0f}", f"{minutes:,.1f}")
    Console().print(table)


def _write_once(source: Source, path: Path, encoding: Encoding):
    """Yields the number of images once they are written."""
    yield write_pack({SPLITS[0]: source}, path, encoding).images


def _speed(train: Source, source: Source) -> float:
    """Images/s of the loader in this process."""
    augmentation = find_augmentation("moco_v2", train)
    return loader_speed(source, augmentation, "torchvision", min(16, len(source)), 0, SECONDS).images_per_second


def _name(choice: Encoding) -> str:
    if choice.kind == "copy":
        return "--kind copy"
    return f"--kind {choice.kind} --side {choice.side}"
