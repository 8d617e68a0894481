"""The method that docs/methods.md adds from outside the package trains, and runs from pretraining to the report."""

import re
import sys
from pathlib import Path

import pytest
import torch

import fastssl
from fastssl.contract import Batch, Method
from fastssl.data.loader import Loader
from fastssl.data.source import open_source

PAGE = Path(__file__).parent.parent.parent / "docs" / "methods.md"


@pytest.fixture
def simsiam(tmp_path, monkeypatch):
    """The page's module as a reader would install it: my_methods.simsiam."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "__init__.py").touch()
    (tmp_path / "my_methods" / "simsiam.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    import my_methods.simsiam as module

    yield module
    for name in ("my_methods", "my_methods.simsiam"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_example_satisfies_the_contract_and_learns(simsiam):
    config = simsiam.Config.small()
    method = simsiam.build(config)
    assert isinstance(method, Method)
    loader = Loader(open_source("shapes:count=64,size=32"), config.augmentation, 32)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for epoch in range(8):
        for batch in loader.epoch(epoch):
            assert isinstance(batch, Batch)
            loss, metrics = method(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and losses[-1] >= -1
    assert metrics["std"] > 0
    assert method.features(batch.views[0]).shape == (32, 256)


@pytest.mark.slow
def test_the_example_goes_from_pretraining_to_the_report(simsiam, tmp_path):
    run = fastssl.pretrain(
        "my_methods.simsiam", data="shapes:count=64,size=32", epochs=1, batch_size=16, folder=tmp_path / "run"
    )
    assert run.knn()
    features, labels = run.embed("shapes:count=64,size=32")
    assert features.shape == (len(labels), 256)
    assert run.report().is_file()
