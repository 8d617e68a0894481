"""benchmarks/step.py, end to end on a small step."""

import json

import pytest
import torch

from benchmarks import step
from benchmarks.floor import floor
from benchmarks.harness import WrongResult
from benchmarks.step_cases import beit_case, dino_case, igpt_case, mae_case
from fastssl.train.profile import PARTS

VARIANTS = {"official", "fused optimizer", "fused optimizer, plain attention"}


def tiny():
    return mae_case("vit_mini", (16, 24), 4, decoder_dim=32, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_row_has_all_columns_of_the_tables(precision, tmp_path):
    row = {"case": "mae-tiny", **step.measure_case(tiny(), precision, rounds=2, modes=())}
    assert (row["size"], row["precision"], row["rounds"]) == ("MAE, vit_mini, 16×24, B=4", precision, 2)
    for column in ("images_per_second", "ms", "memory_mb"):
        assert set(row[column]) == {"ours", *VARIANTS}
    assert set(row["ratio"]) == VARIANTS and row["best_torch"] in VARIANTS
    for low, median, high in row["images_per_second"].values():
        assert 0 < low <= median <= high
    ours, official = (row["memory_mb"][name] for name in ("ours", "official"))
    assert ours[0] == pytest.approx(official[0], rel=1e-3)  # the same parameters in the same optimizer
    assert all(peak > 0 for _, peak in row["memory_mb"].values())
    for parts_ms in row["parts_ms"].values():
        assert set(parts_ms) == set(PARTS)
        assert all(parts_ms[part] > 0 for part in ("forward", "loss", "backward", "optimizer"))
    assert all(ms > 0 for ms in row["products_ms"].values())
    assert row["failed"] == {} and isinstance(row["busy"], bool)

    page = tmp_path / "page.md"
    page.write_text("\n".join(step.MARKERS) + "\n")
    about, environment = (
        {"slug": "m", "name": "M"},
        dict.fromkeys(("level", "threads", "torch", "torchvision", "timm", "python", "commit", "date"), "1"),
    )
    for busy in (True, False):  # the second row replaces the first
        step.keep({**row, "busy": busy, "others": 0.5}, about, environment, tmp_path)
    assert [len(run["rows"]) for run in json.loads((tmp_path / "m.json").read_text())["runs"]] == [1]
    assert step.main(["--render"], tmp_path, page) == 0
    assert page.read_text().count("| MAE, vit_mini, 16×24, B=4 |") == 3  # the row, and the parts of ours and official
    assert step.main(["--check"], tmp_path, page) == 0
    page.write_text(page.read_text().replace("B=4 |", "B=8 |"))
    assert step.main(["--check"], tmp_path, page) == 1


def test_a_wrong_step_is_not_timed():
    case = tiny()
    inputs = case.inputs
    case.inputs = lambda batch, progress: (inputs(batch, progress)[0], inputs(batch, progress)[1].flip(1))
    with pytest.raises(WrongResult, match="step 0"):
        step.checked(case, case.batch(), "fp32", modes=())


def test_products_of_a_step_are_counted_forward_and_backward(monkeypatch):
    products = {}
    monkeypatch.setattr(
        "benchmarks.floor._fastest", lambda func, described: products.setdefault((func, described), 1.0)
    )
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    assert (
        floor(lambda: layers(torch.randn(2, 3, 8, 8)).sum().backward()) == 5.0
    )  # two forward; one backward of the first layer, two of the last
    assert len(products) == 5


def test_every_product_can_be_repeated():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    assert floor(lambda: layers(torch.randn(2, 3, 8, 8)).sum().backward()) > 0


def test_dinos_official_step_is_ours():
    """Two steps on views of two sizes have the losses of the transcription, as written and tuned."""
    case = dino_case("vit_mini", (16, 16), (8, 8), 4, local_crops=3, prototypes=50, hidden=16, bottleneck=8)
    runs, _, failed = step.checked(case, case.batch(), "fp32", modes=())
    assert set(runs) == {"ours", *VARIANTS} and not failed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_igpts_official_step_is_ours(precision):
    """Two steps have the losses of the transcription, as written and tuned."""
    case = igpt_case("igpt_mini", (8, 6), 4, colours=20)
    runs, _, failed = step.checked(case, case.batch(), precision, modes=())
    assert set(runs) == {"ours", *VARIANTS} and not failed


def test_beits_official_step_is_ours():
    """Two steps with masks, a tokenizer and a bias of attention have the losses of the transcription."""
    tokenizer = {"width": 4, "vocabulary": 24, "groups": 3, "blocks": 1}
    case = beit_case("vit_mini", (16, 24), 4, tokenizer, mask_patches=10, mask_min=4)
    runs, _, failed = step.checked(case, case.batch(), "fp32", modes=())
    assert set(runs) == {"ours", *VARIANTS} and not failed
