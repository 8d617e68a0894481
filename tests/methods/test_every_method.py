"""Every command of the command line on every method in fastssl/methods, new ones included."""

import pytest

from fastssl.run import method_names
from tests.support.every_command import use_every_command
from tests.support.tokenizers import tokenizer_file

# Commands and formats that a method has no use for, because of its encoder: two networks, another norm, LayerScale.
REFUSED = {"cmc": {"finetune", "timm", "torchvision"}, "cpc": {"finetune"}, "dinov2": {"torchvision"}}
REFUSED |= {"beit": {"torchvision"}, "simmim": {"torchvision"}}
REFUSED["dvae"] = {"finetune", "timm", "torchvision"}


# one of each kind stays in `make test`
ALWAYS = ("mae", "moco_v2", "simclr_v1", "byol", "cmc", "cpc", "densecl", "deepcluster", "swav", "dinov2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ALWAYS else pytest.mark.exhaustive) for m in method_names()]
)
def test_every_command(method, monkeypatch, capsys, tmp_path):
    words = ["--tokenizer", tokenizer_file()] if method == "beit" else []
    use_every_command(monkeypatch, capsys, tmp_path / "run", method, *words, refused=REFUSED.get(method, ()))
