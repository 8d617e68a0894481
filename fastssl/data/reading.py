"""Files from outside, opened so that none of them can hang a run or fill its memory."""

import os
import stat
from io import FileIO
from pathlib import Path

import numpy as np

MAX_IMAGE_BYTES = 2**31  # of an image file: 179 million pixels take half of it at 6 bytes each
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # memory that a container may use, bytes


def open_regular(path: str | Path) -> FileIO:
    """Opens a regular file to read, unbuffered. A pipe or a device is refused, and opening a pipe doesn't wait.

    The opened file is checked rather than its path, which may have become another file in between.

    Raises:
        OSError: the file can't be opened or is not regular; its `strerror` is the reason.
    """
    file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file", os.fspath(path))
    return file


def read_image_file(path: str | Path, offset: int = 0, size: int | None = None) -> np.ndarray:
    """Bytes [N] uint8 of an image file, or of a part of a file; fewer than `size` where the file ends.

    Args:
        path: a regular file.
        offset: first byte.
        size: number of bytes; None for all to the end.

    Raises:
        OSError: the file can't be read, is not regular or larger than `MAX_IMAGE_BYTES`.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = max(0, min(length - offset, length if size is None else size))
        if size > MAX_IMAGE_BYTES:
            raise OSError(0, f"{size:,} bytes are more than {MAX_IMAGE_BYTES:,}, the most of an image", os.fspath(path))
        data = np.empty(size, np.uint8)
        file.seek(offset)
        filled = 0
        while filled < size and (count := file.readinto(data[filled:].data)):  # Linux reads at most 2 GiB at a time
            filled += count
    return data[:filled]


def usable_memory() -> int:
    """Bytes of memory that this process could have at most: the machine's, or less in a container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(CONTROL_GROUP.read_text()))
    except (OSError, ValueError):  # no control group, or no limit: "max"
        return memory
