"""Milestones: epochs at which a schedule changes, such as the end of a warm-up, marked in a field's annotation.

``warmup_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE]``. One rule holds for all of them: those of a preset follow a
shorter run in proportion (`shorten`), and one at or after the last epoch is refused (`check_milestones`).
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from fastssl.settings import flag, flatten, replace_fields

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Milestone:
    """Mark of a field that holds a number of epochs, or a tuple of them, counted from the start of training."""


MILESTONE = Milestone()


def milestone_epochs(config: Any) -> dict[str, tuple[float, ...]]:
    """{field name: its epochs} of a dataclass and of the dataclasses in its fields."""
    return {name: _as_tuple(value) for name, value, is_milestone in _walk(config) if is_milestone}


def shorten(preset: T, epochs: Any) -> T:
    """The preset with another number of epochs; where there are fewer, its milestones are scaled in proportion.

    Args:
        preset: a dataclass that has the field `epochs`, or holds another dataclass that does.
        epochs: number of epochs. Anything but a positive integer gives the preset unchanged, for a later check.
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        return preset
    scale = epochs / epochs_of(preset)
    values: dict[str, Any] = {"epochs": epochs}
    if scale < 1:
        values |= {name: _scaled(value, scale) for name, value, is_milestone in _walk(preset) if is_milestone}
    return replace_fields(preset, values)


def adopt(config: T, preset: Any, stored: Any) -> T:
    """`config` with the stored run's milestones in place of those that the preset has for this number of epochs.

    So the same command continues a run when only its number of epochs is changed.
    """
    default = milestone_epochs(shorten(preset, epochs_of(config)))
    kept = {name for name, value in milestone_epochs(config).items() if value == default.get(name)}
    return replace_fields(config, {name: value for name, value in flatten(stored).items() if name in kept})


def describe_scaled(preset: Any, config: Any) -> str:
    """One sentence on the preset's milestones that were scaled to a shorter run; "" if there are none."""
    before, now = milestone_epochs(preset), milestone_epochs(config)
    default = milestone_epochs(shorten(preset, epochs_of(config)))
    scaled = [
        f"{flag(name)} {_text(before[name])} → {_text(value)}"
        for name, value in now.items()
        if name in before and value == default[name] != before[name]
    ]
    if not scaled:
        return ""
    share = f"--epochs {epochs_of(config)} of the preset's {epochs_of(preset)}"
    return f"{', '.join(scaled)}: in proportion to {share}; a value that you give is not scaled"


def check_milestones(config: Any, owner: str) -> None:
    """Check that every milestone lies before the last epoch.

    Raises:
        ValueError: a milestone lies at or after it; the sentence has its flag, the number of epochs and the value.
    """
    epochs = epochs_of(config)
    for name, values in milestone_epochs(config).items():
        if late := [value for value in values if value >= epochs]:
            raise ValueError(
                f"{owner}: {flag(name)} must lie before --epochs {epochs}, got {late[0]:g}: lower it or raise "
                f"--epochs (without {flag(name)} the preset's value follows --epochs in proportion)"
            )


def epochs_of(config: Any) -> int:
    """The number of epochs of a dataclass or of one in its fields."""
    return next(value for name, value, _ in _walk(config) if name == "epochs")


def _walk(part: Any) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, whether it is a milestone) of every field."""
    hints = typing.get_type_hints(type(part), include_extras=True)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value)
        else:
            yield field.name, value, MILESTONE in getattr(hints[field.name], "__metadata__", ())


def _scaled(value: Any, scale: float) -> Any:
    return tuple(x * scale for x in value) if isinstance(value, tuple) else value * scale


def _as_tuple(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
