"""Ranges of numbers and choices in the annotations of dataclasses."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from fastssl.bounds import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges
from fastssl.method_modules import method_module, method_names
from fastssl.run import Options
from fastssl.train.config import Execution, Training
from tests.support import toy_method

METHODS = [method_module(name) for name in method_names()]


@dataclass
class Inner:
    count: Annotated[int, AT_LEAST_1] = 1


@dataclass
class Settings:
    free: float = -1.0
    rate: Annotated[float, POSITIVE] = 0.1
    share: Annotated[float, SHARE] = 1.0
    betas: Annotated[tuple[float, float], BELOW_1] = (0.9, 0.99)
    workers: Annotated[int | None, NOT_NEGATIVE] = None
    kind: Literal["a", "b"] = "a"
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rate": 0.0}, "--rate must be above 0, got 0.0"),
        ({"rate": float("nan")}, "--rate must be above 0, got nan"),
        ({"rate": float("inf")}, "--rate must be above 0, got inf"),
        ({"rate": "0.1"}, "--rate must be a number, got '0.1'"),
        ({"share": 1.1}, "--share must be above 0 and at most 1, got 1.1"),
        ({"betas": (0.9, 1.0)}, "--betas must be at least 0 and below 1, got 0.9 1.0"),
        ({"workers": -2}, "--workers must be at least 0, got -2"),
        ({"workers": 1.5}, "--workers must be a whole number, got 1.5"),
        ({"workers": 2**63}, f"--workers must be at least 0 and below 2**63, got {2**63}"),
        ({"kind": "c"}, "--kind must be a or b, got 'c'"),
        ({"kinds": ("a", "c")}, "--kinds must be a or b, got 'c'"),
        ({"inner": Inner(0)}, "--count must be at least 1, got 0"),
    ],
)
def test_what_is_refused(changes, problem):
    with pytest.raises(ValueError) as error:
        check_ranges(Settings(**changes), "owner")
    assert str(error.value) == f"owner: {problem}"


def test_what_is_accepted():
    check_ranges(Settings(), "owner")
    check_ranges(Settings(free=-1e9, rate=1, workers=0, betas=(0.0, 0.5), kind="b", kinds=()), "owner")


@pytest.mark.parametrize("module", [*METHODS, toy_method], ids=lambda m: m.__name__)
def test_presets_are_in_range(module):
    for config in (module.Config.small(), module.Config.paper()):
        check_ranges(config, "pretrain")
        config.training.check("pretrain")


@pytest.mark.parametrize("cls", [Options, Execution, Training, *(module.Config for module in METHODS)], ids=str)
def test_every_number_declares_its_range(cls):
    """A field that may hold a number is Annotated with a Range, so that no number is left unchecked."""
    from typing import get_args, get_origin, get_type_hints

    def numeric(hint):
        return hint in (int, float) or any(numeric(inner) for inner in get_args(hint))

    for name, hint in get_type_hints(cls, include_extras=True).items():
        if numeric(hint):
            assert get_origin(hint) is Annotated, f"{cls.__name__}.{name}"
