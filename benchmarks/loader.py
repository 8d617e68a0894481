"""Images per second and processor time of each loader, augmentation and source.

    python -m benchmarks.loader            # measures, writes benchmarks/results/loader/<machine>.json and the tables
    python -m benchmarks.loader --render   # writes the tables from the stored results
    python -m benchmarks.loader --check    # writes nothing; exit status 1 if a table is out of date

The baseline is the pipeline of the reference code: torchvision's ImageFolder, its transforms on Pillow images,
normalisation in the workers, and a DataLoader; for tar shards the webdataset package. All loaders have the same number
of workers (DALI: threads) and run in turn in one process. A ratio is the median over the rounds.

The photographs are real: two of scikit-learn and six of scikit-image, as JPEG of quality 90 in several sizes, each
repeated.
"""

import argparse
import io
import itertools
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.data.timing import measure_throughput
from fastssl.machine import installed_engines
from fastssl.run import find_augmentation
from tests.support.transforms import plain_transform

from . import store
from .machine import environment, keep_freed_memory, machine
from .store import RESULTS, machine_files
from .table import PAGE, insert, markdown_table, number, present, times, write_or_check

KEPT = RESULTS / "loader"
AUGMENTATIONS = ("mae", "moco_v2", "moco_v3", "evaluation")
SIDES = (256, 400, 1024)  # pixels of the shorter side
WORKERS, BATCH, ROUNDS, SECONDS, COPIES = 2, 64, 3, 3.0, 40
SHARDED = 400  # the side of the photographs that are also measured in tar shards
MARKERS = "<!-- loaders:begin -->", "<!-- loaders:end -->"
HEADER = (
    "augmentation",
    "source",
    "torchvision engine",
    "DALI engine",
    "baseline",
    "× baseline",
    "CPU s / 1,000 images",
)

LEGEND = """\
Images per second; × baseline of the torchvision engine and of the DALI engine; processor seconds per 1,000 images,
including the start: torchvision engine / DALI engine / baseline. *Baseline*: torchvision's `ImageFolder` and transforms
in a `DataLoader`; for `webdataset`, the package of that name with the same transforms. Two workers (threads of DALI) on
two cores, batch 64, in turn in one process, medians of three rounds. Photographs as JPEG of quality 90; the number is
their shorter side in pixels."""


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


def write_photographs(root: Path, side: int, photos: list[Image.Image] | None = None) -> None:
    """Writes the class folders root/0 … root/7, and the same images as tar shards in root/../shards-SIDE.

    Args:
        root: the folder to write.
        side: pixels of the shorter side.
        photos: one photograph for each class; by default `photographs()`.
    """
    shards = root.parent / f"shards-{side}"
    shards.mkdir()
    for label, photo in enumerate(photos or photographs()):
        size = [round(length * side / min(photo.size)) for length in photo.size]
        file = io.BytesIO()
        photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        (root / str(label)).mkdir(parents=True)
        with tarfile.open(shards / f"{label}.tar", "w") as tar:
            for copy in range(COPIES):
                (root / str(label) / f"{copy:03d}.jpg").write_bytes(file.getvalue())
                for suffix, data in (("jpg", file.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{label}-{copy:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Views:
    """The views of an augmentation, made by torchvision's transforms and normalised in the worker."""

    def __init__(self, augmentation: Augmentation):
        self.views = [self._transform(view) for view in augmentation.views]

    @staticmethod
    def _transform(view: View):
        return v2.Compose(
            [plain_transform(view), v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)]
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]


def engine_loader(source: str, augmentation: Augmentation, engine: str) -> Callable[[], Iterator[int]]:
    def start():
        loader = Loader(open_source(source), augmentation, BATCH, workers=WORKERS, engine=engine)
        return (len(batch.index) for epoch in itertools.count() for batch in loader.epoch(epoch))

    return start


def image_folder(root: Path, augmentation: Augmentation) -> Callable[[], Iterator[int]]:
    def start():
        data = torchvision.datasets.ImageFolder(str(root), Views(augmentation))
        loader = DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)
        return (len(labels) for _ in itertools.count() for _, labels in loader)

    return start


def webdataset(shards: Path, augmentation: Augmentation) -> Callable[[], Iterator[int]]:
    import webdataset as wds

    def start():
        paths = sorted(map(str, shards.glob("*.tar")))
        data = (
            wds.WebDataset(paths, shardshuffle=len(paths), nodesplitter=wds.split_by_node).shuffle(1000).decode("pil")
        )
        data = data.to_tuple("jpg", "cls").map_tuple(Views(augmentation), int).batched(BATCH, partial=False)
        loader = wds.WebLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)
        return (len(labels) for _ in itertools.count() for _, labels in loader)

    return start


def compare(contestants: dict[str, Callable[[], Iterator[int]]]) -> dict:
    """One row of a table: medians over rounds of images per second, ratios to the baseline and processor seconds."""
    results: dict[str, list] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results[name].append(measure_throughput(contestants[name], SECONDS, warm_up=2 * WORKERS + 2))
    rates = {name: [result.images_per_second for result in runs] for name, runs in results.items()}
    ratios = {name: [a / b for a, b in zip(rates[name], rates["baseline"])] for name in names if name != "baseline"}
    seconds = {name: [result.cpu_seconds for result in runs] for name, runs in results.items()}
    columns = {"images_per_second": (rates, 1), "ratio": (ratios, 2), "cpu_seconds": (seconds, 2)}
    return {
        column: {name: round(statistics.median(runs), digits) for name, runs in values.items()}
        for column, (values, digits) in columns.items()
    }


def measure(side: int, names: tuple[str, ...]) -> Iterator[dict]:
    """Rows of the augmentations with these names, for photographs of one size."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, f"photos-{side}")
        write_photographs(root, side)
        sources = [("folder", root, image_folder)]
        if side == SHARDED:
            sources.append(("webdataset", root.parent / f"shards-{side}", webdataset))
        for name, (kind, path, baseline) in itertools.product(names, sources):
            if kind == "webdataset" and name not in ("mae", "moco_v2"):
                continue
            augmentation = find_augmentation(name, open_source(f"{kind}:{path}"))
            contestants = {
                engine: engine_loader(f"{kind}:{path}", augmentation, engine)
                for engine in installed_engines()
                if engine != "device"  # on a CPU the torchvision engine with fewer processes that crop
            }
            row = {"augmentation": name, "source": kind, "side": side}
            row |= compare({**contestants, "baseline": baseline(path, augmentation)})
            print(row, flush=True)
            yield row


def start_up(folders: int = 1000, files: int = 100) -> dict:
    """Seconds to open a folder of 100,000 files for the first time, and again."""
    with tempfile.TemporaryDirectory() as home:
        for number in range(folders):
            folder = Path(home, "data", f"{number:04d}")
            folder.mkdir(parents=True)
            for file in range(files):
                (folder / f"{file:03d}.jpg").touch()
        time.sleep(2.5)  # a folder that changed less than two seconds ago is not cached
        command = "import sys, time; from fastssl.data.source import open_source; start = time.perf_counter();"
        command += "open_source('folder:' + sys.argv[1]); print(time.perf_counter() - start)"
        environment = {**os.environ, "XDG_CACHE_HOME": f"{home}/cache"}
        runs = [
            subprocess.run(
                [sys.executable, "-c", command, f"{home}/data"], env=environment, capture_output=True, check=True
            )
            for _ in range(4)
        ]
        first, *again = (float(run.stdout) for run in runs)
    return {"files": folders * files, "first": round(first, 2), "again": round(statistics.median(again), 2)}


def render(paths: list[Path]) -> str:
    parts = []
    for path in paths:
        document = store.read(path)
        for run in document["runs"]:
            software, opening = run["environment"], run["start_up"]
            versions = ", ".join(
                f"{name} {software[name.lower()]}" for name in ("torch", "torchvision", "DALI", "Pillow")
            )
            about = f"**{document['machine']['name']}** · level {software['level']} · {versions}"
            parts.append(f"{about} · commit `{software['commit']}` · {software['date']}")
            parts.append(markdown_table(HEADER, map(_cells, run["rows"]), text_columns=2))
            parts.append(
                f"A folder of {opening['files']:,} files opens in {opening['first']} s the first time, then in "
                f"{opening['again']} s."
            )
    return "\n\n".join([*parts, LEGEND]) if parts else "No measurements yet: `python -m benchmarks.loader` makes them."


def _cells(row: dict) -> list[str]:
    names = ("torchvision", "dali", "baseline")
    return [
        f"`{row['augmentation']}`",
        f"`{row['source']}`, {row['side']:,}",
        *(number(row["images_per_second"][name]) if name in row["images_per_second"] else "–" for name in names),
        " · ".join(times(row["ratio"].get(name)) for name in names[:2]),
        " / ".join(number(row["cpu_seconds"][name]) if name in row["cpu_seconds"] else "–" for name in names),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the tables from the stored results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is out of date")
    options = parser.parse_args(arguments)
    if not (options.render or options.check):
        _measure_and_keep()
    paths = machine_files(KEPT, shown_in=present(PAGE, MARKERS) if options.check else None)
    return write_or_check(
        {PAGE: insert(render(paths), PAGE, MARKERS)}, options.check, "python -m benchmarks.loader --render"
    )


def _measure_and_keep() -> None:
    from importlib.metadata import version

    import cpuinfo

    keep_freed_memory()
    about = machine(cpuinfo.get_cpu_info()["brand_raw"])
    software = {"torchvision": version("torchvision"), "pillow": version("pillow"), "dali": _dali()}
    rows = [row for side in SIDES for row in measure(side, AUGMENTATIONS)]
    store.add(KEPT, about, {**environment(), **software}, rows, replaces=lambda row: True, start_up=start_up())


def _dali() -> str:
    try:
        import nvidia.dali
    except ImportError:
        return "not installed"
    return nvidia.dali.__version__


if __name__ == "__main__":
    sys.exit(main())
