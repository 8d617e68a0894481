"""`fastssl export`: weights of a run in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastssl.run import open_run
from fastssl.weights import FORMATS

from .flags import parse


@dataclass
class Flags:
    """Weights of a run's newest checkpoint in another layout."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    format: Literal[FORMATS]
    """timm, torchvision: the encoder with their names; safetensors: the whole model; others: official checkpoints"""
    to: Path | None = None
    """file to write, RUN/METHOD-FORMAT by default; its suffix is set"""


def command(words: list[str]) -> None:
    """fastssl export RUN --format timm|torchvision|safetensors|…, a layout of a reference checkpoint"""
    flags = parse(Flags, words, "fastssl export")
    print(open_run(flags.run).export(flags.format, flags.to))
