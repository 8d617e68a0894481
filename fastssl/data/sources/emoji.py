"""`emoji`: emoji of Google's font Noto Color Emoji with their names as captions.

    emoji                                  names in English; the font of Debian's package fonts-noto-color-emoji
    emoji:size=32,language=de              another size and language
    emoji:font=PATH                        the font in another place

Names are those of the package `emoji`: "grinning face", with "grinning" or others as further captions. Skin tones and
flags are alike but for a detail. Emoji that the font lacks, or draws like one before, are left out. A fifth is held
out, see `split.hold_out`. There are no labels.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from fastssl.extras import need
from fastssl.text import listed, printable

from ..source import Source, expand_user
from ..split import hold_out

FONTS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "/usr/share/fonts/noto/NotoColorEmoji.ttf")
PIXELS = 109  # the only size of the font
CELL = (136, 128)  # width and height of an emoji of that size
SMALLEST, LARGEST = 8, 128
WHITE = (255, 255, 255)


class Emoji(Source):
    """Emoji of one split, in memory.

    Args:
        images: [N, S, S, 3] uint8.
        captions: names of each.
        rows: [M] those in this split, ascending.
    """

    classes, shards = None, None

    def __init__(self, images: np.ndarray, captions: list[tuple[str, ...]], rows: np.ndarray, notes: tuple[str, ...]):
        self._images, self._captions, self.notes = images[rows], [captions[row] for row in rows.tolist()], notes
        self.size = images.shape[1:3]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        return self._images[index].copy()

    def name(self, index: int) -> str:
        return f"emoji {self._captions[index][0]}"

    def label(self, index: int) -> int:
        return -1

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]


def open_split(argument: str, split: str) -> Emoji:
    options = {"size": "64", "language": "en", "font": ""}
    for setting in filter(None, argument.split(",")):
        key, _, value = setting.partition("=")
        if key not in options or not value:
            raise ValueError(f"data: emoji takes size=N, language=CODE and font=PATH, got {printable(setting)!r}")
        options[key] = value
    if not (options["size"].isdecimal() and len(options["size"]) < 4 and SMALLEST <= int(options["size"]) <= LARGEST):
        raise ValueError(
            f"data: emoji takes a size from {SMALLEST} to {LARGEST}, got {printable(options['size'][:60])}"
        )
    paths = [expand_user(options["font"])] if options["font"] else [Path(font) for font in FONTS]
    font = next((path for path in paths if path.is_file()), None)
    if font is None:
        raise ValueError(
            f"data: emoji needs the font {printable(paths[0])}, which is missing: apt-get install "
            "fonts-noto-color-emoji (Debian, Ubuntu), or emoji:font=PATH of NotoColorEmoji.ttf"
        )
    images, captions, notes = _draw_all(font, int(options["size"]), options["language"])
    names = [texts[0] for texts in captions]
    return Emoji(images, captions, hold_out(names, np.zeros(len(names), np.int64), split, "emoji"), notes)


@functools.lru_cache(2)
def _draw_all(path: Path, size: int, language: str) -> tuple[np.ndarray, list[tuple[str, ...]], tuple[str, ...]]:
    """(images [N, size, size, 3], captions, notes) of all emoji; takes 5 seconds.

    Raises:
        ValueError: the language is unknown, or the font can't be used.
    """
    emoji = need("emoji", what="the source emoji", extra="text")
    if language not in emoji.LANGUAGES:
        raise ValueError(f"data: emoji has names in {listed(emoji.LANGUAGES, 30)}, got {printable(language)}")
    emoji.config.load_language(language)
    if not features.check("raqm"):
        raise ValueError("data: emoji needs Pillow with the library raqm, which joins the parts of an emoji")
    try:
        font = ImageFont.truetype(path, PIXELS, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(
            f"data: the font {printable(path)} must be a NotoColorEmoji.ttf of {PIXELS} pixels ({error})"
        ) from error
    seen: set[bytes] = set()
    images, captions, left_out = [], [], 0
    for character, facts in sorted(emoji.EMOJI_DATA.items()):
        if language not in facts or facts["status"] != emoji.STATUS["fully_qualified"]:  # others are drawn alike
            continue
        image = _draw(character, font, size)
        digest = b"" if image is None else hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if image is None or digest in seen:
            left_out += 1
            continue
        seen.add(digest)
        names = [facts[language], *(facts.get("alias", ()) if language == "en" else ())]
        images.append(image)
        captions.append(tuple(dict.fromkeys(name.strip(":").replace("_", " ") for name in names)))
    if not images:
        raise ValueError(f"data: the font {printable(path)} has none of the emoji")
    note = f"{left_out:,} emoji that the font lacks or draws like another are left out"
    return np.stack(images), captions, (note,) if left_out else ()


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray | None:
    """Pixels [size, size, 3] of an emoji on white; None if the font has no single picture of it."""
    if font.getlength(character) > 1.5 * CELL[0]:  # several pictures side by side
        return None
    side = max(CELL)
    canvas = Image.new("RGB", (side, side), WHITE)
    ImageDraw.Draw(canvas).text((0, (side - CELL[1]) // 2), character, font=font, embedded_color=True, anchor="lt")
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX, reducing_gap=None))
    return None if (pixels == 255).all() else pixels
