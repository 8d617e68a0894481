"""Images per second, processor time and memory of the loaders: ours from each source, and those of other packages.

    python -m benchmarks.loader            # measures, writes benchmarks/results/loader/<machine>.json and the tables
    python -m benchmarks.loader --only dino packing  # measures these rows; the others stay
    python -m benchmarks.loader --render   # writes the tables from the stored results
    python -m benchmarks.loader --check    # writes nothing; exit status 1 if a table is out of date

The baseline is the pipeline of the reference code: torchvision's ImageFolder, its transforms on Pillow images,
normalisation in the workers, and a DataLoader; `loader_rivals.py` holds it and the other packages. All loaders have the
same photographs and the same number of workers (DALI and SPDL: threads), and run in turn in one process, in which torch
has one thread. A ratio is the median over the rounds. `loader_facts.py` measures what is no loader: opening, packing,
memory, floors.

The photographs are real: two of scikit-learn and six of scikit-image, as JPEG of quality 90, each repeated.
"""

import argparse
import io
import itertools
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from fastssl.data.augmentation import Augmentation
from fastssl.data.loader import Loader
from fastssl.data.packing import KINDS, Encoding, write_pack
from fastssl.data.source import open_source
from fastssl.machine import installed_engines
from fastssl.method_modules import find_augmentation

from . import loader_facts, store
from .loader_clock import Batches, Cost, cost
from .loader_rivals import BASELINE, RIVALS, Setting, Start, absent, installed
from .loader_table import MARKERS, key, render
from .machine import environment, keep_freed_memory, machine
from .store import RESULTS, machine_files
from .table import PAGE, insert, present, write_or_check

KEPT = RESULTS / "loader"
AUGMENTATIONS = ("mae", "moco_v2", "dino", "evaluation")
SIDE = 400  # pixels of the photographs' shorter side
WORKERS, BATCH, ROUNDS, SECONDS, COPIES = 2, 32, 3, 1.2, 100


def photographs() -> list[Image.Image]:
    """Eight colour photographs, each at least 300 pixels high."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = [
        *load_sample_images().images,
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.rocket(),
        skimage.data.hubble_deep_field(),
        skimage.data.stereo_motorcycle()[0],
    ]
    return [Image.fromarray(pixels) for pixels in arrays]


def write_photographs(
    root: Path, side: int, photos: list[Image.Image] | None = None, copies: int | None = None
) -> None:
    """Writes the class folders root/0 … root/7, and the same images as tar shards in root/../shards-SIDE.

    Args:
        root: the folder to write.
        side: pixels of the shorter side.
        photos: one photograph for each class; by default `photographs()`.
        copies: files of each photograph; by default `COPIES`.
    """
    shards = root.parent / f"shards-{side}"
    shards.mkdir()
    for label, photo in enumerate(photos or photographs()):
        size = [round(length * side / min(photo.size)) for length in photo.size]
        file = io.BytesIO()
        photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        (root / str(label)).mkdir(parents=True)
        with tarfile.open(shards / f"{label}.tar", "w") as tar:
            for copy in range(copies or COPIES):
                (root / str(label) / f"{copy:03d}.jpg").write_bytes(file.getvalue())
                for suffix, data in (("jpg", file.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{label}-{copy:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_packs(folder: Path, root: Path, side: int) -> dict[str, str]:
    """{name: source} of packs of a folder of photographs, one of each kind, with their pixels at their size."""
    sources = {}
    for kind in KINDS:
        if kind == "copy":  # the same bytes as "jpeg", of JPEG files that are small enough
            continue
        path = folder / f"{kind}.pack"
        write_pack({"train": open_source(f"folder:{root}")}, path, Encoding(kind, side))
        sources[f"pack, {kind}"] = f"pack:{path}"
    return sources


def our_loader(source: str, augmentation: Augmentation, engine: str) -> Start:
    def start() -> Batches:
        loader = Loader(open_source(source), augmentation, BATCH, workers=WORKERS, engine=engine)
        return (list(batch.views) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return start


def contestants(folder: Path, root: Path, packs: dict[str, str], augmentation: Augmentation) -> dict[str, Start]:
    """Our loader from each source, and all rivals that are installed, by name."""
    shards = root.parent / f"shards-{SIDE}"
    sources = {"folder": f"folder:{root}", "webdataset": f"webdataset:{shards}", **packs}
    starts = {f"fastssl, {name}": our_loader(source, augmentation, "torchvision") for name, source in sources.items()}
    if "dali" in installed_engines():
        starts["fastssl on DALI, folder"] = our_loader(sources["folder"], augmentation, "dali")
    setting = Setting(root, shards, folder, augmentation, BATCH, WORKERS)
    return starts | {name: rival.start(setting) for name, rival in RIVALS.items() if installed(rival)}


def checked(name: str, start: Start, augmentation: Augmentation) -> Start:
    """The same loader; an error if its first batch does not have the augmentation's views as floats."""
    expected = [(torch.float32, (BATCH, 3, *view.size)) for view in augmentation.views]

    def start_and_check() -> Batches:
        batches = start()
        first = next(batches)
        if (found := [(view.dtype, tuple(view.shape)) for view in first]) != expected:
            raise RuntimeError(f"{name} gives {found} in place of {expected}")
        yield first
        yield from batches

    return start_and_check


def compare(starts: dict[str, Start], augmentation: Augmentation) -> dict:
    """One row: medians over rounds of images per second, of both ratios, of processor time and of memory."""
    results: dict[str, list[Cost]] = {name: [] for name in starts}
    names = list(starts)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = checked(name, starts[name], augmentation)
            results[name].append(cost(start, SECONDS, warm_up=WORKERS + 1, turns=max(1, WORKERS)))
    rates = {name: [run.images_per_second for run in runs] for name, runs in results.items()}
    best = max((name for name in names if name in RIVALS), key=lambda name: statistics.median(rates[name]))

    def medians(values: dict[str, list[float]], digits: int) -> dict[str, float]:
        return {name: round(statistics.median(runs), digits) for name, runs in values.items()}

    def ratios(other: str) -> dict[str, float]:
        return medians({name: [a / b for a, b in zip(rates[name], rates[other])] for name in names}, 2)

    return {
        "images_per_second": medians(rates, 1),
        "ratio": ratios(BASELINE),
        "best": best,
        "ratio_best": ratios(best),
        "cpu_seconds": medians({name: [run.cpu_seconds for run in runs] for name, runs in results.items()}, 2),
        "memory_mb": medians({name: [run.memory_mb for run in runs] for name, runs in results.items()}, 0),
        "others": round(statistics.median(run.others for runs in results.values() for run in runs), 3),
        "absent": absent(),
    }


def measure(names: tuple[str, ...]) -> Iterator[list[dict]]:
    """The row of each of these augmentations."""
    if not names:
        return
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        root = folder / f"photos-{SIDE}"
        write_photographs(root, SIDE)
        packs = write_packs(folder, root, SIDE)
        for name in names:
            augmentation = find_augmentation(name, open_source(f"folder:{root}"))
            row = compare(contestants(folder, root, packs, augmentation), augmentation)
            yield [{"augmentation": name, "side": SIDE, "batch": BATCH, **row}]


def measure_facts(names: tuple[str, ...]) -> Iterator[list[dict]]:
    """The rows of each of these measurements of `loader_facts.py`."""
    with tempfile.TemporaryDirectory() as home:
        root = Path(home, f"photos-{SIDE}")
        write_photographs(root, SIDE, copies=25)
        for name in names:
            yield [{"measurement": name, **row} for row in loader_facts.FACTS[name](root)]


def main(arguments: list[str] | None = None) -> int:
    everything = (*AUGMENTATIONS, *loader_facts.FACTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=everything, help="measure these rows alone; the others stay")
    parser.add_argument("--render", action="store_true", help="write the tables from the stored results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is out of date")
    options = parser.parse_args(arguments)
    if not (options.render or options.check):
        _measure_and_keep(options.only or everything)
    paths = machine_files(KEPT, shown_in=present(PAGE, MARKERS) if options.check else None)
    return write_or_check(
        {PAGE: insert(render(paths), PAGE, MARKERS)}, options.check, "python -m benchmarks.loader --render"
    )


def _measure_and_keep(chosen: tuple[str, ...]) -> None:
    """Measures, and keeps each result at once, so that an interruption costs one."""
    from importlib.metadata import PackageNotFoundError, version

    import cpuinfo

    keep_freed_memory()
    torch.set_num_threads(1)  # workers have the cores
    about, software = machine(cpuinfo.get_cpu_info()["brand_raw"]), environment()
    for package in sorted({"torchvision", "pillow", *(rival.package for rival in RIVALS.values())}):
        try:
            software[package] = version(package)
        except PackageNotFoundError:
            software[package] = "not installed"
    augmentations = tuple(name for name in AUGMENTATIONS if name in chosen)
    facts = tuple(name for name in loader_facts.FACTS if name in chosen)
    for rows in itertools.chain(measure(augmentations), measure_facts(facts)):
        print(*rows, sep="\n", flush=True)
        measured = {key(row) for row in rows}
        store.add(KEPT, about, software, rows, replaces=lambda row, measured=measured: key(row) in measured)


if __name__ == "__main__":
    sys.exit(main())
