"""README says what is so: its Python runs, its commands and ops exist."""

import importlib.util
import re
from pathlib import Path

import fastssl.ops
from benchmarks import loader, step, table
from fastssl.data.source import open_source, source_names
from fastssl.ops import dispatch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_table_of_ops_is_true():
    """Every public op has its row, and the row says what serves it."""
    section = README.split("## The ops")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|.*\| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    named = {name: (cpu, gpu) for ops, cpu, gpu in rows for name in re.findall(r"`(\w+)", ops)}
    public = {n for n in vars(fastssl.ops) if callable(getattr(fastssl.ops, n)) and not n[0].isupper()}
    assert set(named) == public
    for op, device, implementation in dispatch.table():
        name = re.sub(r"_(fwd|bwd|dkeys|dx|dweight)$", "", op)
        if name not in ("attention", "attention_packed"):
            said = named[name][device == "cuda"]
            if said == "CUDA C++ (plain torch without nvcc)":
                said = "C++" if dispatch.native_cuda() else "plain torch"
            if said == "Triton" and importlib.util.find_spec("triton") is None:
                said = "plain torch"
            served = {"C++": "native", "Triton": "triton", "plain torch": "plain torch"}[said]
            assert implementation.startswith(served), f"{op} on {device}: {implementation}"


def test_measured_tables_are_those_of_the_results():
    assert table.main(["--check"]) == 0
    assert loader.main(["--check"]) == 0
    assert step.main(["--check"]) == 0


def test_the_data_section_shows_every_source():
    """Those that are embedded are opened; tests/data/ opens the others on files of its own."""
    shown = re.findall(r'^fastssl data check "?([^\s"]+)', README, re.MULTILINE)
    specs = [spec for spec in shown if spec != "SOURCE"]
    assert sorted(spec.partition(":")[0] for spec in specs) == source_names()
    for spec in specs:
        if spec.partition(":")[0] in ("digits", "shapes"):
            assert len(open_source(spec)) > 100


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path
