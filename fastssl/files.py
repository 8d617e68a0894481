"""Atomic writes: a reader finds the old content of a file or the new, never a part, even after a kill."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def write_atomically(path: Path, mode: str = "w", sync: bool = False, **options) -> Iterator[IO]:
    """``with write_atomically(path) as file: file.write(…)`` replaces `path` when the block ends without an error.

    Args:
        path: the file to write, in a folder that exists.
        mode: "w" for text, "wb" for bytes.
        sync: wait until the content and the folder's entry are on disk.
        options: as for `open`, such as encoding and errors.

    Raises:
        OSError: the file cannot be written; `path` is then unchanged, and no partial file is left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with partial.open(mode, **options) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the entries of a folder, such as a rename in it, are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
