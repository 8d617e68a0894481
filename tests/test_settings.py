"""Settings by flat names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from fastssl.bounds import AT_LEAST_1
from fastssl.settings import differences, flag, flatten, update


@dataclass
class Inner:
    rate: Annotated[float, AT_LEAST_1] = 1.0
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    size: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    path: Path | None = None
    on: bool = False
    count: int | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass
class Other:
    count: int = 3
    seed: int = 0


def test_fields_of_nested_dataclasses_are_settings():
    assert flatten(Outer(), Other(seed=4)) == {
        "size": (1, 2),
        "names": (),
        "path": None,
        "on": False,
        "count": 3,
        "rate": 1.0,
        "kind": "a",
        "seed": 4,
    }
    assert flag("batch_size") == "--batch-size"


def test_update_converts_and_copies():
    before = Outer()
    settings = {"size": [3, 4], "names": ["x"], "path": "a/b", "on": True, "count": 5, "rate": 2, "kind": "b"}
    (after,) = update((before,), settings, "test")
    assert after == Outer((3, 4), ("x",), Path("a/b"), True, 5, Inner(2.0, "b"))
    assert isinstance(after.inner.rate, float)
    assert before == Outer()
    assert differences((before,), (after,)).keys() == settings.keys()
    assert differences((before,), (after,))["count"] == (None, 5)
    assert update((after,), {"count": None}, "test")[0].count is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"siz": 1}, r"^test: unknown setting 'siz'; the closest are size$"),
        ({"count": 1}, r"^test: setting 'count' is ambiguous: 2 dataclasses have such a field$"),
        ({"size": (1, 2, 3)}, r"^test: --size must be a tuple of int, int, got \(1, 2, 3\)$"),
        ({"size": (1, "2")}, r"^test: --size must be a tuple of int, int, got \(1, '2'\)$"),
        ({"on": 1}, r"^test: --on must be True or False, got 1$"),
        ({"seed": True}, r"^test: --seed must be an integer, got True$"),
        ({"seed": 1.5}, r"^test: --seed must be an integer, got 1\.5$"),
        ({"path": 3}, r"^test: --path must be a path or None, got 3$"),
        ({"rate": "fast"}, r"^test: --rate must be a number, got 'fast'$"),
        ({"kind": "c"}, r"^test: --kind must be a or b, got 'c'$"),
    ],
)
def test_mistakes_get_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        update((Outer(), Other()), settings, "test")
