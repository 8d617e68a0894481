"""Images of a run: what a MAE makes of them, and which of them features hold for alike."""

import numpy as np
from torch import Tensor

from fastssl.data.source import Subset
from fastssl.eval.features import extract
from fastssl.eval.knn import nearest
from fastssl.eval.reconstruction import as_bytes, first_images, pixels, read_snapshots, reconstruct

from .opened import BANK, Opened
from .parts import Text, Tiles, short
from .pictures import CRISP, tile, tiles

SHOWN = 10  # images a row
QUERIES = 6
MOST_STEPS = 8  # rows of reconstructions over time
ROWS = {"input": "input", "masked": "masked", "output": "output", "filled": "output in the holes"}


def reconstructions(run: Opened) -> list[Text | Tiles]:
    """The snapshots of the run folder, and what the last weights make of test images; nothing of other methods."""
    snapshots = read_snapshots(run.run.folder / "reconstructions")
    able = run.method is not None and hasattr(run.method, "reconstruct") and run.test_source is not None
    images = first_images(run.test_source, run.size, SHOWN) if able else None
    parts = []
    if able:
        made = reconstruct(run.method, images)
        rows = [(name, as_bytes(getattr(made, part))) for part, name in ROWS.items()]
        parts += [
            Text("By the weights of the last checkpoint."),
            tiles((name, row, _numbered(name, row)) for name, row in rows),
        ]
    if snapshots:
        parts.append(Text("While it learned, the output in the holes:"))
        parts.append(over_time(run, snapshots, None if images is None else as_bytes(pixels(images))))
    return parts


def over_time(run: Opened, snapshots: list[tuple[int, np.ndarray]], inputs: np.ndarray | None) -> Tiles:
    """A row for each of at most `MOST_STEPS` snapshots, the first and the last among them, then one of the inputs."""
    chosen = np.unique(np.linspace(0, len(snapshots) - 1, min(MOST_STEPS, len(snapshots))).round().astype(int))
    rows = []
    for step, images in (snapshots[i] for i in chosen):
        name = f"epoch {run.epoch_of(step):.3g}"
        rows.append((name, images[:SHOWN], _numbered(f"reconstruction at {name},", images)))
    if inputs is not None:
        rows.append(("input", inputs, _numbered("input", inputs)))
    return tiles(rows)


def _numbered(name: str, images: np.ndarray) -> list[str]:
    return [f"{name} {i + 1}" for i in range(len(images))]


def neighbours(run: Opened, features: Tensor, numbers: list[int]) -> tuple[Tiles, int]:
    """(test images from all over the source, each before the training images nearest to it; how many were searched).

    Args:
        features: [N, F] of test images, with their `numbers` in the test source.
    """
    bank, _, bank_numbers = run.features(run.train_source, BANK)
    queries = np.unique(np.linspace(0, len(numbers) - 1, min(QUERIES, len(numbers))).astype(int)).tolist()
    rows = []
    for query, found in zip(queries, nearest(bank, features[queries], SHOWN - 1).tolist()):
        asked = numbers[query]
        label = run.test_source.label(asked)
        row = [tile(_image(run, run.test_source, asked), _caption(run.test_source, asked), "query")]
        for number in (bank_numbers[i] for i in found):
            known = label >= 0 and run.train_source.label(number) >= 0
            mark = "other" if known and run.train_source.label(number) != label else ""
            row.append(tile(_image(run, run.train_source, number), _caption(run.train_source, number), mark))
        rows.append(("", row))
    return Tiles(rows, crisp=max(run.size) <= CRISP), len(bank)


def _image(run: Opened, source, number: int) -> np.ndarray:
    """The image as evaluation sees it, uint8 [H, W, 3]."""
    image, *_ = extract(lambda images: images, Subset(source, [number]), run.size)
    return as_bytes(pixels(image))[0]


def _caption(source, number: int) -> str:
    """Class and name of an image."""
    label = source.label(number)
    named = source.classes and 0 <= label < len(source.classes)
    return (f"{short(source.classes[label])}: " if named else "") + short(source.name(number), 200)
