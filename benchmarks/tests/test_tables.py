"""Tables in README.md and docs/ show the kept results."""

import pytest

from benchmarks import loader, step, table


@pytest.mark.parametrize("script", [table, loader, step], ids=lambda script: script.__name__)
def test_tables_are_up_to_date(script):
    assert script.main(["--check"]) == 0
