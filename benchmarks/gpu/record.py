"""Results of a phase on disk, complete after every row, and the clock of a phase."""

import json
import time
from pathlib import Path
from typing import Any

from fastssl.files import write_atomically


class Clock:
    """The time of a phase: a phase starts nothing new once it is `over`."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0


class Record:
    """A phase's file: ``{"phase", "state": "cut off" or "finished", "seconds", further facts, "rows": […]}``.

    It is written after every row, so that a phase that is killed keeps its rows; its state then is "cut off".
    """

    def __init__(self, folder: Path, phase: str):
        self.path = folder / f"{phase}.json"
        self._start = time.monotonic()
        self.content: dict[str, Any] = {"phase": phase, "state": "cut off", "seconds": 0.0, "rows": []}
        self._write()

    def note(self, **facts: Any) -> None:
        """Adds facts that hold for all rows."""
        rows = self.content.pop("rows")
        self.content |= {**facts, "rows": rows}
        self._write()

    def add(self, row: dict) -> None:
        self.content["rows"].append(row)
        self._write()

    def finish(self) -> None:
        self.content["state"] = "finished"
        self._write()

    def _write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._start, 1)
        with write_atomically(self.path) as file:
            file.write(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
