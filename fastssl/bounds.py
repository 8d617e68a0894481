"""Ranges of numbers, declared in a field's annotation: ``epochs: Annotated[int, AT_LEAST_1]``."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastssl.settings import flag

LARGEST = 2.0**63  # smallest number too large for an int64; only an error about such a number mentions it


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
SHARE = Range(0, 1, low_open=True)  # a fraction greater than 0
PROBABILITY = Range(0, 1)
COEFFICIENT = Range(0, 1)  # coefficient of a moving average
BELOW_1 = Range(0, 1, high_open=True)


def check_ranges(values: Any, owner: str) -> None:
    """Check the numbers and choices of a dataclass, and of dataclasses in its fields, against their annotations.

    A number must lie in the `Range` of an ``Annotated`` field, and be whole where the type is int; a choice must be
    one of its ``Literal``. A tuple is checked element by element. None is always accepted.

    Args:
        values: a dataclass.
        owner: command or class that the error names.

    Raises:
        ValueError: a value is out of range, not finite, or none of the choices; the sentence has the flag, what it
            must be, and the value.
    """
    hints = get_type_hints(type(values), include_extras=True)
    for field in dataclasses.fields(values):
        value, hint = getattr(values, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_ranges(value, owner)
            continue
        elements = [x for x in (value if isinstance(value, tuple) else (value,)) if x is not None]
        problem = _out_of_range(elements, hint) or _no_choice(elements, hint)
        if problem:
            raise ValueError(f"{owner}: {flag(field.name)} must be {problem}")


def _out_of_range(elements: list, hint: Any) -> str | None:
    """End of the error sentence if a number is outside its `Range`: what it must be, and the value."""
    base = getattr(hint, "__origin__", hint)
    whole = base is int or int in get_args(base)
    got = " ".join(map(str, elements))
    for bounds in (m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)):
        for x in elements:
            if isinstance(x, bool):
                continue
            if not isinstance(x, int | float) or (whole and not isinstance(x, int)):
                return f"a {'whole ' * whole}number, got {x!r}"
            if x not in bounds:
                return f"{bounds}{' and below 2**63' * (math.inf > x >= LARGEST == bounds.high)}, got {got}"
    return None


def _no_choice(elements: list, hint: Any) -> str | None:
    """End of the error sentence if an element is none of the choices of its `Literal`."""
    literals = [t for t in (hint, *get_args(hint)) if get_origin(t) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    for x in elements if choices else ():
        if x not in choices:
            return f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}, got {x!r}"
    return None
