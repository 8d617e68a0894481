"""Milestones: epochs at which a schedule changes, such as the end of a warm-up, marked in a field's annotation.

``warmup_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE]``. One rule holds for all of them: those of a preset follow a
shorter run in proportion (`shorten`), and one at or after the last epoch is refused (`check_milestones`).
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

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
    return _replace(preset, epochs, min(1.0, epochs / epochs_of(preset)))


def adopt(config: T, preset: Any, stored: Any) -> T:
    """`config` with the stored run's milestones in place of those that the preset has for this number of epochs.

    So the same command continues a run when only its number of epochs is changed.
    """
    default = milestone_epochs(shorten(preset, epochs_of(config)))
    kept = {name for name, value in milestone_epochs(config).items() if value == default.get(name)}
    return _take(config, stored, kept)


def describe_scaled(preset: Any, config: Any) -> str:
    """One sentence on the preset's milestones that were scaled to a shorter run; "" if there are none."""
    before, now = milestone_epochs(preset), milestone_epochs(config)
    default = milestone_epochs(shorten(preset, epochs_of(config)))
    scaled = [
        f"{_flag(name)} {_text(before[name])} → {_text(value)}"
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
                f"{owner}: {_flag(name)} must lie before --epochs {epochs}, got {late[0]:g}: lower it or raise "
                f"--epochs (without {_flag(name)} the preset's value follows --epochs in proportion)"
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


def _replace(part: Any, epochs: int, scale: float) -> Any:
    hints, changes = typing.get_type_hints(type(part), include_extras=True), {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replace(value, epochs, scale)
        elif field.name == "epochs":
            changes[field.name] = epochs
        elif MILESTONE in getattr(hints[field.name], "__metadata__", ()) and scale < 1:
            changes[field.name] = tuple(x * scale for x in value) if isinstance(value, tuple) else value * scale
    return dataclasses.replace(part, **changes)


def _take(part: Any, stored: Any, names: set[str]) -> Any:
    changes = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _take(value, getattr(stored, field.name), names)
        elif field.name in names:
            changes[field.name] = getattr(stored, field.name)
    return dataclasses.replace(part, **changes)


def _as_tuple(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
