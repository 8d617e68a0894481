"""Command line that repeats a run."""

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from fastssl.milestones import epochs_of, shorten
from fastssl.run import Options, Run


def reproduce(run: Run) -> str:
    """The shell command `fastssl pretrain …` with every option that differs from its default, except --folder.

    The defaults are those of the run's preset, "paper" if it is unknown. For fewer epochs than the preset's the command
    line scales milestones, such as the end of the warm-up: one that the run did not scale becomes an option.
    """
    options, preset = run.options, "small" if run.facts.get("preset") == "small" else "paper"
    words = ["fastssl", "pretrain", run.method_name, "--data", options.data, "--preset", preset]
    if preset == "small":
        defaults = type(run.config).small()
    else:
        backbones = (run.backbone,) if run.backbone else ()
        words += ["--backbone", *backbones] if backbones else []  # the paper's numbers may depend on it
        defaults = type(run.config).paper(*backbones)
    epochs = epochs_of(run.config)
    words += ["--epochs", str(epochs)] if epochs != epochs_of(defaults) else []
    words += _flags(options, Options(options.data, folder=options.folder))
    words += _flags(run.config, shorten(defaults, epochs))
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
