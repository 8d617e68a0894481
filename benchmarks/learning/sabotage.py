"""Methods broken on purpose: what the check of their learning must notice."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def sabotaged(name: str | None) -> Iterator[None]:
    """Context in which a part of the methods does nothing, or something wrong; None changes nothing."""
    yield
