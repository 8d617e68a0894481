"""Text that comes from outside, such as file names, made safe to show."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST = 5_000  # characters; a path has at most 4,096 bytes


def printable(text: Any) -> str:
    r"""The text with everything escaped that a terminal, a JSON file or a web page could stumble over.

    Bytes that are not UTF-8 (surrogates, as Python reads them from file names) become ``\xff``, line breaks, escape
    sequences and invisible characters that change the direction of text become ``\n``, ``\x1b`` or ``\u202e``.

    What is longer than any path, such as a name of a megabyte in a tar file, is cut off.

    Args:
        text: text, a path, or anything with ``str()``.
    """
    text = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    shown = "".join(character if _is_shown(character) else _escaped(character) for character in text[:LONGEST])
    return shown + ("…" if len(text) > LONGEST else "")


def _is_shown(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def escape_what_cannot_be_encoded() -> None:
    """Lets this process print any text on any terminal: what its encoding lacks is escaped, such as → in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def listed(names: Sequence[Any], most: int = 8) -> str:
    """Names in a row, made printable: "a, b, c and 5 more"."""
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
