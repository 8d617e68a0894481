"""The documentation is true: Python blocks and examples run, links lead somewhere, README's ops are the package's."""

import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastssl.nn
import fastssl.ops
from fastssl.data.source import open_source, source_names
from fastssl.ops import dispatch

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.md")])
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SMALL = {"preset": "small", "backbone": "resnet_mini", "batch_size": 16, "epochs": 1}  # in place of a page's settings
README = (ROOT / "README.md").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def write_photos(folder: Path) -> None:
    """Two class folders of small images; the class is the colour."""
    random = np.random.default_rng(0)
    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for number in range(40):
            pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")


def readme_names() -> dict:
    """What README's loop before and after takes for granted: views, encoders, unit queries and keys, a queue [D, K]."""
    encoder = torch.nn.Linear(32, 128)
    views = torch.randn(2, 8, 32)
    q, k = (F.normalize(encoder(view), dim=1) for view in views)
    queue = F.normalize(torch.randn(128, 65536), dim=0)
    known = {"encoder": encoder, "key_encoder": torch.nn.Linear(32, 128), "view1": views[0], "view2": views[1]}
    return {"torch": torch, "F": F, **known, "q": q, "k": k.detach(), "queue": queue, "ptr": 0}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, in a folder with `photos`, as a reader would type them."""
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    if "fastssl.pretrain(" in page.read_text():
        pretrain = fastssl.pretrain
        monkeypatch.setattr(fastssl, "pretrain", lambda method, **settings: pretrain(method, **settings | SMALL))
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look up their annotations
    for number, block in enumerate(BLOCK.findall(page.read_text()), start=1):
        module.__dict__.update(readme_names() if page.name == "README.md" else {})
        exec(compile(block, f"{name_of(page)}, Python block {number}", "exec"), module.__dict__)


def test_readme_shows_the_same_loss_before_and_after():
    before, after = (block for block in BLOCK.findall(README) if "loss =" in block)
    old = readme_names()
    new = {**old, "key_encoder": None}
    queue = old["queue"].clone()
    exec(before, old)
    setup, rest = after.split("loss =")
    exec(setup, new)
    new["criterion"].queue.copy_(queue.T)
    exec(f"loss ={rest}", new)
    torch.testing.assert_close(new["loss"], old["loss"])
    torch.testing.assert_close(new["criterion"].queue, old["queue"].T)


def test_readme_names_every_op_and_its_kernels():
    section = README.split("## Ops")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|.*\| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    stated = {name: (cpu, gpu) for ops, cpu, gpu in rows for name in re.findall(r"`(\w+)", ops)}
    public = {n for n in vars(fastssl.ops) if callable(getattr(fastssl.ops, n)) and not n[0].isupper()}
    assert set(stated) == public
    for op, device, implementation in dispatch.table():
        name = {"gelu_fwd": "linear", "gelu_bwd_": "linear"}.get(op) or re.sub(r"_(fwd|bwd|dkeys)$", "", op)
        if name == "product" or name.startswith("attention"):  # what computes them is chosen at the call
            continue
        kernel = stated[name][device == "cuda"].removesuffix(" (products: torch's libraries)")
        if kernel == "CUDA C++ (plain torch without nvcc)":
            kernel = "C++" if dispatch.native_cuda() else "plain torch"
        if kernel == "Triton" and importlib.util.find_spec("triton") is None:
            kernel = "plain torch"
        expected = {"C++": "native", "Triton": "triton", "plain torch": "plain torch"}[kernel]
        assert implementation.startswith(expected), f"{op} on {device}: {implementation}"


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_data_page_shows_every_source():
    """Embedded sources are opened here, the others on files of their own in tests/data."""
    shown = re.findall(r'^fastssl data check "?([^\s"]+)', (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert sorted(spec.partition(":")[0] for spec in shown) == source_names()
    for spec in shown:
        if spec.partition(":")[0] in ("captions", "digits", "patterns", "shapes"):
            assert len(open_source(spec)) > 100


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and myst make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    """Relative ones; anchors too."""
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}: no heading with this anchor"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^([\w/-]+)$", index, re.MULTILINE))
    written = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in ROOT.glob("docs/**/*.md")}
    assert written - {"index"} <= listed


@pytest.mark.parametrize("package", [fastssl.nn, fastssl.ops], ids=lambda package: package.__name__)
def test_every_module_is_in_the_reference(package):
    """By itself, or by what the package exports of it."""
    page = (ROOT / "docs" / "api" / f"{package.__name__.rpartition('.')[2]}.md").read_text()
    shown = set(re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE))
    shown |= {inspect.getmodule(value).__name__ for value in vars(package).values() if callable(value)}
    written = {module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")}
    without = {"fastssl.ops.attention_bias"}  # the ops behind `attention`
    assert written - without <= shown
