"""The page that `fastssl data check` prints: both splits side by side, kinds of images, what is amiss."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from fastssl.data.findings import Findings, Range
from fastssl.data.source import Source, open_source
from fastssl.data.split import describe_sides
from fastssl.text import listed, printable

NAMED_BAD = 20  # bad files that are printed; --bad-files FILE names all
NAMED_CLASSES = 20  # classes whose names are printed
LONGEST_CAPTION = 200  # characters that are printed
NAMED_KINDS = 10  # formats and modes that are printed
UNITS = ("bytes", "kB", "MB", "GB", "TB")
SIDES = {"train": "training", "test": "held-out"}


def open_splits(spec: str, splits: Sequence[str]) -> tuple[dict[str, Source], list[str]]:
    """(each split that can be opened, sentences on the source); at least the first one can."""
    sources, notes = {splits[0]: open_source(spec, splits[0])}, []
    for split in splits[1:]:
        try:
            sources[split] = open_source(spec, split)
        except ValueError as error:
            notes.append(f"no {SIDES[split]} split: {error}")
    notes += [note for source in sources.values() for note in getattr(source, "notes", ())]
    return sources, list(dict.fromkeys(notes))


class Side(NamedTuple):
    """A split and what a scan found in it."""

    source: Source
    findings: Findings

    def classes(self) -> dict[str, int]:
        """{name of the class: images}, of the classes that have images here."""
        names, counts = self.source.classes, self.findings.labels
        if names is None:
            return {}
        known = {names[label]: counts[label] for label in range(len(names)) if counts[label]}
        return known | {str(label): count for label, count in counts.items() if label >= len(names)}


def page(sides: dict[str, Side], notes: Sequence[str]) -> Iterator[Table | Text]:
    """Blocks of the page, from top to bottom.

    Args:
        sides: "training" and "held-out", or one of them.
        notes: sentences on how the data was understood.
    """
    yield _facts(sides)
    if names := list(dict.fromkeys(name for side in sides.values() for name in side.source.classes or ())):
        yield Text(f"names of the classes: {listed(names, NAMED_CLASSES)}")
    if any(side.findings.good for side in sides.values()):
        yield _kinds(sides)
    if examples := list(dict.fromkeys(text for side in sides.values() for text in side.findings.examples)):
        yield Text("\n".join(f"caption  {printable(text[:LONGEST_CAPTION])}" for text in examples))
    notes = [*notes, *describe_sides({name: bool(side.classes()) for name, side in sides.items()})]
    if notes:
        yield Text("\n".join(f"note  {note}" for note in notes))
    if bad := bad_images(sides):
        more = [f"… and {len(bad) - NAMED_BAD:,} more: --bad-files FILE names all"] if len(bad) > NAMED_BAD else []
        yield Text("\n".join(f"bad   {line}" for line in (*bad[:NAMED_BAD], *more)))


def bad_images(sides: dict[str, Side]) -> list[str]:
    """ "PATH: reason" of each image that can't be decoded, once if it is in both splits."""
    return list(dict.fromkeys(printable(line) for side in sides.values() for line in side.findings.bad))


def _facts(sides: dict[str, Side]) -> Table:
    """A row for each fact, a column for each split."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", *sides):
        table.add_column(name, justify="left")
    present = {name for side in sides.values() for name in (*side.classes(), *(side.source.classes or ()))}
    columns = [_column(side, sorted(present - side.classes().keys())) for side in sides.values()]
    if any(len(side.findings.words) for side in sides.values()):
        columns = [column | _caption_facts(side.findings) for column, side in zip(columns, sides.values())]
    for name in columns[0]:
        table.add_row(name, *(Text(column[name]) for column in columns))
    return table


def _column(side: Side, missing: list[str]) -> dict[str, str]:
    """{fact: text} of a split, in which classes are missing."""
    found, counts = side.findings, list(side.classes().values())
    unlabelled = found.labels[-1] if side.source.classes is not None else len(side.source)
    facts = {
        "images": f"{len(side.source):,}",
        "bad images": f"{len(found.bad):,}",
        "without a label": f"{unlabelled:,}",
        "classes": f"{len(counts):,}",
        "missing classes": f"{len(missing):,}" + (f": {listed(missing, 3)}" if missing else ""),
        "images of a class": _span(min(counts), max(counts)) if counts else "-",
    }
    for name, lengths in (("height", found.heights), ("width", found.widths)):
        facts[name] = _spread(lengths)
    return facts | {"size": _bytes(found.bytes), "size per image": _bytes(found.bytes / max(1, found.good))}


def _caption_facts(found: Findings) -> dict[str, str]:
    return {
        "without a caption": f"{(found.captions == 0).sum():,}",
        "captions of an image": _spread(found.captions[found.captions > 0]),
        "words of a caption": _spread(found.words),
    }


def _spread(lengths: np.ndarray) -> str:
    """Lengths of sides as text: "40 to 600, median 64"."""
    if not len(lengths):
        return "-"
    low, median, high = np.percentile(lengths, (0, 50, 100)).astype(int)
    return _span(low, high) + (f", median {median:,}" if high > low else "")


def _span(low: float, high: float) -> str:
    return f"{low:,.6g} to {high:,.6g}" if high > low else f"{low:,.6g}"


def _bytes(count: float) -> str:
    power = min(len(UNITS) - 1, max(0, len(f"{int(count)}") - 1) // 3)
    return f"{count / 1000**power:,.{1 if power else 0}f} {UNITS[power]}"


def _kinds(sides: dict[str, Side]) -> Table:
    """A row for each format and mode: images of each split, and their stored values."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("format", *sides, "values"):
        table.add_column(name, justify="right" if name in sides else "left")
    formats = [side.findings.formats for side in sides.values()]
    kinds = sum(formats[1:], formats[0]).most_common()
    for kind, _ in kinds[:NAMED_KINDS]:
        ranges = [side.findings.values[kind] for side in sides.values() if kind in side.findings.values]
        table.add_row(kind, *(f"{counts[kind]:,}" for counts in formats), _values(ranges))
    if rest := kinds[NAMED_KINDS:]:
        table.add_row(f"{len(rest)} more", *(f"{sum(counts[kind] for kind, _ in rest):,}" for counts in formats), "")
    return table


def _values(ranges: list[Range]) -> str:
    """Stored values as text, with the rules that make bytes of them: "0 to 4,095 (12 bits)"."""
    whole = ranges[0] if len(ranges) == 1 else ranges[0] + ranges[1]
    rules = [f"{rule}: {count:,}" if len(whole.rules) > 1 else rule for rule, count in whole.rules.most_common()]
    return f"{_span(whole.low, whole.high)} ({', '.join(rules)})"
