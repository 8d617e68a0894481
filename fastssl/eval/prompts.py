"""Names of classes and templates of sentences about them, for zero-shot classification."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fastssl.data.reading import open_regular
from fastssl.text import listed, printable

PLACE = "{}"  # where a template takes the name of a class
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a small {}.",
    "a large {}.",
    "a {}.",
)
MAX_BYTES = 2**26  # of a file of names or templates
Lines = str | Path | Sequence[str]  # a text file, one entry a line, or the entries themselves


def class_names(given: Lines | None, classes: Sequence[str], data: str) -> list[str]:
    """Names of the classes of labels 0, 1, …, as they stand in sentences.

    Args:
        given: names in the order of the labels; None for the source's own, whose underscores become blanks.
        classes: the source's own names of the labels.
        data: the source in errors.

    Raises:
        ValueError: there is not one name for each class, or a line of a file is blank or no text.
    """
    if given is None:
        return [" ".join(name.replace("_", " ").split()) or name for name in classes]
    names = read_lines(given, "--classes")
    if len(names) != len(classes):
        raise ValueError(
            f"eval zeroshot: --classes must name the {_counted(len(classes), 'class', 'classes')} of {printable(data)} "
            f"({listed(classes, 3)}), one a line in this order, got {_counted(len(names), 'name', 'names')}"
        )
    return names


def read_templates(given: Lines | None) -> list[str]:
    """Sentences with the place ``{}`` for the name of a class; None for `TEMPLATES`.

    Raises:
        ValueError: a template has no place or several, there is none or one twice, or a line is blank or no text.
    """
    lines = list(TEMPLATES) if given is None else read_lines(given, "--templates")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line.count(PLACE) != 1:
            raise ValueError(
                f"eval zeroshot: every line of --templates must have {PLACE} once, where the name of the class goes, "
                f"got {_quoted(line)} in line {number}"
            )
        if line in first:
            raise ValueError(
                f"eval zeroshot: the lines of --templates must differ, got {_quoted(line)} in lines {first[line]} and "
                f"{number}"
            )
        first[line] = number
    return lines


def read_lines(given: Lines, flag: str) -> list[str]:
    """The lines of a text file, or the given entries; blanks around and within them become one.

    Blank lines at the end are passed over.

    Args:
        given: a UTF-8 file, one entry a line, or the entries.
        flag: what they are, in errors.

    Raises:
        ValueError: the file cannot be read, is no UTF-8 text, or an entry is blank or has a control character.
    """
    lines = _file_lines(Path(given), flag) if isinstance(given, str | Path) else list(given)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, str):
            raise ValueError(f"eval zeroshot: {flag} must be texts, got {printable(repr(line)[:80])} in line {number}")
    lines = [" ".join(line.split()) for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"eval zeroshot: {flag} must have an entry in each line, got a blank line {number}")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in line):
            raise ValueError(
                f"eval zeroshot: {flag} must be text without control characters, got {_quoted(line)} in line {number}"
            )
    if not lines:
        source = printable(given) if isinstance(given, str | Path) else "nothing"
        raise ValueError(f"eval zeroshot: {flag} must have a line at least, got none in {source}")
    return lines


def _file_lines(path: Path, flag: str) -> list[str]:
    try:
        with open_regular(path.expanduser()) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ValueError(
                    f"eval zeroshot: {flag} must be a text file of at most {MAX_BYTES:,} bytes, got {size:,} in "
                    f"{printable(path)}"
                )
            data = file.readall()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"eval zeroshot: {flag} {printable(path)} cannot be read ({reason})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"eval zeroshot: {flag} must be UTF-8 text, got other bytes in line {line} of {printable(path)}: save it "
            "as UTF-8"
        ) from error
    return re.split(r"\r\n|\n|\r", text)


def name_of_lines(lines: Lines | None) -> str | None:
    """What evaluations.jsonl says of a text file, or of lines that were given as a list."""
    if lines is None:
        return None
    return str(Path(lines).expanduser().absolute()) if isinstance(lines, str | Path) else f"{len(lines)} in a list"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _quoted(line: str) -> str:
    return f'"{printable(line[:60])}{"…" if len(line) > 60 else ""}"'
