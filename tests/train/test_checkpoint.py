import pytest
import torch

from fastssl.train import checkpoint
from tests.ops.contract import refused


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"method": "mae", "model": {"w": torch.randn(3)}, "step": 7, "random": checkpoint.random_state()}
    checkpoint.save(state, path)
    loaded = checkpoint.load(path, "mae")
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    expected = torch.rand(3)
    checkpoint.set_random_state(loaded["random"])
    assert torch.equal(torch.rand(3), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"method": "mae", "step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"method": "mae", "step": (i for i in ())}, path)
    assert checkpoint.load(path, "mae")["step"] == 1


def test_error_sentences(tmp_path):
    path = tmp_path / "checkpoint.pt"
    refused(
        f"checkpoint: {path} does not exist: was the run stopped before its first checkpoint?",
        ValueError, checkpoint.load, path, "mae",
    )  # fmt: skip
    checkpoint.save({"method": "mae", "step": 1}, path)
    refused(f"checkpoint: {path} is of the method mae, not of moco_v2", ValueError, checkpoint.load, path, "moco_v2")
    path.write_bytes(path.read_bytes()[:200])
    refused(
        f"checkpoint: {path} is damaged or no fastssl checkpoint (RuntimeError)",
        ValueError,
        checkpoint.load,
        path,
        "mae",
    )


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    path = tmp_path / "checkpoint.pt"
    torch.save({"method": "mae", "model": Evil()}, path)
    refused(
        f"checkpoint: {path} is damaged or no fastssl checkpoint (UnpicklingError)",
        ValueError,
        checkpoint.load,
        path,
        "mae",
    )
