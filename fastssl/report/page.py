"""One self-contained report.html of a run, or of several side by side: curves, evaluations, pictures, environment."""

import os
from pathlib import Path
from typing import Any

import jinja2

from fastssl.run import Run

from . import command, curves, images, ranks, tables
from . import embedding as maps
from .embedding import Embedding
from .opened import ASKED, Opened, names_of
from .parts import Section, Text, short
from .pictures import COLOURS

TEXTS = {
    "reconstructions": "Test images. The model sees the patches that are not grey and predicts the others.",
    "neighbours": "Left a test image, then the training images whose features are nearest by cosine; those of another "
    "class are framed.",
    "map": "Features of test images, projected to two dimensions. Distances between far groups mean little.",
    "ranks": "How many negatives score above a query's positive, in evaluation mode, on training images as the run "
    "augments them. Nothing above it: the query finds its positive.",
}
TITLES = {
    "reconstructions": "Reconstructions",
    "neighbours": "Nearest neighbours",
    "map": "Map of the features",
    "ranks": "Ranks of the positives",
}


def write_report(runs: list[Run], to: Path | None = None, embedding: Embedding = "pca") -> Path:
    """Writes a report and returns its path.

    What can't be had, as without a checkpoint or with data that moved, is left out, and the report says why.

    Args:
        runs: opened run folders, one or several to compare.
        to: file to write; if not given report.html in the run's folder, or in the folder that several have in common.
        embedding: how the map of the features is made, "pca" or "umap" (of umap-learn).

    Raises:
        ValueError: a run has no metrics yet or is named twice, `to` can't be a file, or umap-learn is not installed.
    """
    if not runs:
        raise ValueError("report: name a run")
    maps.check(embedding)
    path = to or _usual_path(runs)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"report: {path} must be a file in a folder that is there")
    opened = [Opened(run, name, COLOURS[i % len(COLOURS)]) for i, (run, name) in enumerate(zip(runs, names_of(runs)))]
    pictured = [_pictured(run, embedding) for run in opened]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastssl.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        title=_title(opened),
        runs=opened,
        summary=[tables.summary(run) for run in opened],
        compared=tables.compared(opened, tables.summary),
        sections=_sections(opened, pictured),
    )
    beside = path.with_name(path.name + ".writing")
    beside.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names need not be valid text
    beside.replace(path)
    return path


def _usual_path(runs: list[Run]) -> Path:
    if len(runs) == 1:
        return runs[0].folder / "report.html"
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]), "report.html")


def _title(runs: list[Opened]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return f"{runs[0].run.method_name} on {short(runs[0].run.options.data)}"


def _pictured(run: Opened, embedding: Embedding) -> dict[str, list[Any]]:
    """What needs the weights or the images of a run: the parts of the sections of `TEXTS`."""
    run.load()
    parts = {"reconstructions": run.attempt(lambda: images.reconstructions(run))}
    if run.method is not None and run.test_source is not None:
        found = run.attempt(lambda: run.features(run.test_source, ASKED))
        if found:
            parts["neighbours"] = run.attempt(lambda: _neighbours(run, *found))
            parts["map"] = run.attempt(lambda: _map(run, *found, embedding))
        if hasattr(run.method, "ranks"):
            parts["ranks"] = run.attempt(lambda: _ranks(run))
    run.release()
    return {anchor: made for anchor, made in parts.items() if made}


def _neighbours(run: Opened, features, labels, numbers) -> list[Any]:
    found, searched = images.neighbours(run, features, numbers)
    return [found, Text(f"Searched: {searched:,} training images.")]


def _map(run: Opened, features, labels, numbers, how: Embedding) -> list[Any]:
    if len(features) < maps.FEWEST:
        return []
    places, text = maps.flat(features, how)
    return [maps.scatter(places, labels.tolist(), run.test_source.classes), Text(f"{len(places):,} images. {text}")]


def _ranks(run: Opened) -> list[Any]:
    found, negatives, size = ranks.collect(run)
    if negatives < 1:  # a batch of one image in a method that has no queue
        return []
    text = (
        f"{(found == 0).double().mean():.1%} of {len(found):,} positives rank first among {negatives:,} negatives; "
        f"median rank {int(found.median()):,}. Batches of {size}."
    )
    return [ranks.histogram(found, negatives, run.colour), Text(text)]


def _sections(runs: list[Opened], pictured: list[dict[str, list[Any]]]) -> list[Section]:
    """The page from top to bottom; a section that no run has anything for is left out."""
    evaluated = [part for part in (curves.knn(runs), tables.evaluations(runs)) if part]
    text = "A test image's class by the vote of its nearest training images (kNN), or by a trained classifier."
    sections = [curves.training(runs), Section("evaluations", "Evaluations", text, evaluated)]
    for anchor, title in TITLES.items():
        columns = [(run, parts[anchor]) for run, parts in zip(runs, pictured) if anchor in parts]
        sections.append(Section(anchor, title, TEXTS[anchor], columns=_named(columns, runs)))
    profiles = [(run, tables.profile(run)) for run in runs]
    took = [tables.compared(runs, tables.speed)]
    sections.append(Section("speed", "Speed and memory", "", took, _named(profiles, runs)))
    troubles = [(run, tables.trouble(run)) for run in runs]
    sections.append(Section("trouble", "Left out of training", "", columns=_named(troubles, runs)))
    sections.append(Section("environment", "Environment", "", [tables.compared(runs, tables.facts)]))
    commands = [(run, [Text(code=command.reproduce(run.run))]) for run in runs]
    sections.append(Section("again", "To run it again", "", columns=_named(commands, runs)))
    return [section for section in sections if section.parts or section.columns]


def _named(columns: list[tuple[Opened, list[Any]]], runs: list[Opened]) -> list[tuple[Opened | None, list[Any]]]:
    """Columns that are not empty, each with its run where there are several."""
    return [(run if len(runs) > 1 else None, parts) for run, parts in columns if parts]
