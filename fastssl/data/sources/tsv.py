"""`tsv:FILE`: as `csv:FILE`, with tabs between the fields; a field may stand in double quotes, but need not."""

from ..captioned import CaptionedFiles
from .csv import open_table


def open_split(argument: str, split: str) -> CaptionedFiles:
    return open_table(argument, split, "tsv")
