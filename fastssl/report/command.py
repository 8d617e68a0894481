"""Command line that repeats a run."""

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from fastssl.run import Options, Run


def reproduce(run: Run) -> str:
    """The shell command `fastssl pretrain …` with every option that differs from its default, except --folder."""
    options = run.options
    words = ["fastssl", "pretrain", run.method_name, "--data", options.data]
    backbones = (run.backbone,) if run.backbone else ()
    words += ["--preset", "paper", *(("--backbone", *backbones) if backbones else ())]  # the defaults depend on both
    words += _flags(options, Options(options.data, folder=options.folder))
    words += _flags(run.config, type(run.config).paper(*backbones))
    return shlex.join(words)


def _flags(values: Any, defaults: Any) -> Iterator[str]:
    """Flags of the fields that differ between a dataclass and its defaults, those of nested dataclasses included."""
    for field in dataclasses.fields(values):
        value, default = getattr(values, field.name), getattr(defaults, field.name)
        flag = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, default)
        elif value == default:
            continue
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, tuple) else (value,))
