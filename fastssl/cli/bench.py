"""`fastssl bench`: speed of the loaders, where their time goes, and what to do about it."""

import dataclasses
import itertools
import time
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_ranges
from fastssl.contract import Batch, PreparesEpochs
from fastssl.data.augmentation import Augmentation
from fastssl.data.jpeg import DECODER
from fastssl.data.loader import Loader
from fastssl.data.parts import Parts, Sample, measure_parts, take_sample
from fastssl.data.source import Source, Subset, open_source
from fastssl.data.timing import Throughput, cores, measure_throughput
from fastssl.data.token_table import build_table, with_captions
from fastssl.data.workers import choose_kind
from fastssl.machine import compared_engines, installed_engines
from fastssl.method_modules import find_augmentation, method_module, takes_tokenizer
from fastssl.pretraining import preset_config
from fastssl.train.config import Execution
from fastssl.train.trainer import Trainer

from .bench_advice import Situation, advise
from .flags import parse

SECONDS_OF_STEPS = 3.0


@dataclasses.dataclass
class Flags:
    """Images/s of each augmentation and loader engine, where the time goes, and what to do about it."""

    data: str
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    augmentation: tuple[str, ...] = ("mae", "moco_v2", "moco_v3", "evaluation")
    """augmentations: methods, multi_crop, evaluation"""
    engine: tuple[str, ...] = compared_engines()
    """loader engines: torchvision, device, dali"""
    workers: Annotated[int, NOT_NEGATIVE] = min(2, cores())
    """processes or threads that load data"""
    worker_kind: tuple[str, ...] = ("auto",)
    """kinds of workers to compare: process, thread, auto (threads on a Python without its global lock)"""
    batch_size: Annotated[int, AT_LEAST_1] = 64
    """images per batch"""
    seconds: Annotated[float, NOT_NEGATIVE] = 5.0
    """seconds to measure each augmentation and engine"""
    method: str | None = None
    """method whose step is measured here, with its own augmentation and --batch-size"""
    tokenizer: str | None = None
    """run of dvae or weights file whose codes a method predicts (beit)"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision of that step"""
    step_rate: Annotated[float | None, POSITIVE] = None
    """images/s of the training step, where it is known"""


def command(words: list[str]) -> None:
    """fastssl bench --data SOURCE"""
    flags = parse(Flags, words, "fastssl bench")
    check_ranges(flags, "bench")
    for name in ("augmentation", "engine", "worker_kind"):
        if not getattr(flags, name):
            raise ValueError(f"bench: --{name.replace('_', '-')} must name at least one, got none")
    kinds = list(dict.fromkeys(map(choose_kind, flags.worker_kind)))
    source = open_source(flags.data)
    names = dict.fromkeys((flags.method, *flags.augmentation) if flags.method else flags.augmentation)
    tokenizers = {name: flags.tokenizer for name in names if flags.tokenizer is not None and takes_tokenizer(name)}
    if flags.tokenizer is not None and not tokenizers:
        raise ValueError(
            f"bench: --tokenizer is for a method that predicts its codes (--method beit), got {flags.tokenizer}"
        )
    augmentations = {name: find_augmentation(name, source, None, tokenizers.get(name)) for name in names}
    for engine in flags.engine:
        Loader(source, next(iter(augmentations.values())), 1, engine=engine)  # raises now if an engine is not installed
    sample = take_sample(source, flags.batch_size)
    step_rate = flags.step_rate
    if step_rate is None and flags.method:
        step_rate = measure_step(flags.method, source, flags.batch_size, flags.precision, tokenizers.get(flags.method))
    title = f"{flags.workers} workers, batch {flags.batch_size}, {flags.seconds:g} s each, {len(source):,} images"
    table = Table("augmentation", "engine", "images/s", "CPU s / 1,000 images", title=title)
    batch_size = min(flags.batch_size, len(source))
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for (name, augmentation), engine in itertools.product(augmentations.items(), flags.engine):
        for kind in kinds if engine != "dali" else kinds[:1]:
            measured = loader_speed(source, augmentation, engine, batch_size, flags.workers, flags.seconds, kind)
            shown = f"{engine}, {kind}" if len(kinds) > 1 and engine != "dali" else engine
            table.add_row(name, shown, f"{measured.images_per_second:,.0f}", f"{measured.cpu_seconds:,.2f}")
            rates.setdefault((name, engine), {})[kind] = measured.images_per_second
    console = Console(highlight=False)
    console.print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = {name: measure_parts(sample, views, device, flags.seconds) for name, views in augmentations.items()}
    console.print(_table_of_parts(parts, sample, rates, flags.workers))
    for sentence in advise(_situation(flags, augmentations, parts, sample, rates, step_rate)):
        console.print(sentence, soft_wrap=True, markup=False)


def _situation(
    flags: Flags,
    augmentations: dict[str, Augmentation],
    parts: dict[str, Parts],
    sample: Sample,
    rates: dict[tuple[str, str], dict[str, float]],
    step_rate: float | None,
) -> Situation:
    """What the advice depends on: the method's augmentation, or the first one, and the first engine."""
    name, engine = next(iter(parts)), flags.engine[0]
    return Situation(
        parts[name],
        flags.data,
        name,
        sample.side,
        max(min(view.size) for view in augmentations[name].views),
        cores(),
        torch.cuda.is_available(),
        engine,
        installed_engines(),
        step_rate,
        flags.workers,
        rates[name, engine] if flags.workers and engine != "dali" else {},
    )


def loader_speed(
    source: Source,
    augmentation: Augmentation,
    engine: str,
    batch_size: int,
    workers: int,
    seconds: float,
    worker_kind: str = "auto",
) -> Throughput:
    """Throughput of a loader that runs epoch after epoch, with batches on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def start():
        loader = Loader(
            source,
            augmentation,
            batch_size,
            workers=workers,
            engine=engine,
            device=device,
            max_bad=1.0,
            worker_kind=worker_kind,
        )
        return (len(batch.index) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return measure_throughput(start, seconds, warm_up=2 * max(1, workers) + 2)


def measure_step(name: str, source: Source, batch_size: int, precision: Any, tokenizer: str | None = None) -> float:
    """Images per second of a method's training step on this machine, from batches of noise that are there already.

    Raises:
        ValueError: the method can't be measured by itself, or refuses the batch.
    """
    _, config = preset_config(method_module(name), source)
    training = dataclasses.replace(config.training, batch_size=batch_size, accumulate=1)
    changes: dict[str, Any] = {"images": len(source)} if getattr(config, "images", 0) is None else {}
    changes |= {} if tokenizer is None else {"tokenizer": tokenizer}
    config = dataclasses.replace(config, training=training, **changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = method_module(name).build(config).to(device)
    if isinstance(method, PreparesEpochs):
        raise ValueError(f"bench: {name} needs all images before its first step: give its rate as --step-rate IMAGES/S")
    groups = getattr(method_module(name), "parameter_groups", None)
    trainer = Trainer(method, training, Execution(precision=precision), 1000, parameter_groups=groups)
    numbers = torch.arange(batch_size, device=device) % len(source)
    views = tuple(torch.randn(batch_size, 3, *view.size, device=device) for view in config.augmentation.views)
    extras = {}
    if text := getattr(config, "text", None):
        images = with_captions(Subset(source, range(min(batch_size, len(source)))))
        chosen = torch.arange(batch_size) % len(images)
        extras["tokens"] = build_table(images, text).gather(chosen, chosen).to(device)
    batch = Batch(views, numbers, torch.full_like(numbers, -1), numbers, extras)

    def run_step() -> None:
        trainer.step(iter([batch]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        run_step()
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS_OF_STEPS or not steps:
        run_step()
        steps += 1
        elapsed = time.perf_counter() - start
    return steps * batch_size / elapsed


def _table_of_parts(
    parts: dict[str, Parts], sample: Sample, rates: dict[tuple[str, str], dict[str, float]], workers: int
) -> Table:
    """A row for each part, a column for each augmentation."""
    title = f"ms per image on one core and share, {len(sample.sides)} images of {sample.side} pixels (torchvision)"
    table = Table("part", *parts, title=title, caption=f"JPEGs by {DECODER}")
    for part in Parts._fields:
        cells = [f"{getattr(of, part):.2f} {getattr(of, part) / sum(of):>4.0%}" for of in parts.values()]
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("all", *(f"{sum(of):.2f}" for of in parts.values()))
    table.add_row("images/s a core", *(f"{of.a_core:,.0f}" for of in parts.values()))
    whole = [max(rates.get((name, "torchvision"), {"": 0.0}).values()) for name in parts]
    table.add_row(f"whole loader, {workers} workers", *(f"{rate:,.0f}" if rate else "–" for rate in whole))
    return table
