"""One self-contained report.html of a run: curves, kNN, reconstructions, nearest neighbours, environment."""

import dataclasses
import json
from pathlib import Path

import jinja2
import torch

from fastssl.data.source import Source, Subset
from fastssl.eval.features import extract
from fastssl.eval.knn import nearest
from fastssl.run import Run
from fastssl.train.log import read_metrics

from . import pictures

SHOWN = 10  # images a row
SEARCHED = 5000  # training images that neighbours are searched among


def write_report(run: Run, method: torch.nn.Module, train_source: Source, test_source: Source) -> Path:
    """Writes report.html into the run folder and returns its path.

    Args:
        run: the opened run folder.
        method: with the trained weights, in evaluation mode, on the CPU.
        train_source, test_source: the images of the run.
    """
    metrics = read_metrics(run.folder / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"report: {run.folder} has no metrics yet")
    last, training = metrics[-1], run.config.training
    sections = [{"title": "Training", "picture": pictures.curves(metrics)}]
    if (path := run.folder / "knn.json").is_file():
        rows = [(name, f"{value:.1%}") for name, value in json.loads(path.read_text()).items()]
        text = "20 nearest training images, by cosine, vote on each test image."
        sections.append({"title": "kNN accuracy", "text": text, "rows": rows})
    images = _first_images(test_source, run.config.image_size)
    if hasattr(method, "reconstruct"):
        text = "Test images. The model sees the patches that are not grey and predicts the others."
        sections.append({"title": "Reconstructions", "text": text, "picture": pictures.reconstructions(method, images)})
    searched = min(SEARCHED, len(train_source))
    text = f"Left a test image, then the training images whose features are nearest, of {searched}."
    sections.append(
        {"title": "Nearest neighbours", "text": text, "picture": _neighbours(run, method, train_source, images)}
    )
    sections.append({"title": "Environment", "rows": list(run.facts.items())})
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("fastssl.report", "."), autoescape=True, trim_blocks=True
    ).get_template("page.html")
    page = template.render(
        title=f"{run.method_name} on {run.options.data}",
        subtitle=f"{last['step']} steps, {last['epoch']:.1f} of {training.epochs} epochs, {len(train_source)} images, "
        f"batch {training.batch_size}, seed {run.options.seed}",
        sections=sections,
        command=_command(run),
    )
    path = run.folder / "report.html"
    path.write_text(page)
    return path


def _first_images(source: Source, size: tuple[int, int]) -> torch.Tensor:
    """The first test images that can be decoded, normalised [≤ SHOWN, 3, H, W]."""
    images, *_ = extract(lambda images: images, Subset(source, range(min(SHOWN, len(source)))), size, batch_size=SHOWN)
    return images


def _neighbours(run: Run, method: torch.nn.Module, train_source: Source, images: torch.Tensor) -> str:
    size, queries = run.config.image_size, images[:6]
    step = max(1, len(train_source) // SEARCHED)
    head = Subset(train_source, range(0, len(train_source), step)[:SEARCHED])
    bank, _, index = extract(method.features, head, size)
    with torch.no_grad():
        rows = nearest(bank, method.features(queries), SHOWN - 1)
    pictured = []
    for query, found in zip(queries, rows):
        neighbours, *_ = extract(lambda images: images, Subset(head, index[found].tolist()), size)
        pictured.append(("", pictures.pixels(torch.cat([query[None], neighbours]))))
    return pictures.grid(pictured)


def _command(run: Run) -> str:
    """The command line with every option that is not a default of the paper's preset."""
    words = [f"fastssl pretrain {run.method_name} --data {run.options.data} --seed {run.options.seed} --preset paper"]
    words.append(f"--backbone {run.config.backbone}")
    default = type(run.config).paper(run.config.backbone)
    pairs = [(f.name, getattr(run.config, f.name), getattr(default, f.name)) for f in dataclasses.fields(default)]
    pairs += [
        (f.name, getattr(run.config.training, f.name), getattr(default.training, f.name))
        for f in dataclasses.fields(default.training)
    ]
    for name, value, usual in pairs:
        flag = name.replace("_", "-")
        if value == usual or dataclasses.is_dataclass(value):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} " + (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)))
    if run.options.precision != "fp32":
        words.append(f"--precision {run.options.precision}")
    return " ".join(words)
