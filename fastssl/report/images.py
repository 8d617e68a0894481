"""Images in a report: reconstructions and nearest neighbours."""

import numpy as np
from torch import Tensor

from fastssl.contract import Autoencodes, Reconstructs
from fastssl.data.source import Source, Subset
from fastssl.eval.features import extract
from fastssl.eval.knn import nearest
from fastssl.eval.reconstruction import as_bytes, autoencode, first_images, pixels, read_snapshots, reconstruct

from .parts import Text, Tiles, short
from .pictures import CRISP, tile, tiles
from .run_data import BANK, RunData

COLUMNS = 10  # images per row
QUERIES = 6  # number of held-out images with their neighbours
MOST_STEPS = 8  # largest number of rows of snapshots
ROWS = {"input": "input", "masked": "masked", "output": "output", "filled": "output in removed patches"}


def reconstructions(run: RunData) -> list[Text | Tiles]:
    """Reconstructions of held-out images by the newest weights, and the snapshots of the run folder."""
    snapshots = read_snapshots(run.run.folder / "reconstructions")
    of_codes = isinstance(run.method, Autoencodes)
    can_reconstruct = (of_codes or isinstance(run.method, Reconstructs)) and run.test_source is not None
    normalisation = run.run.normalisation
    images = first_images(run.test_source, run.size, COLUMNS, **normalisation) if can_reconstruct else None
    inputs = None if images is None else pixels(images, **normalisation)
    parts = []
    if can_reconstruct:
        if of_codes:
            made = {"input": inputs, "output": autoencode(run.method, images, **normalisation)}
            text = "codes of an image alone"
        else:
            reconstruction = reconstruct(run.method, images, **normalisation)
            text = "patches that are not grey and predicts the others; its output for those that it gets is not trained"
            made = {name: getattr(reconstruction, part) for part, name in ROWS.items()}
        rows = [(name, as_bytes(row)) for name, row in made.items()]
        parts += [Text(f"Newest checkpoint. The model gets the {text}.")]
        parts += [tiles((name, row, numbered(name, row)) for name, row in rows)]
    if snapshots:
        parts.append(Text("During the run:" if of_codes else "During the run, output in removed patches:"))
        parts.append(over_time(run, snapshots, None if inputs is None else as_bytes(inputs)))
    return parts


def over_time(run: RunData, snapshots: list[tuple[int, np.ndarray]], inputs: np.ndarray | None) -> Tiles:
    """Rows of at most `MOST_STEPS` snapshots, including the first and the last, then a row of the inputs."""
    chosen = np.unique(np.linspace(0, len(snapshots) - 1, min(MOST_STEPS, len(snapshots))).round().astype(int))
    rows = []
    for step, images in (snapshots[i] for i in chosen):
        name = f"epoch {run.epoch_of(step):.3g}"
        rows.append((name, images[:COLUMNS], numbered(f"reconstruction at {name},", images)))
    if inputs is not None:
        rows.append(("input", inputs, numbered("input", inputs)))
    return tiles(rows)


def numbered(name: str, images: np.ndarray) -> list[str]:
    """A description of each image of a row."""
    return [f"{name} {i + 1}" for i in range(len(images))]


def neighbours(run: RunData, features: Tensor, numbers: list[int]) -> tuple[Tiles, int]:
    """(held-out images, each before its nearest training images; number of training images searched).

    Args:
        features: features [N, F] of held-out images.
        numbers: their indices in the held-out split.
    """
    bank, _, bank_numbers = run.features(run.train_source, BANK)
    queries = choose_queries([run.test_source.label(number) for number in numbers])
    rows = []
    for query, rows_of_bank in zip(queries, nearest(bank, features[queries], COLUMNS - 1).tolist()):
        index = numbers[query]
        label = run.test_source.label(index)
        row = [tile(image_of(run, run.test_source, index), title_of(run.test_source, index), "query")]
        for number in (bank_numbers[i] for i in rows_of_bank):
            known = label >= 0 and run.train_source.label(number) >= 0
            mark = "other" if known and run.train_source.label(number) != label else ""
            row.append(tile(image_of(run, run.train_source, number), title_of(run.train_source, number), mark))
        rows.append(("", row))
    return Tiles(rows, crisp=max(run.size) <= CRISP), len(bank)


def choose_queries(labels: list[int]) -> list[int]:
    """Places of at most `QUERIES` images: one of each of some classes, or evenly spaced where labels do not tell."""
    first: dict[int, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(label, place)
    places = list(first.values()) if len(first) > 1 and min(first) >= 0 else range(len(labels))
    return [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(QUERIES, len(places))).astype(int))]


def image_of(run: RunData, source: Source, number: int, centre: float | None = None) -> np.ndarray:
    """The image as evaluation shows it to the encoder, uint8 [H, W, 3]; `centre` as for `evaluation_loader`."""
    image, *_ = extract(lambda images: images, Subset(source, [number]), run.size, centre=centre)
    return as_bytes(pixels(image))[0]


def title_of(source: Source, number: int) -> str:
    """Class and name of an image."""
    label = source.label(number)
    named = source.classes and 0 <= label < len(source.classes)
    return (f"{short(source.classes[label])}: " if named else "") + short(source.name(number), 200)
