import pytest
import torch
import torch.nn.functional as F

from fastssl import distributed
from fastssl.eval import spectrum
from fastssl.eval.spectrum import measure_spectrum, redundant_embeddings
from tests.support.ranks import run_ranks


def test_rankme_is_the_formula():
    x = torch.randn(200, 20) @ torch.randn(20, 20)
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum()
    assert measure_spectrum(x).rankme == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-6)


def test_known_spectra():
    everywhere = measure_spectrum(torch.cat([torch.eye(16), -torch.eye(16)]))
    assert everywhere.rankme == pytest.approx(16)
    assert everywhere.two_directions == pytest.approx(2 / 16)
    assert everywhere.warning() is None
    assert everywhere.deviation == pytest.approx(1)
    expected = (
        "RankMe 16 of 16; two directions have 12% of the variance; standard deviation per dimension 100% of 1/√16"
    )
    assert everywhere.text() == expected
    equal = measure_spectrum(torch.ones(50, 16) + 1e-4 * torch.randn(50, 16))
    assert equal.deviation < 0.001
    assert "those of all images are nearly equal" in equal.warning()
    flat = measure_spectrum(torch.ones(50, 16) + 0.03 * torch.randn(50, 16))
    assert "nearly equal, with a standard deviation per dimension of 3.0% of 1/√16" in flat.warning()
    line = measure_spectrum(torch.randn(50, 1) @ torch.randn(1, 16) + 0.01 * torch.randn(50, 16))
    assert "of their variance lies in two of 16 directions" in line.warning()
    assert line.warning(reconstructs=True) is None and line.note(reconstructs=False) is None
    assert "Two of 16 directions hold 100% of the features' variance, as often where masked" in line.note(True)
    assert flat.warning(reconstructs=True) == flat.warning()
    assert measure_spectrum(torch.randn(9, 2)).warning() is None  # two dimensions have all of the variance


def test_deviation_is_the_formula():
    x = torch.randn(200, 20) * torch.arange(1, 21)
    unit = F.normalize(x.double(), dim=1)
    expected = unit.std(0, unbiased=False).mean() * 20**0.5
    assert measure_spectrum(x).deviation == pytest.approx(float(expected))


def test_scale_and_number_of_rows(monkeypatch):
    x = torch.randn(100, 8)
    assert measure_spectrum(x).rankme == pytest.approx(measure_spectrum(1000 * x).rankme)
    monkeypatch.setattr(spectrum, "MOST", 50)
    assert measure_spectrum(x) == measure_spectrum(x[::2])


def test_redundant_embeddings():
    def lines(*values):
        return [{"epoch": (i + 1) / 2, "loss": 1.0, "redundancy": value} for i, value in enumerate(values)]

    assert redundant_embeddings([]) is None
    assert redundant_embeddings([{"epoch": 1.0, "loss": 2.0}, {"epoch": 2.0, "redundancy": None}]) is None
    assert redundant_embeddings(lines(0.9, 0.9, 0.2, 0.29)) is None  # the newest epoch counts
    assert redundant_embeddings(lines(0.1, 0.1, 0.95, 0.99)) == (
        "The embeddings look redundant: in epoch 2 the mean squared correlation of two of their dimensions is 0.97."
    )


def test_refusals():
    for x in (torch.randn(0, 4), torch.full((3, 4), float("nan"))):
        with pytest.raises(ValueError, match="spectrum: features must be finite and at least one"):
            measure_spectrum(x)


def measured(x):
    part = x[:13] if distributed.rank() == 0 else x[13:]
    return tuple(measure_spectrum(part))


@pytest.mark.slow
def test_ranks_measure_all_features():
    x = F.normalize(torch.randn(40, 12), dim=1)
    for result in run_ranks(2, measured, x):
        assert result == pytest.approx(tuple(measure_spectrum(x)))
