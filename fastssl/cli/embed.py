"""`fastssl embed`: features of images, as a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastssl.eval.embedding import check_path, write_embedding
from fastssl.evaluation import embed
from fastssl.run import open_run

from .flags import parse


@dataclass
class Flags:
    """Features of every image of a source, with labels, names and numbers."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    source: tyro.conf.Positional[str]
    """source of images: folder:PATH, webdataset:SHARDS, …"""
    out: Path
    """file to write: FILE.npz or FILE.parquet (needs pyarrow)"""
    split: Literal["all", "train", "test"] = "all"
    """split of the source; all is the training images, then the held-out ones"""
    device: str = "auto"
    """device: cuda, cpu, or auto (cuda if available)"""


def command(words: list[str]) -> None:
    """fastssl embed RUN SOURCE --out FILE.npz|FILE.parquet"""
    flags = parse(Flags, words, "fastssl embed")
    check_path(flags.out)
    run = open_run(flags.run)
    embedding = embed(run, flags.source, flags.split, flags.device)
    write_embedding(embedding, flags.out)
    images, width = embedding.features.shape
    print(f"{flags.out}: {images} images, {width} features each")
