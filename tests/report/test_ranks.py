import pytest
import torch

from fastssl.methods import moco_v1, moco_v3
from fastssl.report import ranks
from fastssl.report.run_data import RunData
from tests.support.runs import make_run


@pytest.mark.parametrize(("module", "negatives"), [(moco_v1, 512), (moco_v3, 31)])
def test_collect_changes_nothing_and_says_the_same_again(tmp_path, monkeypatch, module, negatives):
    monkeypatch.setattr(ranks, "QUERIES", 64)
    run = RunData(make_run(tmp_path / "run", module, "shapes:count=64"), "run", "red")
    run.load()
    before = {name: x.clone() for name, x in run.method.state_dict().items()}
    random = torch.get_rng_state()
    found, counted, size = ranks.collect(run)
    assert counted == negatives
    assert size == 32
    assert len(found) == 128  # two batches, each view asks
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) <= negatives
    assert all(torch.equal(x, before[name]) for name, x in run.method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    torch.rand(3)
    assert torch.equal(ranks.collect(run)[0], found)


def test_the_histogram_says_what_it_shows():
    picture = ranks.histogram(torch.tensor([0, 0, 0, 1, 5]), 7, "red")
    assert picture.alt == "histogram of ranks: 60.0% of the positives are first, the median rank is 0"
    assert [name for *_, name in picture.legend] == ["queries", "by chance"]
