"""Calls of the command line inside the test process."""

import sys

import pytest

from fastssl import cli


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fastssl", *map(str, words)])
    cli.main()


def refused(monkeypatch, sentence, *words):
    """The command exits with exactly this error sentence."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert str(stopped.value) == f"fastssl: {sentence}"
