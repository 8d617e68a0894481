"""The base install: torch, numpy and safetensors serve `fastssl.ops` and `fastssl.nn`; a missing extra is named.

The tests run Python without its installed packages (`-S`) and with a folder of links to those that the base install
brings, which is what a fresh virtual environment has after `pip install fastssl-engine`.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastssl

PROJECT = Path(fastssl.__file__).parent
BASE = ("torch", "numpy", "safetensors")
EXTRAS = ("torchvision", "PIL", "sklearn", "tyro", "rich", "tensorboard", "matplotlib", "timm", "pandas", "pytest")


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """The distributions of these names and everything they require on this machine, without extras."""
    known: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:  # required on paper and not needed to import torch
            continue
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return known


@pytest.fixture(scope="module")
def base_install(tmp_path_factory) -> Path:
    """A folder with links to what `pip install fastssl-engine` installs."""
    folder = tmp_path_factory.mktemp("base")
    for name in with_requirements(BASE):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            target = Path(distribution(name).locate_file(top))
            if not (folder / top).exists():
                (folder / top).symlink_to(target)
    (folder / "fastssl").symlink_to(PROJECT)
    return folder


def run(base_install: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(base_install), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd or base_install, capture_output=True, text=True)


def test_the_folder_lacks_the_extras(base_install):
    """The other tests would be worthless if an extra could be imported."""
    script = f"import importlib.util; print([n for n in {EXTRAS!r} if importlib.util.find_spec(n)])"
    assert run(base_install, "-c", script).stdout.strip() == "[]"


def test_losses_train_with_the_base_install(base_install):
    script = """
import torch, fastssl, fastssl.ops
from fastssl.nn import InfoNCELoss, MomentumEncoder, accelerate
encoder = torch.nn.Linear(8, 4)
momentum_encoder = MomentumEncoder(encoder, 0.9)
criterion = InfoNCELoss(dim=4, queue_size=16, tau=0.2)
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
before = encoder.weight.detach().clone()
for _ in range(2):
    criterion(encoder(torch.randn(4, 8)), momentum_encoder(torch.randn(4, 8))).backward()
    optimizer.step()
    momentum_encoder.update(encoder)
assert not torch.equal(before, encoder.weight)
print("trained")
"""
    result = run(base_install, "-c", script)
    assert result.stdout.strip() == "trained", result.stderr


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("import fastssl; fastssl.pretrain('moco_v2', 'digits')", "train"),
        ("import runpy, sys; sys.argv = ['fastssl', 'env']; runpy.run_module('fastssl', run_name='__main__')", "train"),
        ("import fastssl.methods.moco_v2", "train"),
        ("import fastssl.report.page", "report"),
    ],
    ids=["fastssl.pretrain", "command line", "method", "report"],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(base_install, script, extra, tmp_path):
    result = run(base_install, "-c", script, cwd=tmp_path)
    assert result.returncode != 0
    assert f"pip install 'fastssl-engine[{extra}]'" in result.stderr.strip().splitlines()[-1], result.stderr
    assert not any(tmp_path.iterdir()), "something was written before the extra was found missing"
