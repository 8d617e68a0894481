"""Completed images in a report."""

from fastssl.eval.reconstruction import as_bytes, first_images, pixels

from .images import numbered
from .parts import Text, Tiles
from .pictures import tiles
from .run_data import RunData

COLUMNS = 10  # images per row
DRAWN = ((1.0, 0), (1.0, 1), (0.8, 0))  # (temperature, seed) of each row of completions


def completed_images(run: RunData) -> list[Text | Tiles]:
    """Held-out images, their upper halves, and what the newest weights draw below."""
    normalisation = run.run.normalisation
    images = first_images(run.test_source, run.size, COLUMNS, **normalisation)
    device = next(run.method.parameters()).device
    drawn = [run.method.complete(images.to(device), *numbers).cpu() for numbers in DRAWN]
    given = drawn[0].clone()
    given[:, :, run.size[0] // 2 :] = 0  # the mean colour, a grey
    rows = [("input", images), ("given", given)]
    rows += [(f"drawn, temperature {temperature:g}", x) for (temperature, _), x in zip(DRAWN, drawn)]
    shown = [(name, as_bytes(pixels(row, **normalisation))) for name, row in rows]
    text = "Newest checkpoint. The given half is in the colours of the model's palette."
    return [Text(text), tiles((name, row, numbered(name, row)) for name, row in shown)]
