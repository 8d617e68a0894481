"""JSON lines: bad ones are named, passed over and kept."""

import json

import pytest

from fastssl.train.log import drop_lines_after, read_metrics
from fastssl.train.records import read_records, rewrite_records

BAD = {
    "blank": b"",
    "NULs": b"\0" * 40,
    "garbage": b"\xff\xfe{{",
    "another type": b"[1, 2]",
    "text": b'"step"',
    "no step": b'{"epoch": 1.0}',
    "step as text": b'{"step": "3", "epoch": 1.0}',
    "step true": b'{"step": true, "epoch": 1.0}',
    "epoch not finite": b'{"step": 3, "epoch": NaN}',
    "deep": b"[" * 100_000,
    "half": b'{"step": 3, "ep',
}


def lines(*steps):
    return [json.dumps({"step": step, "epoch": float(step)}).encode() for step in steps]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_deletes_nothing(tmp_path, capsys, name):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines(1, 2), BAD[name], *lines(3, 4)]) + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert f"{path}: line 3 holds no record: passed over, and kept in the file\n" in capsys.readouterr().out
    drop_lines_after(path, 3)
    assert path.read_bytes() == b"\n".join([*lines(1, 2), BAD[name], *lines(3)]) + b"\n"
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_lines_are_named_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([b"x", *lines(1), b"y"]) + b"\n")
    read_metrics(path), read_metrics(path)
    assert capsys.readouterr().out == (
        f"{path}: line 1 and 1 more holds no record: passed over, and kept in the file\n"
    )


def test_the_beginning_of_a_line_that_a_kill_left_is_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines(1, 2), b'{"step": 3, "ep']))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    drop_lines_after(path, 3)
    assert path.read_bytes() == b"\n".join(lines(1, 2)) + b"\n"
    assert capsys.readouterr().out == ""


def test_nuls_that_a_power_cut_left_are_kept(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines(1), b"\0" * 10]))
    drop_lines_after(path, 3)
    assert path.read_bytes() == b"\n".join([*lines(1), b"\0" * 10]) + b"\n"
    assert "line 2 holds no record" in capsys.readouterr().out


def test_new_records_replace_those_that_are_not_kept(tmp_path):
    path = tmp_path / "some.jsonl"
    assert read_records(path) == []
    rewrite_records(path, lambda record: True, [{"step": 1}, {"step": 2}])
    rewrite_records(path, lambda record: record["step"] != 1, [{"step": 1, "new": True}])
    assert read_records(path) == [{"step": 2}, {"step": 1, "new": True}]
