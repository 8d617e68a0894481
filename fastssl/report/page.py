"""Self-contained report.html of a run, or of several side by side: curves, evaluations, pictures, environment."""

import os
from pathlib import Path
from typing import Any

import jinja2

from fastssl.contract import Completes, EmbedsText, RanksNegatives, Reconstructs
from fastssl.eval.ranks import lost_contrast
from fastssl.eval.spectrum import measure_spectrum
from fastssl.files import write_atomically
from fastssl.run import Run

from . import attention_maps, command, completions, curves, feature_map, few_labels, image_text, images, ranks, tables
from .feature_map import Projection
from .parts import Section, Text, short
from .pictures import COLOURS
from .run_data import MAPPED, RunData, names_of

TEXTS = {
    "reconstructions": "Held-out images, and what the model makes of a part of their patches, or of their codes.",
    "completions": "Held-out images. The model gets the upper half and draws the lower half pixel by pixel.",
    "attention": "Held-out images, and the places that the last block of the ViT attends to.",
    "patches": "Held-out images, and the features of their places: places with similar features have similar colours.",
    "neighbours": "A held-out image at the left, then the training images with the nearest features by cosine. "
    "Images of another class are framed.",
    "retrieval": "Held-out images and their captions, compared by cosine. ✓ marks an image's own caption; images "
    "that do not belong to a text are framed.",
    "zeroshot": "Held-out images get the class whose sentences are nearest, without any training on labels.",
    "map": "Features of held-out images, projected to two dimensions. Groups that overlap here may lie apart.",
    "ranks": "Number of negatives that score above a query's positive, in evaluation mode, on augmented training "
    "images. The positive is another view of the same image, negatives are views of others; at rank 0 the positive "
    "scores highest.",
}
LABELS = (
    "Means over several draws of the labels, on the same held-out images; ± and bands are one standard deviation. kNN "
    "and linear keep the encoder as it is, fine-tuned trains all of it. “Trained from scratch” does the same from "
    "random weights, with a learning rate of its own."
)
TITLES = {
    "reconstructions": "Reconstructions",
    "completions": "Completions",
    "attention": "Attention of the last block",
    "patches": "Features of places as colours",
    "neighbours": "Nearest neighbours",
    "retrieval": "Retrieved pairs",
    "zeroshot": "Zero-shot classification",
    "map": "Map of the features",
    "ranks": "Ranks of the positives",
}


def write_report(runs: list[Run], to: Path | None = None, map: Projection = "pca") -> Path:
    """Writes a report and returns its path.

    Parts that need a missing checkpoint or data that moved are left out, and the report has the reason.

    Args:
        runs: one run, or several to compare.
        to: file to write; by default report.html in the run's folder, or in the common folder of several runs.
        map: projection of the features to two dimensions, "pca" or "umap" (of umap-learn).

    Raises:
        ValueError: a run has no metrics yet or is named twice, or `to` cannot be written.
        MissingExtra: umap-learn is not installed.
    """
    if not runs:
        raise ValueError("report: a run is needed")
    feature_map.check_projection(map)
    path = to or _default_path(runs)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"report: {path} must be a file in a folder that exists")
    loaded = [RunData(run, name, COLOURS[i % len(COLOURS)]) for i, (run, name) in enumerate(zip(runs, names_of(runs)))]
    pictured = [_picture_parts(run, map) for run in loaded]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastssl.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        title=_title(loaded),
        runs=loaded,
        summary=[tables.summary(run) for run in loaded],
        compared=tables.compare(loaded, tables.summary),
        sections=_sections(loaded, pictured),
    )
    with write_atomically(path, encoding="utf-8", errors="backslashreplace") as file:  # file names may be any bytes
        file.write(page)
    return path


def _default_path(runs: list[Run]) -> Path:
    if len(runs) == 1:
        return runs[0].folder / "report.html"
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]), "report.html")


def _title(runs: list[RunData]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return f"{runs[0].run.method_name} on {short(runs[0].run.options.data)}"


def _picture_parts(run: RunData, projection: Projection) -> dict[str, list[Any]]:
    """{section of `TEXTS`: its parts} for a run; these sections need its weights or images."""
    run.load()
    parts = {"reconstructions": run.attempt(lambda: images.reconstructions(run))}
    if run.method is not None and run.test_source is not None:
        if isinstance(run.method, Completes):
            parts["completions"] = run.attempt(lambda: completions.completed_images(run))
        parts["attention"] = run.attempt(lambda: attention_maps.attention(run))
        parts["patches"] = run.attempt(lambda: attention_maps.patch_colours(run))
        table = run.attempt(lambda: run.features(run.test_source, MAPPED))
        if table:
            parts["neighbours"] = run.attempt(lambda: _neighbours(run, *table))
            parts["map"] = run.attempt(lambda: _map(run, *table, projection))
        if isinstance(run.method, EmbedsText) and getattr(run.run.config, "text", None) is not None:
            parts["retrieval"] = run.attempt(lambda: image_text.retrieved(run))
            parts["zeroshot"] = run.attempt(lambda: image_text.confusions(run))
        if isinstance(run.method, RanksNegatives):
            parts["ranks"] = run.attempt(lambda: _ranks(run))
    run.release()
    return {anchor: content for anchor, content in parts.items() if content}


def _neighbours(run: RunData, features, labels, numbers) -> list[Any]:
    rows, searched = images.neighbours(run, features, numbers)
    return [rows, Text(f"Searched: {searched:,} training images.")]


def _map(run: RunData, features, labels, numbers, projection: Projection) -> list[Any]:
    if len(features) < feature_map.FEWEST:
        return []
    places, explained = feature_map.project(features, projection)
    spread, masked = measure_spectrum(features), isinstance(run.method, Reconstructs)
    sentences = [
        f"{len(places):,} images.",
        explained,
        f"{spread.text()}.",
        spread.warning(masked) or spread.note(masked),
    ]
    text = Text(" ".join(filter(None, sentences)))
    return [feature_map.scatter(places, labels.tolist(), run.test_source.classes), text]


def _ranks(run: RunData) -> list[Any]:
    found = ranks.collect(run)
    if found is None:  # one image per batch in a method without a queue
        return []
    sentences = [
        f"{found.first:.1%} of {len(found.positions):,} positives rank first among {found.negatives:,} negatives; "
        f"median rank {int(found.positions.median()):,}.",
        f"The entropy of the ranks is {found.entropy:.0%} of that of random ones.",
        f"Batches of {found.batch}.",
        found.warning() or lost_contrast(run.metrics) or "",
    ]
    return [ranks.histogram(found.positions, found.negatives, run.colour), Text(" ".join(sentences).strip())]


def _sections(runs: list[RunData], pictured: list[dict[str, list[Any]]]) -> list[Section]:
    """Sections of the page from top to bottom, without empty ones."""
    evaluated = [part for part in (curves.knn(runs), tables.evaluations(runs)) if part]
    text = "Accuracy on held-out images: by votes of the nearest training images (kNN), or by a trained classifier."
    if any(line["evaluation"] in ("zeroshot", "retrieval") for run in runs for line in run.evaluations):
        text += " Zero-shot: by sentences about the classes. Retrieval: the share of first places that are right (R@1)."
    compared = [(run, few_labels.parts(run)) for run in runs]
    sections = [Section("labels", "Accuracy with few labels", LABELS, columns=_nonempty(compared, runs))]
    sections += [curves.training(runs), Section("evaluations", "Evaluations", text, evaluated)]
    for anchor, title in TITLES.items():
        columns = [(run, parts[anchor]) for run, parts in zip(runs, pictured) if anchor in parts]
        sections.append(Section(anchor, title, TEXTS[anchor], columns=_nonempty(columns, runs)))
    profiles = [(run, tables.profile(run)) for run in runs]
    speed = [tables.compare(runs, tables.speed)]
    sections.append(Section("speed", "Speed and memory", "", speed, _nonempty(profiles, runs)))
    problems = [(run, tables.problems(run)) for run in runs]
    sections.append(Section("trouble", "Left out of training", "", columns=_nonempty(problems, runs)))
    sections.append(Section("environment", "Environment", "", [tables.compare(runs, tables.facts)]))
    commands = [(run, [Text(code=command.reproduce(run.run))]) for run in runs]
    sections.append(Section("again", "Command to run it again", "", columns=_nonempty(commands, runs)))
    return [section for section in sections if section.parts or section.columns]


def _nonempty(columns: list[tuple[RunData, list[Any]]], runs: list[RunData]) -> list[tuple[RunData | None, list[Any]]]:
    """Non-empty columns, each with its run if there are several runs."""
    return [(run if len(runs) > 1 else None, parts) for run, parts in columns if parts]
