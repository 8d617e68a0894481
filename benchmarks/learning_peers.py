"""fastssl beside lightly: kNN accuracy, images per second and time to the same accuracy of six methods.

    python -m benchmarks.learning_peers            # measures; writes results, the table and docs/learning-peers.png
    python -m benchmarks.learning_peers --data patterns idx:/usr/share/datasets/fashion-mnist --seeds 0 1 2
    python -m benchmarks.learning_peers --methods dino mae --jobs 1
    python -m benchmarks.learning_peers --render   # writes table and picture from the stored results
    python -m benchmarks.learning_peers --check    # writes nothing; exit status 1 if the table is out of date

Each run of a method by one library with one seed has a core of its own, and is stored as it ends: the command continues
where it was stopped, and measures again only what has other settings than the stored run, or everything with --again.
Fashion-MNIST is Debian's package dataset-fashion-mnist; any source of images of one size with labels will do.

`peers_runs.py` is one run, `peers_lightly.py` what is built of lightly's parts, `peers_table.py` the table.
"""

import argparse
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from fastssl.data.source import open_source
from fastssl.data.timing import cores

from . import store
from .machine import environment, machine
from .peers_runs import LIBRARIES, Cell, measure
from .peers_table import MARKERS, METHODS, PICTURE, VERSIONS, draw, files, render
from .pinned import run_pinned
from .store import RESULTS
from .table import PAGE, insert, present, write_or_check

EMBEDDED = "patterns"  # images that need no download
KEPT = RESULTS / "learning"


def key(row: dict) -> tuple:
    """What a stored row is of, as `Cell.key`."""
    return tuple(row[name] for name in ("data", "method", "library", "seed", "images", "settings"))


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The runs that the options ask for, one seed of all methods after the other."""
    return [
        Cell(data, method, library, seed, options.images, options.epochs)
        for seed in options.seeds
        for data in options.data
        for method in options.methods
        for library in LIBRARIES
    ]


def measure_and_keep(options: argparse.Namespace, folder: Path) -> None:
    """Runs what is not stored yet, and stores each run as it ends."""
    import cpuinfo

    torch.set_num_threads(1)  # as the runs have
    about = machine(cpuinfo.get_cpu_info()["brand_raw"])
    about["slug"] = f"peers-{about['slug']}"
    software = {**environment(), **{name: version(name) for name in VERSIONS if name != "torch"}}
    stored = set(map(key, store.rows_of(folder / f"{about['slug']}.json")))
    cells = [cell for cell in cells_of(options) if options.again or cell.key not in stored]
    print(f"{len(cells)} runs to measure, {len(cells_of(options)) - len(cells)} are stored", flush=True)
    for count, (_, row) in enumerate(run_pinned(measure, cells, options.jobs), start=1):
        place = key(row)[:-1]  # whatever its settings
        store.add(folder, about, software, [row], replaces=lambda other, place=place: key(other)[:-1] == place)
        print(
            f"{count} of {len(cells)}: {row['data']}, {row['method']}, {row['library']}, seed {row['seed']}: "
            f"kNN {row['knn_untrained']:.1%} to {row['knn']:.1%}, {row['images_per_second']:,} images/s, "
            f"{row['core_seconds']:.0f} s of a core" + (f", busy: {row['others']:.0%}" if row["busy"] else ""),
            flush=True,
        )


def check(options: argparse.Namespace) -> None:
    """Refuses what can't be measured, before the first run.

    Raises:
        ValueError: lightly is not installed, or a source can't be opened.
    """
    if find_spec("lightly") is None:
        raise ValueError("benchmarks.learning_peers: lightly is not installed: pip install lightly timm")
    for data in options.data:
        for split in ("train", "test"):
            open_source(data, split)


def main(arguments: list[str] | None = None, folder: Path = KEPT, page: Path = PAGE) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_peers", description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[EMBEDDED], metavar="SOURCE", help=f"sources ({EMBEDDED})")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="methods (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--images", type=int, default=4096, help="most training images, the first ones (4096)")
    parser.add_argument("--epochs", type=int, help="epochs in place of the preset's, with its milestones in proportion")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at a time, each on a core (all cores)")
    parser.add_argument("--again", action="store_true", help="measure stored runs too, and replace them")
    parser.add_argument("--render", action="store_true", help="write table and picture from the stored results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the table is out of date")
    options = parser.parse_args(arguments)
    if not (options.render or options.check):
        try:
            check(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        measure_and_keep(options, folder)
    paths = files(folder, shown_in=present(page, MARKERS) if options.check else None)
    if not options.check and draw(paths, page.parent / PICTURE):
        print(f"wrote {page.parent / PICTURE}")
    remedy = "python -m benchmarks.learning_peers --render"
    return write_or_check({page: insert(render(paths), page, MARKERS)}, options.check, remedy)


if __name__ == "__main__":
    sys.exit(main())
