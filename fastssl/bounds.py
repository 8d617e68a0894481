"""Ranges of numbers, declared where the number is: ``epochs: Annotated[int, AT_LEAST_1]``."""

import dataclasses
import math
from typing import Any, get_type_hints

LARGEST = 2.0**63  # what an int64 and a C++ long can hold: a limit that needs no words


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an end marked as open does not belong to the range."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        ends = []
        if self.low > -math.inf:
            ends.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high < LARGEST:
            ends.append(f"{'below' if self.high_open else 'at most'} {self.high:g}")
        return " and ".join(ends) or "a number"


AT_LEAST_1 = Range(1, LARGEST, high_open=True)
NOT_NEGATIVE = Range(0, LARGEST, high_open=True)
POSITIVE = Range(0, LARGEST, low_open=True, high_open=True)
SHARE = Range(0, 1, low_open=True)  # of something that must not be empty
PROBABILITY = Range(0, 1)


def check_ranges(values: Any, owner: str) -> None:
    """Checks every number of a dataclass against the `Range` in its field's annotation, dataclasses in it included.

    Args:
        values: a dataclass. A field that holds a tuple is checked element by element, and None is never out of range.
        owner: the command or class that the error names.

    Raises:
        ValueError: a number is out of range or not finite; one sentence with the flag, its range, and the value.
    """
    hints = get_type_hints(type(values), include_extras=True)
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, owner)
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for bounds in (m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Range)):
            wrong = [n for n in numbers if n is not None and not isinstance(n, bool) and n not in bounds]
            if wrong:
                flag = "--" + field.name.replace("_", "-")
                got = " ".join(map(str, numbers))
                raise ValueError(f"{owner}: {flag} must be {bounds}, got {got}")
