"""Files of JSON lines, one record each: metrics, evaluations, skipped steps.

A line that holds no record (blank, garbage, other JSON) is passed over, named, and kept in its place. Only the
beginning of a record that a kill left at the end of a file is dropped without a word: a resumed run writes it again.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastssl.files import write_atomically

STEPS: dict[str, type] = {"step": int}  # fields that every record has, and their types
_named: set[tuple[Path, tuple[int, ...]]] = set()  # files and lines that this process has named


def read_records(path: Path, needed: dict[str, type] = STEPS) -> list[dict]:
    """The records of a file, [] if it does not exist. Lines without one are named once in a process.

    Args:
        path: the file.
        needed: fields that a record must have, and their types; a float is finite, and may be written as an integer.

    Raises:
        ValueError: something else than a regular file has this name.
    """
    lines = _lines(path)
    records = [_record(line, needed) for line in lines]
    bad = tuple(number for number, record in enumerate(records, 1) if record is None)
    if bad and bad[-1] == len(lines) and _is_torn(lines[-1]):
        bad = bad[:-1]
    if bad and (path.absolute(), bad) not in _named:
        _named.add((path.absolute(), bad))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        print(f"{path}: line {bad[0]}{more} holds no record: passed over, and kept in the file", flush=True)
    return [record for record in records if record is not None]


def rewrite_records(
    path: Path, keep: Callable[[dict], bool], new: Iterable[dict] = (), needed: dict[str, type] = STEPS
) -> None:
    """Replace the records for which `keep` is false by `new` ones at the end; other lines stay where they are.

    Processes that rewrite files of one folder, such as two evaluations of a run, wait for each other.
    """
    with _exclusive(path.parent):
        read_records(path, needed)  # names the lines without a record
        kept = []
        for line in _lines(path):
            record = _record(line, needed)
            if keep(record) if record is not None else not _is_torn(line):
                kept.append(line.removesuffix(b"\n") + b"\n")
        with write_atomically(path, "wb") as file:
            file.writelines((*kept, *(json.dumps(record).encode() + b"\n" for record in new)))


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Context that one process at a time is in; the lock of the folder itself needs no other file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lines(path: Path) -> list[bytes]:
    if not os.path.lexists(path):
        return []
    if not path.is_file():  # a folder, or a pipe, which would be waited for
        raise ValueError(f"{path} is no regular file: put the run's own back, or move it away")
    with path.open("rb") as file:
        return file.readlines()


def _is_torn(line: bytes) -> bool:
    """Whether a line may be the beginning of a record whose writer was killed."""
    return line.startswith(b"{") and not line.endswith(b"\n") and b"\0" not in line


def _record(line: bytes, needed: dict[str, type]) -> dict | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and all(_fits(record.get(name), kind) for name, kind in needed.items()):
        return record
    return None


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
