"""The lock of a run folder: one holder, of which only a living one is in the way."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fastssl.train.lock import Lock


def test_a_second_holder_is_refused(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    first.acquire()  # once more is no second holder
    with pytest.raises(ValueError) as error:
        second.acquire()
    assert str(error.value) == (
        f"train: {tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}: wait until that run ends, or "
        f"choose another folder"
    )
    first.close()
    second.acquire()
    second.close()


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_holder_is_not_in_the_way(tmp_path, forks):
    """Nor is a process that it had forked, such as the worker of a loader, and that outlives it."""
    script = (
        "import os, sys, time; from pathlib import Path; from fastssl.train.lock import Lock; "
        f"lock = Lock(Path({str(tmp_path)!r})); lock.acquire(); pid = os.fork() if {forks} else -1; "
        "pid == 0 and time.sleep(60); print(pid, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on "):
            Lock(tmp_path).acquire()
        holder.kill()
        holder.wait()
        lock = Lock(tmp_path)
        deadline = time.monotonic() + 10
        while True:
            try:
                lock.acquire()
                break
            except ValueError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        lock.close()
    finally:
        holder.kill()
        holder.stdout.close()
        if worker > 0:
            os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    Lock(tmp_path).acquire()
    assert capsys.readouterr().out == (f"{tmp_path}: its file system has no locks: let no second process train here\n")


def test_a_folder_that_cannot_be_locked(tmp_path):
    with pytest.raises(ValueError, match=r"^train: .*/no/run\.lock cannot be written \(No such file or directory\)$"):
        Lock(tmp_path / "no").acquire()
