"""Settings by name: the fields of dataclasses and of dataclasses nested in them, named like command-line flags."""

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union


def flag(name: str) -> str:
    """The command-line flag of a setting: "--batch-size" of batch_size."""
    return "--" + name.replace("_", "-")


def flatten(*parts: Any) -> dict[str, Any]:
    """Name and value of every field, those of nested dataclasses included."""
    return {name: value for part in parts for name, value, _ in _walk(part)}


def update(parts: tuple, settings: dict[str, Any], owner: str) -> tuple:
    """Copies of dataclasses with some fields changed.

    Args:
        parts: dataclasses.
        settings: new values by field name. A list is converted to a tuple, text to a path, an integer to a float.
        owner: command or function that errors name.

    Raises:
        ValueError: a name is unknown (the closest ones are named) or belongs to several dataclasses, or a value is not
            of the field's type.
    """
    hints: dict[str, list] = {}
    for part in parts:
        for name, _, hint in _walk(part):
            hints.setdefault(name, []).append(hint)
    values = {}
    for name, value in settings.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 3) or sorted(hints)
            raise ValueError(f"{owner}: unknown setting {name!r}; the closest are {', '.join(close)}")
        if len(hints[name]) > 1:
            raise ValueError(
                f"{owner}: setting {name!r} is ambiguous: {len(hints[name])} dataclasses have such a field"
            )
        values[name] = _convert(value, hints[name][0], f"{owner}: {flag(name)}")
    return tuple(replace_fields(part, values) for part in parts)


def from_json(cls: type, values: Any, owner: str) -> Any:
    """A dataclass from its JSON form, where tuples are lists and paths are text.

    Args:
        cls: the dataclass, whose fields may be dataclasses.
        values: parsed JSON.
        owner: file that errors name.

    Raises:
        ValueError: a field is unknown or missing, or a value is not of its type.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{owner}: {cls.__name__} must be an object with a value for each option, got {reprlib.repr(values)}"
        )
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"{owner}: unknown field {reprlib.repr(min(unknown))}")
    fields = {
        name: from_json(hints[name], value, owner)
        if dataclasses.is_dataclass(hints[name])
        else _convert(value, hints[name], f"{owner}: {flag(name)}")
        for name, value in values.items()
    }
    try:
        return cls(**fields)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{owner}: {error}") from error


def differences(before: tuple, after: tuple) -> dict[str, tuple[Any, Any]]:
    """{name: (value before, value after)} of the settings that differ between dataclasses of the same types."""
    old, new = flatten(*before), flatten(*after)
    return {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}


def _walk(part: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of every field."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value)
        else:
            yield field.name, value, hints[field.name]


def replace_fields(part: Any, values: dict[str, Any]) -> Any:
    """A copy of a dataclass with new values by field name, in the dataclasses in its fields too; nothing is checked."""
    changes = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = replace_fields(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(part, **changes)


def _convert(value: Any, hint: Any, what: str) -> Any:
    """The value in the type of a field."""
    try:
        return _as_type(value, hint)
    except (TypeError, OverflowError):
        raise ValueError(f"{what} must be {_describe(hint)}, got {reprlib.repr(value)}") from None


def _as_type(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return _as_type(value, arg)
            except TypeError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(map(_as_type, value, kinds))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint is int and isinstance(value, bool):
        pass
    elif hint is Any or (isinstance(origin or hint, type) and isinstance(value, origin or hint)):
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path"}
    names |= {type(None): "None"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return "a tuple of " + ", ".join("…" if arg is Ellipsis else getattr(arg, "__name__", str(arg)) for arg in args)
    return names.get(hint, getattr(hint, "__name__", str(hint)))
