"""The lock of a run folder: one process trains in it at a time."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from fastssl.text import printable

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # the file system has no flock
_held: set[int] = set()  # file descriptors of the locks of this process


class Lock:
    """``lock.acquire() … lock.close()``: an flock on FOLDER/run.lock, which also names the process that holds it.

    The system releases the lock when the process ends, however it ends. Processes that it forks, such as the workers of
    a loader, close their copy, so that a worker that outlives a killed run does not hold the lock.
    """

    def __init__(self, folder: Path):
        self.path = folder / "run.lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Lock the folder, which exists. A file system without locks is only noted.

        Raises:
            ValueError: another process holds the lock, or the file cannot be written.
        """
        if self._file is not None:
            return
        try:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "r+", errors="replace")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"train: {self.path} cannot be written ({reason})") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = printable(file.read(200).strip()) or "another process"
            file.close()
            if error.errno not in NO_LOCKS:
                raise ValueError(
                    f"train: {self.path.parent} is in use by {holder}: wait until that run ends, or choose another "
                    f"folder"
                ) from error
            print(f"{self.path.parent}: its file system has no locks: let no second process train here", flush=True)
            return
        self._file = file
        _held.add(file.fileno())
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    def close(self) -> None:
        """Release the lock, if it is held. The file stays: a process that waits for it may have opened it already."""
        if self._file is not None:
            _held.discard(self._file.fileno())
            self._file.close()
            self._file = None


def _close_copies() -> None:
    """Close the locks in a forked process; they stay locked by its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)
