"""Methods by name, and their augmentations."""

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import fastssl.methods
from fastssl.data.augmentation import Augmentation, evaluation, multi_crop
from fastssl.data.source import Source

AUGMENTATIONS = {"multi_crop": multi_crop, "evaluation": evaluation}  # augmentations that belong to no method
SMALL = 64  # largest side in pixels for which the preset `small` is the default


def method_names() -> list[str]:
    """Names of the methods in fastssl/methods."""
    return sorted(module.name for module in pkgutil.iter_modules(fastssl.methods.__path__))


def method_module(name: str) -> ModuleType:
    """The module of a method: a name of `method_names`, or a dotted module name such as ``my_package.my_method``.

    Raises:
        ValueError: the method is unknown, cannot be imported, or has no `Config` and `build(config)` (see contract.py).
    """
    if "." not in name or not all(part.isidentifier() for part in name.split(".")):
        if name not in method_names():
            raise ValueError(
                f"pretrain: unknown method {name!r}, there are {', '.join(method_names())}, or your own module: "
                "package.module"
            )
        return importlib.import_module(f"fastssl.methods.{name}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"pretrain: the method {name} cannot be imported ({error}); PYTHONPATH must list the folder of its package"
        ) from error
    for member in ("Config", "build"):
        if not hasattr(module, member):
            raise ValueError(f"pretrain: the method {name} must define {member}: fastssl/contract.py lists its parts")
    return module


def method_name_of(method: str | ModuleType) -> str:
    """The name of a method, as `method_module` takes it."""
    if not inspect.ismodule(method):
        return method
    name = method.__name__
    if name.startswith("fastssl.methods."):
        return name.rpartition(".")[2]
    if "." not in name:
        raise ValueError(f"pretrain: the method's module must be part of a package (package.module), got {name}")
    return name


def find_augmentation(
    name: str, source: Source, size: tuple[int, int] | None = None, tokenizer: str | None = None
) -> Augmentation:
    """The augmentation of a method, of its preset `small` for small images, or one of `AUGMENTATIONS`.

    Args:
        name: a method, or a key of `AUGMENTATIONS`.
        source: the images.
        size: (height, width) of a view, the augmentation's by default.
        tokenizer: run or file of a tokenizer, for a method that needs one for its views.

    Raises:
        ValueError: there is no such augmentation, or a tokenizer is missing or of no use.
    """
    if name in AUGMENTATIONS and tokenizer is None:
        return AUGMENTATIONS[name](size or (224, 224))
    if name not in (*method_names(), *AUGMENTATIONS) and "." not in name:
        raise ValueError(
            f"data: unknown augmentation {name!r}, there are {', '.join((*method_names(), *AUGMENTATIONS))}"
        )
    if tokenizer is not None and not takes_tokenizer(name):
        raise ValueError(f"data: --tokenizer is for a method that predicts its codes, {name} does not, got {tokenizer}")
    config = method_module(name).Config
    chosen = config.small() if has_small_images(source) else config.paper()
    changes: dict[str, Any] = {"image_size": size, "tokenizer": tokenizer}
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(chosen, **given).augmentation


def takes_tokenizer(name: str) -> bool:
    """Whether a method predicts the codes of a tokenizer, which its config names."""
    return name not in AUGMENTATIONS and hasattr(method_module(name).Config, "tokenizer")


def has_small_images(source: Source) -> bool:
    """Whether all images of a source have one size, of at most `SMALL` pixels."""
    return source.size is not None and max(source.size) <= SMALL
