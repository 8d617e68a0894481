"""Checkpoint files: completeness, damage, disk errors."""

import errno
import os
import resource
import shutil
import threading

import pytest
import torch

from fastssl.train import checkpoint
from fastssl.train.checkpoint import Checkpoints
from tests.support.contract import refused


def state(step: int, **model) -> dict:
    return {"method": "mae", "model": {"w": torch.full((1000,), float(step)), **model}, "step": step}


def saved(folder, *steps: int, **settings) -> Checkpoints:
    with Checkpoints(folder, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), step)
    return checkpoints


def steps_in(folder) -> list[int]:
    return [int(path.name[5:13]) for path in checkpoint.files(folder)]


def test_round_trip(tmp_path):
    whole = {**state(7), "random": [checkpoint.random_state()]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(whole, 7)
        expected = torch.rand(3)
    loaded = checkpoint.load(tmp_path, "mae")
    assert torch.equal(loaded["model"]["w"], whole["model"]["w"])
    checkpoint.set_random_state(loaded["random"][0])
    assert torch.equal(torch.rand(3), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_save_copies_the_state_and_returns_before_the_file_is_written(tmp_path, monkeypatch):
    written, allowed, save = [], threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (allowed.wait(10), written.append(1), save(*args)))
    with Checkpoints(tmp_path) as checkpoints:
        first = state(1)
        checkpoints.save(first, 1)
        first["model"]["w"].fill_(99)  # the run continues
        assert not written
        assert not checkpoint.files(tmp_path)
        allowed.set()
    assert checkpoint.load(tmp_path, "mae")["model"]["w"].eq(1).all()


def test_the_newest_and_every_fourth_step_are_kept(tmp_path):
    saved(tmp_path, *range(1, 11), keep_last=2, keep=lambda step: step % 4 == 0)
    assert steps_in(tmp_path) == [4, 8, 9, 10]
    saved(tmp_path / "other", *range(1, 6), keep_last=1)
    assert steps_in(tmp_path / "other") == [5]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_detected_and_the_previous_one_loaded(tmp_path, capsys, damage):
    saved(tmp_path, 1, 2)
    _, newest = checkpoint.files(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes(content[: {"truncated": 700, "flipped": None, "emptied": 0}[damage]])
    assert checkpoint.load(tmp_path, "mae")["step"] == 1
    assert capsys.readouterr().out == f"checkpoint: {newest} is damaged: loading the previous one\n"
    saved(tmp_path, 2)  # the resumed run saves that step again
    assert checkpoint.load(tmp_path, "mae")["step"] == 2
    assert steps_in(tmp_path) == [1, 2]


def test_error_sentences(tmp_path):
    no_checkpoint = f"checkpoint: no checkpoint in {tmp_path}: was the run stopped before its first one?"
    refused(no_checkpoint, ValueError, checkpoint.load, tmp_path, "mae")
    saved(tmp_path, 1)
    (path,) = checkpoint.files(tmp_path)
    refused(
        f"checkpoint: {path} is of the method mae, not of moco_v2", ValueError, checkpoint.load, tmp_path, "moco_v2"
    )
    path.write_bytes(b"no")
    refused(f"checkpoint: all 1 checkpoints in {tmp_path} are damaged", ValueError, checkpoint.load, tmp_path, "mae")


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(ValueError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), 1)
        checkpoints.save(state(2, bn=torch.tensor([1.0, torch.nan])), 2)
    assert str(error.value) == "checkpoint: bn is not finite after step 2: not saved; that of step 1 is intact"
    assert steps_in(tmp_path) == [1]


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the file size, which fails in the middle of a write like a full disk."""
    saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        checkpoints.save(state(2), 2)
        with pytest.raises(ValueError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reason = os.strerror(errno.EFBIG)
    assert str(error.value) == (
        f"checkpoint: step 2 could not be written to {tmp_path} ({reason}); that of step 1 is intact"
    )
    assert checkpoint.load(tmp_path, "mae")["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1
    checkpoints.save(state(3), 3)  # without the limit
    checkpoints.wait()
    assert steps_in(tmp_path) == [1, 3]


def test_a_deleted_run_folder(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    checkpoints = saved(folder, 1)
    shutil.rmtree(folder.parent)
    with pytest.raises(ValueError) as error, checkpoints:
        checkpoints.save(state(2), 2)
    reason = os.strerror(errno.ENOENT)
    assert (
        str(error.value) == f"checkpoint: step 2 could not be written to {folder} ({reason}); there is none before it"
    )


def test_partial_files_of_a_killed_run_are_deleted(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step-00000002.writing").write_bytes(b"half")
    assert checkpoint.load(tmp_path, "mae")["step"] == 1
    saved(tmp_path, 3)
    assert not list(tmp_path.glob("*.writing"))


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({**state(1), "extra": Evil()}, 1)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load(tmp_path, "mae")
