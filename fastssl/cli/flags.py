"""Parsing of flags in two passes: the first reads the flags on which the defaults of the others depend."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastssl.run import Run, open_run

T = TypeVar("T")


def parse(flags: type[T], words: list[str], prog: str) -> T:
    """The flags of a command; fields of nested dataclasses are flags without a prefix."""
    return tyro.cli(tyro.conf.OmitArgPrefixes[flags], args=words, prog=prog)


def first_pass(flags: type[T], words: list[str], prog: str) -> T:
    """The flags of a command that `flags` defines; all others, including --help, are left for `parse`."""
    values, _ = tyro.cli(
        tyro.conf.OmitArgPrefixes[flags], args=words, prog=prog, return_unknown_args=True, add_help=False
    )
    return values


def parse_for_run(flags_of: Callable[[Run | None], type], words: list[str], prog: str) -> tuple[Any, Run]:
    """(flags, run) of a command that takes a run folder; the defaults of its flags depend on the run.

    Args:
        flags_of: returns the dataclass of the flags for a run, or for None, before the run is known.
        words: the command line.
        prog: the command, for its help.

    Raises:
        ValueError: the named folder is not a run folder.
    """
    folders = first_pass(_with_run(flags_of(None), tuple[str, ...], ()), words, prog).run
    run = open_run(folders[0]) if folders else None
    flags = parse(_with_run(flags_of(run), Path), words, prog)
    return flags, run or open_run(flags.run)


def _with_run(flags: type, kind: Any, default: Any = dataclasses.MISSING) -> type:
    """The flags of a command with the positional argument `run`."""
    positional = Annotated[tyro.conf.Positional[kind], tyro.conf.arg(help="folder of the run")]
    run = ("run", positional, dataclasses.field(default=default, kw_only=True))
    cls = dataclasses.make_dataclass(flags.__name__, [run], bases=(flags,))
    cls.__doc__ = flags.__doc__
    return cls
