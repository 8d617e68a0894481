"""Text from outside is shown without harm."""

import subprocess
import sys

import pytest

from fastssl.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Åse 猫 🐈.jpg", "Åse 猫 🐈.jpg"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),  # latin-1 bytes in a file name
        ("a\x1b[31mred\n", r"a\x1b[31mred\n"),
        ("\u202egpj.exe", r"\u202egpj.exe"),  # right-to-left override
        ("a\u00a0b\u2028", r"a\xa0b\u2028"),
        ("lone \ud800", r"lone \ud800"),
        ("x" * 1_000_000, "x" * 5_000 + "…"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(text).encode()


def test_printable_takes_paths(tmp_path):
    assert printable(tmp_path / "a\nb") == f"{tmp_path}/a\\nb"


def test_a_terminal_of_ascii_gets_escapes():
    script = "from fastssl.text import escape_what_cannot_be_encoded as e; e(); print('a → b')"
    run = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "a \\u2192 b\n"
