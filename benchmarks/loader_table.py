"""The tables of docs/measurements.md about loaders, from the stored results."""

from pathlib import Path

from . import store
from .machine import BUSY
from .table import markdown_table, number, times

MARKERS = "<!-- loaders:begin -->", "<!-- loaders:end -->"
HEADER = ("augmentation", "loader", "images/s", "× ImageFolder", "× best rival", "CPU s / 1,000 images", "memory")
FACTS_HEADER = ("measurement", "case", "result")
VERSIONS = {  # name in the table: name in the environment
    "torch": "torch",
    "torchvision": "torchvision",
    "Pillow": "pillow",
    "DALI": "nvidia-dali-cuda130",
    "webdataset": "webdataset",
    "LitData": "litdata",
    "mosaic streaming": "mosaicml-streaming",
    "SPDL": "spdl",
}

LEGEND = """\
*images/s*: medians of the rounds in which all loaders of an augmentation take turns in one process, with two workers
(threads of DALI and SPDL) on two cores, the views as normalised floats in the main process. *× ImageFolder*, *× best
rival*: how many times as fast as torchvision's `ImageFolder` and transforms on Pillow images in a `DataLoader`, and as
the fastest loader (in bold) that is not ours; medians of the rounds' ratios. *CPU s*: processor seconds of all
processes, without their start. *memory*: peak MB of all processes while a loader runs, beyond what the main process
held before; what they share counts once, and the pages of mapped files, which the system can take back, do not count.
*busy*: other programs used this share of the processors during the measurement, so no ratio is stated. –: not measured.

Photographs as JPEG of quality 90; the number is their shorter side in pixels. Packs hold the same pixels at the same
size: `jpeg` the same files, `rgb` and `yuv` decoded ones. The rivals read the same files, or their own format
of them: *ImageFolder, tensors* is torchvision's decoder with its transforms on tensors (those of colours on Pillow
images, which are faster there), *DALI* a pipeline as its users write it, *SPDL* threads that decode with torchvision.
ffcv is not among them: it does not install from PyPI alone, since its build needs the headers of OpenCV and
TurboJPEG."""

FACTS_LEGEND = """\
*opening*: seconds of `open_source` in a new process; the system has the folders in its cache, and the first time ours
is empty. *packing*: by one process, with its processor time. *memory*: MB of all processes, as above. *floors*: one
step alone, in one thread, the fastest of many runs: no loader that has to do the step is faster."""


def key(row: dict) -> tuple:
    """What a row measures: a new measurement takes the place of the rows with the same key."""
    return tuple(row.get(field) for field in ("augmentation", "side", "measurement"))


def render(paths: list[Path]) -> str:
    """The tables of all machines, as Markdown."""
    parts, facts_shown = [], False
    for path in paths:
        document = store.read(path)
        for run in document["runs"]:
            rows = [row for row in run["rows"] if "augmentation" in row]
            facts = [row for row in run["rows"] if "measurement" in row]
            parts.append(_about(document["machine"], run["environment"], {row["batch"] for row in rows}))
            if rows:
                lines = [line for row in rows for line in _lines(row)]
                parts.append(markdown_table(HEADER, lines, text_columns=2))
            if missing := sorted({package for row in rows for package in row.get("absent", [])}):
                parts.append(f"Not installed, so not measured: {', '.join(missing)}.")
            if facts:
                parts.append(markdown_table(FACTS_HEADER, map(_fact_cells, facts), text_columns=3))
                facts_shown = True
    if not parts:
        return "No measurements yet: `python -m benchmarks.loader` makes them."
    return "\n\n".join([*parts, LEGEND, *([FACTS_LEGEND] if facts_shown else [])])


def _about(machine: dict, software: dict, batches: set[int]) -> str:
    """The line above the tables of a run."""
    versions = ", ".join(
        f"{name} {software[package]}"
        for name, package in VERSIONS.items()
        if software.get(package, "not installed") != "not installed"
    )
    about = [f"**{machine['name']}**", f"level {software['level']}", versions]
    about += [f"batch {batch}" for batch in sorted(batches)]
    return " · ".join([*about, f"commit `{software['commit']}`", software["date"]])


def _lines(row: dict) -> list[list[str]]:
    """Cells of the lines of an augmentation, one for each loader: ours first, then the rivals, fastest first."""
    rates = row["images_per_second"]
    names = sorted(rates, key=lambda name: (not name.startswith("fastssl"), -rates[name]))
    return [_cells(row, name) for name in names]


def _cells(row: dict, name: str) -> list[str]:
    busy = row.get("others", 0) > BUSY
    ratio, ratio_best = ({}, {}) if busy else (row["ratio"], row.get("ratio_best", {}))
    return [
        f"`{row['augmentation']}`, {row['side']:,}" + (f" (busy: {row['others']:.0%})" if busy else ""),
        f"**{name}**" if name == row.get("best") else name,
        number(row["images_per_second"][name]),
        times(ratio.get(name)),
        times(ratio_best.get(name)),
        _number(row.get("cpu_seconds", {}).get(name)),
        _number(row.get("memory_mb", {}).get(name)),
    ]


def _fact_cells(row: dict) -> list[str]:
    busy = f" (busy: {row['others']:.0%})" if row.get("others", 0) > BUSY else ""
    result = "; ".join(f"{_number(value)} {unit}" for unit, value in row["values"].items())
    return [row["measurement"], row["case"] + busy, result]


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)
