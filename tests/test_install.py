"""What is installed holds everything, as a wheel and in the working tree."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastssl.kernels
from fastssl import _C
from fastssl.ops import dispatch

ROOT = Path(__file__).parent.parent


def test_this_installation_has_its_parts():
    assert Path(fastssl.kernels.__file__).exists()
    facts = _C.build_facts()
    assert facts["levels"][0] == "baseline"
    for level in facts["levels"]:
        assert list(Path(_C.__file__).parent.glob(f"_native_{level}.*"))
    assert dispatch.native_level() in facts["levels"]


def test_a_build_without_native_kernels_says_so_once_and_runs():
    script = (
        "import sys, warnings; sys.modules['fastssl._C'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'fastssl._C' else find(name, *a)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, fastssl.ops as ops\n"
        "said = [str(w.message) for w in said if 'native' in str(w.message)]\n"
        "assert len(said) == 1 and 'FASTSSL_BUILD' in said[0], said\n"
        "t = torch.ones(3); ops.ema_update_([t], [torch.zeros(3)], 0.5); assert (t == 0.5).all()\n"
        "assert {row[2] for row in ops.dispatch.table() if row[1] == 'cpu'} == {'plain torch'}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_package_is_listed():
    """A folder with Python files that pyproject.toml does not list would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text.split("[tool.setuptools]")[1], re.DOTALL | re.MULTILINE)[1]
    folders = {path.parent for path in (ROOT / "fastssl").rglob("__init__.py") if "kernels" not in path.parts}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(re.findall(r'"([\w.]+)"', listed)) == packages | {"fastssl.kernels"}


@pytest.mark.parametrize(
    "build", [pytest.param("none", marks=pytest.mark.slow), pytest.param("", marks=pytest.mark.exhaustive)]
)
def test_the_wheel_holds_kernels_extension_and_template(tmp_path, build):
    """Built as a user would, without and with native kernels, and imported from the wheel alone, outside the
    repository."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", tmp_path, ROOT]
    environment = os.environ | {"FASTSSL_BUILD": build}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    (wheel,) = tmp_path.glob("fastssl_engine-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for part in ("fastssl/kernels/__init__.py", "fastssl/report/page.html", "fastssl/py.typed", "fastssl/_C.pyi"):
        assert part in names
    for native in ("fastssl/_C.", "fastssl/_native_baseline."):
        files = [name for name in names if name.startswith(native) and not name.endswith(".pyi")]
        assert bool(files) == (build != "none"), native
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    script = (
        "import fastssl, fastssl.kernels, fastssl.ops as ops; from fastssl.ops import dispatch\n"
        f"assert fastssl.__file__.startswith({str(tmp_path)!r}), fastssl.__file__\n"
    )
    if build != "none":
        script += (
            "assert dict(row[::2] for row in dispatch.table() if row[1] == 'cpu')['ema_update_'].startswith('native')\n"
        )
    environment |= {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [("gpu", "fastssl: FASTSSL_BUILD must be none, cpu or cuda, got 'gpu'"), ("cpu", "fastssl: no C++ compiler found")],
)
def test_setup_says_what_is_wrong(value, sentence, tmp_path):
    environment = {"FASTSSL_BUILD": value, "PATH": str(tmp_path), "CXX": "none-such"}
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith(sentence)
