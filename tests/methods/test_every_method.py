"""Every command of the command line on every method in fastssl/methods, new ones included."""

import pytest

from fastssl.run import method_names
from tests.support.every_command import use_every_command


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_command(method, monkeypatch, capsys, tmp_path):
    use_every_command(monkeypatch, capsys, tmp_path / "run", method)
