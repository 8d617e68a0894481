"""The command line that makes a run again."""

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from fastssl.run import Options, Run


def reproduce(run: Run) -> str:
    """`fastssl pretrain …` for a shell, with every option that is not its default, but for the run's folder."""
    options = run.options
    words = ["fastssl", "pretrain", run.method_name, "--data", options.data]
    words += ["--preset", "paper", "--backbone", run.config.backbone]  # the defaults below depend on both
    words += _flags(options, Options(options.data, folder=options.folder))
    words += _flags(run.config, type(run.config).paper(run.config.backbone))
    return shlex.join(words)


def _flags(values: Any, usual: Any) -> Iterator[str]:
    """Words for the fields of a dataclass that differ from `usual`, those of dataclasses inside it among them."""
    for field in dataclasses.fields(values):
        value, default = getattr(values, field.name), getattr(usual, field.name)
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
