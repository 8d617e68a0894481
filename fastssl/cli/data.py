"""`fastssl data`: facts about a source of images (check), its augmented views (show), and one file of it (pack)."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from fastssl.data.contact_sheet import make_contact_sheet, shown_images
from fastssl.data.findings import scan
from fastssl.data.formats import SUFFIXES
from fastssl.data.listing import PREVIEW, RUNS
from fastssl.data.source import SPLITS, Source, open_source, read_captions
from fastssl.data.timing import Throughput, cores
from fastssl.machine import compared_engines
from fastssl.method_modules import find_augmentation
from fastssl.text import printable

from . import data_pack
from .bench import loader_speed
from .data_page import SIDES, Side, bad_images, open_splits, page
from .flags import parse


@dataclasses.dataclass
class CheckFlags:
    """Decodes every image of a source: what both splits hold, what was passed over and why, images/s of each engine."""

    source: tyro.conf.Positional[str]
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    split: Literal["both", "train", "test"] = "both"
    """splits of the source"""
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
    tokenizer: str | None = None
    """run of dvae or weights file whose codes a method predicts (beit), which gives the size of its second view"""
    engine: str = "torchvision"
    """loader engine: torchvision, device or dali"""
    rows: Annotated[int, AT_LEAST_1] = 4
    """number of images"""
    columns: Annotated[int, AT_LEAST_1] = 4
    """number of draws for each image"""
    image_size: Annotated[tuple[int, int] | None, AT_LEAST_1] = None
    """height and width of a view in pixels, those of the augmentation by default"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """random seed of the draws"""
    to: Path = Path(f"{PREVIEW}views.png")
    """file to write; a name that starts with fastssl- is never taken for an image of a folder"""


def command(words: list[str]) -> None:
    """fastssl data check SOURCE | data show SOURCE --augmentation AUGMENTATION | data pack SOURCE --out FILE.pack"""
    commands = {"check": _check, "show": _show, "pack": data_pack.command}
    if words in (["-h"], ["--help"]):
        print(command.__doc__)
        return
    if not words or words[0] not in commands:
        raise ValueError(f"data: name a command: {', '.join(commands)}, got {words[0] if words else 'nothing'}")
    commands[words[0]](words[1:])


def _check(words: list[str]) -> None:
    flags = parse(CheckFlags, words, "fastssl data check")
    check_ranges(flags, "data")
    console = Console(highlight=False)
    sources, notes = open_splits(flags.source, SPLITS if flags.split == "both" else (flags.split,))
    if flags.bad_files:
        _write_bad_files(flags.bad_files, [])  # raises now rather than after the whole scan
    start = time.perf_counter()
    sides = {SIDES[split]: Side(source, scan(source, flags.workers)) for split, source in sources.items()}
    seconds = time.perf_counter() - start
    total = sum(len(source) for source in sources.values())
    console.print(f"{printable(flags.source)}: {total / seconds:,.0f} images/s decoded", soft_wrap=True, markup=False)
    for block in page(sides, notes):
        console.print()
        console.print(block, soft_wrap=isinstance(block, Text))
    if flags.bad_files:
        _write_bad_files(flags.bad_files, bad_images(sides))
    source, engines = next(iter(sources.values())), compared_engines()
    if flags.seconds and next(iter(sides.values())).findings.good:
        console.print(f"\naugmentation of MoCo v2, {flags.workers} workers")
        augmentation, batch_size = find_augmentation("moco_v2", source), min(64, len(source))
        for engine in engines:
            measured = loader_speed(source, augmentation, engine, batch_size, flags.workers, flags.seconds)
            console.print(f"  {engine:<12} {_speed_text(measured)}", soft_wrap=True)


def _write_bad_files(path: Path, lines: Sequence[str]) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data: --bad-files {printable(path)} can't be written ({error.strerror})") from error


def _show(words: list[str]) -> None:
    flags = parse(ShowFlags, words, "fastssl data show")
    check_ranges(flags, "data")
    source = open_source(flags.source)
    augmentation = find_augmentation(flags.augmentation, source, flags.image_size, flags.tokenizer)
    if not flags.to.absolute().parent.is_dir():
        raise ValueError(f"data: --to must be in a folder that exists, got {flags.to}")
    _check_place(flags.to, source)
    make_contact_sheet(source, augmentation, flags.engine, flags.rows, flags.columns, flags.seed).save(flags.to)
    print(flags.to)
    for index in shown_images(source, flags.rows):
        if captions := read_captions(source, index):
            print(f"{printable(source.name(index))}: {' | '.join(map(printable, captions))}")


def _check_place(path: Path, source: Source) -> None:
    """Checks that a picture does not become an image of the folder that is looked at.

    Raises:
        ValueError: it would.
    """
    root, path = getattr(source, "root", None), path.absolute()
    if root is None or not path.is_relative_to(root.absolute()) or not path.name.lower().endswith(SUFFIXES):
        return
    inside = path.relative_to(root.absolute())
    if not inside.name.startswith(PREVIEW) and inside.parts[0] != RUNS:
        raise ValueError(
            f"data: --to must be outside of the folder that is looked at, or its name must start with {PREVIEW}, as it "
            f"would become an image of that folder, got {printable(path)}"
        )


def _speed_text(measured: Throughput) -> str:
    return f"{measured.images_per_second:,.0f} images/s, {measured.cpu_seconds:,.2f} processor seconds per 1,000"
