"""`fastssl report`: report.html of one run or several."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from fastssl.run import open_run

from .flags import parse


@dataclasses.dataclass
class Flags:
    """Self-contained report.html: curves, evaluations, pictures; several runs side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of the runs"""
    to: Path | None = None
    """file to write; by default report.html in the run's folder, or in the common folder of several runs"""
    map: Literal["pca", "umap"] = "pca"
    """projection of the features to two dimensions; umap needs the extra of that name"""


def command(words: list[str]) -> None:
    """fastssl report RUN [RUN ...] [--to FILE] [--map pca|umap]"""
    flags = parse(Flags, words, "fastssl report")
    if not flags.runs:
        raise ValueError("report: a run folder is needed: fastssl report RUN [RUN ...]")
    from fastssl.report.page import write_report  # here: matplotlib takes a second to import

    print(write_report([open_run(run) for run in flags.runs], flags.to, flags.map))
