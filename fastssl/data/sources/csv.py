"""`csv:FILE`: image files with captions, listed by a table with a header.

    csv:captions.csv                             columns filepath and title, or path, image, caption, text and others
    csv:captions.csv::image=file,caption=words   the columns with these names

Paths are relative to the table's folder. Rows with the same path are several captions of one image. A column `split`
with words such as train and val divides the images; else a fifth of them is held out, see `split.hold_out`. Text is
UTF-8, or UTF-16 with a byte order mark. Rows without a caption, or with one that is not UTF-8, do not count, and a note
says so.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from fastssl.text import listed, printable

from ..captioned import CaptionedFiles, open_files, read_text
from ..source import expand_user, split_options
from ..split import TEST_NAMES, TRAIN_NAMES

IMAGES = ("filepath", "path", "image", "image_path", "file", "file_name", "filename", "img")  # names of the column
CAPTIONS = ("caption", "title", "captions", "text", "raw_caption", "description")
LONGEST_FIELD = 2**20  # characters


def open_split(argument: str, split: str) -> CaptionedFiles:
    return open_table(argument, split, "csv")


def open_table(argument: str, split: str, kind: str) -> CaptionedFiles:
    """A split of a table.

    Args:
        argument: path and options.
        split: "train" or "test".
        kind: "csv" or "tsv".

    Raises:
        ValueError: the table can't be read, or lacks a column or images with captions.
    """
    if not argument:
        raise ValueError(f"data: {kind} needs a table of paths and captions: {kind}:FILE")
    name, options = split_options(argument, {"image": None, "caption": None}, kind)
    path = expand_user(name)
    table = _rows(path, kind)
    header = [column.strip() for column in next(table, [])]
    image = _find_column(header, options.get("image"), IMAGES, path, "paths (::image=NAME names it)")
    caption = _find_column(header, options.get("caption"), CAPTIONS, path, "captions (::caption=NAME names it)")
    of_split = [column.lower() for column in header].index("split") if "split" in map(str.lower, header) else None
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}  # of each image
    short = 0
    for row in table:
        if len(row) <= max(image, caption, of_split or 0):
            short += bool(row)
            continue
        captions.setdefault(row[image].strip(), []).append(row[caption])
        if of_split is not None:
            splits[row[image].strip()] = row[of_split].strip().lower()
    verb = "row has too few fields and is" if short == 1 else "rows have too few fields and are"
    notes = [f"{short:,} {verb} passed over"] if short else []
    given = _given_split(set(splits.values()), split)
    if given is not None:
        captions = {file: texts for file, texts in captions.items() if splits[file] in given}
    return open_files(path.parent, captions, split if given is None else None, f"{kind}:{printable(path)}", notes)


def _rows(path: Path, kind: str) -> Iterator[list[str]]:
    """The fields of each row. Quotes of a TSV may enclose a field, and are then removed."""
    text = read_text(path).replace("\0", "\N{REPLACEMENT CHARACTER}")  # the reader of Python 3.10 refuses a NUL
    lines = io.StringIO(text, newline="")
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = "," if kind == "csv" else "\t"
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if kind == "csv" else csv.QUOTE_NONE)
    try:
        for row in reader:
            yield row if kind == "csv" else [_unquoted(field) for field in row]
    except csv.Error as error:
        raise ValueError(f"data: {printable(path)} is no table: line {reader.line_num}: {error}") from error


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field


def _find_column(header: list[str], wanted: str | None, names: tuple[str, ...], path: Path, what: str) -> int:
    """Number of the column with the wanted name, or of the first with one of the names, in any case.

    Raises:
        ValueError: there is none.
    """
    columns = [column.lower() for column in header]
    for name in names if wanted is None else (wanted.lower(),):
        if name in columns:
            return columns.index(name)
    expected = "" if wanted else f", such as {names[0]} or {names[1]}"
    raise ValueError(
        f"data: {printable(path)} must begin with the names of its columns and have one of {what}{expected}, got "
        f"{listed(header) or 'an empty file'}" + (f" without {printable(wanted)}" if wanted else "")
    )


def _given_split(words: set[str], split: str) -> tuple[str, ...] | None:
    """The words of a column `split` that mean this split; None if there are not words of both."""
    train, test = [w for w in TRAIN_NAMES if w in words], [w for w in TEST_NAMES if w in words]
    if not train or not test:
        return None
    return tuple(train) if split == "train" else (test[0],)
