"""Checkpoint files: completeness, damage, disk errors."""

import errno
import hashlib
import io
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
    saved(tmp_path / "many", *range(1, 13), keep_last=20)  # more than there are yet
    assert steps_in(tmp_path / "many") == list(range(1, 13))


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
    refused(f"checkpoint: {path} is damaged", ValueError, checkpoint.load, tmp_path, "mae")


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


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({**state(1), "extra": Evil()}, 1)
    with pytest.raises(ValueError, match=r"holds something else than a checkpoint \(UnpicklingError\)$"):
        checkpoint.load(tmp_path, "mae")
    assert "gotcha" not in capsys.readouterr().out


def put(folder, content, step):
    """A file with the right digest in its name."""
    data = io.BytesIO()
    torch.save(content, data)
    digest = hashlib.sha256(data.getvalue()).hexdigest()[: checkpoint.DIGEST]
    path = folder / f"step-{step:08d}.{digest}.pt"
    path.write_bytes(data.getvalue())
    return path


FOREIGN = {
    "of another step": ({**state(3), "run": "a"}, "is of step 3, not of the step in its name"),
    "of another run": ({**state(9), "run": "b"}, "is of the run b, not of this one (a)"),
    "of another method": ({**state(9), "method": "dino"}, "is of the method dino, not of mae"),
    "a tensor": (torch.zeros(3), "holds something else than a checkpoint"),
    "a list": ([1, 2], "holds something else than a checkpoint"),
    "weights alone": ({"model": {}}, "is no checkpoint of a run: it lacks method"),
    "steps as text": ({**state(9), "step": "9\n"}, "is no checkpoint of a run: its step is something else"),
    "another step": (state(8), "is of step 8, not of the step in its name"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_content_that_is_not_the_runs_own_is_named_and_the_previous_one_loaded(tmp_path, capsys, name):
    content, reason = FOREIGN[name]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({**state(2), "run": "a"}, 2)
    path = put(tmp_path, content, 9)
    assert checkpoint.load(tmp_path, "mae", "a")["step"] == 2
    assert capsys.readouterr().out == f"checkpoint: {path} {reason}: loading the previous one\n"
    assert checkpoint.files(tmp_path)[-1] == path
    saved(tmp_path, 3, 4, keep_last=2)
    assert steps_in(tmp_path) == [3, 4, 9]  # a foreign file does not count among the newest


def test_what_is_no_file_is_not_opened(tmp_path, capsys):
    saved(tmp_path, 1)
    os.mkfifo(tmp_path / f"step-00000002.{'0' * checkpoint.DIGEST}.pt")
    (tmp_path / "step-two.0.pt").write_bytes(b"")
    assert checkpoint.load(tmp_path, "mae")["step"] == 1
    assert "is no regular file: loading the previous one" in capsys.readouterr().out


def test_what_a_run_needs_beyond_its_weights(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"is no checkpoint of a run: it lacks optimizer$"):
        checkpoint.load(tmp_path, "mae", needed=checkpoint.RESUMED)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "F").touch()
    with pytest.raises(ValueError) as error, Checkpoints(tmp_path / "F") as checkpoints:
        checkpoints.save({"model": {}}, 1)
        checkpoints.wait()
    assert str(error.value).startswith(f"checkpoint: step 1 could not be written to {tmp_path}/F (File exists)")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (MemoryError(), "MemoryError"),
        (KeyError("w"), "'w'"),
        (SystemExit("stop"), "stop"),
    ],
)
def test_whatever_ends_the_writing_thread_reaches_the_run(tmp_path, monkeypatch, error, reason):
    """Also where the partial file cannot be removed, as in a folder that has become read-only."""
    saved(tmp_path, 1)

    def fail(*_, **__):
        raise error

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    with pytest.raises(ValueError) as raised, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(2), 2)
    assert str(raised.value) == (
        f"checkpoint: step 2 could not be written to {tmp_path} ({reason}); that of step 1 is intact"
    )


def test_a_failed_write_is_told_beside_another_error(tmp_path, capsys):
    (tmp_path / "F").touch()
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path / "F") as checkpoints:
        checkpoints.save(state(1), 1)
        raise ZeroDivisionError
    assert "checkpoint: step 1 could not be written" in capsys.readouterr().out


def test_a_checkpoint_that_is_removed_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"has been removed after it was written$"), Checkpoints(tmp_path) as c:
        c.save(state(1), 1)
        c._thread.join()
        shutil.rmtree(tmp_path)
