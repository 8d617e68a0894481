"""Optional dependencies: a missing package raises one sentence with the pip command that installs it."""

import importlib
from types import ModuleType

TRAIN = {"torchvision": "torchvision", "PIL": "pillow", "rich": "rich"}  # import name: distribution


class MissingExtra(ImportError):
    """A package of one of the extras is not installed; the text has the pip command."""


def need(package: str, *, what: str, extra: str | None = None, distribution: str | None = None) -> ModuleType:
    """Imports and returns a package of an extra.

    Args:
        package: name to import.
        what: the command, function or option that needs it.
        extra: extra of fastssl-engine that installs it; None for a package in no extra.
        distribution: name for pip where it differs from `package`.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is installed, and one of its own dependencies is not
        name = distribution or package
        install = f"'fastssl-engine[{extra}]'" if extra else name
        raise MissingExtra(f"{what} needs {name}: pip install {install}") from error


def need_train(what: str) -> None:
    """Checks that the extra `train` is installed, which pretraining and evaluation need."""
    for package, distribution in TRAIN.items():
        need(package, what=what, extra="train", distribution=distribution)
