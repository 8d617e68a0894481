import base64
import io
import warnings

import numpy as np
from PIL import Image

from fastssl.report import pictures


def decoded(source):
    kind, _, data = source.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_images_are_kept_large_ones_are_as_large_as_shown():
    small = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    kind, picture = decoded(pictures.tile(small, "a").source)
    assert kind == "data:image/png"
    np.testing.assert_array_equal(np.array(picture), small)
    kind, picture = decoded(pictures.tile(np.full((224, 448, 3), 99, np.uint8), "a").source)
    assert kind == "data:image/jpeg"
    assert picture.size == (pictures.LARGEST, pictures.LARGEST // 2)
    assert np.abs(np.array(picture).astype(int) - 99).max() <= 2


def test_rows_are_crisp_where_pixels_are_few():
    for side, crisp in ((24, True), (224, False)):
        made = pictures.tiles([("name", np.zeros((2, side, side, 3), np.uint8), ["one", "two"])])
        assert made.crisp == crisp
        assert [(name, [tile.alt for tile in row]) for name, row in made.rows] == [("name", ["one", "two"])]


def test_nothing_on_axes_is_a_formula_and_settings_are_left_alone():
    """Text with dollars is drawn literally, and matplotlib's global settings do not change."""
    before = dict(pictures.matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = pictures.draw("", "", lambda axes: axes.set_xlabel("$x^$ \\frac <b>"))
    svg = base64.b64decode(picture.light.split(",")[1]).decode()
    assert "$x^$ \\frac &lt;b&gt;" in svg
    assert dict(pictures.matplotlib.rcParams) == before
