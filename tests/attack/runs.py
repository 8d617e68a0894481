"""A run folder under attack: the mutations of its files, and what may be done with it afterwards."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastssl
from fastssl.extras import MissingExtra
from fastssl.run import Run
from fastssl.train import checkpoint
from tests.support import toy_method

LIMIT = 60  # seconds after which an action counts as a hang, also on a busy machine
FAST = {"workers": 0, "tensorboard": False, "log_every": 1, "device": "cpu", "batch_size": 16, "dim": 4}
STEPS = 3  # of an epoch
Mutation = Callable[[Path, random.Random], object]


def make_run(folder: Path) -> Run:
    """A finished run of two epochs."""
    return fastssl.pretrain(toy_method, "tests.support.toy_source:3", folder=folder, epochs=2, seed=1, **FAST)


# Mutations of a file


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def flip_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def become_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def become_link_to_pipe(path: Path, chance: random.Random) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.unlink()
    path.symlink_to("pipe")


def become_link_to_nothing(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("nothing")


def become_noise(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.randrange(1, 3000)))


def become_json(path: Path, chance: random.Random) -> None:
    path.write_text(json.dumps(chance.choice(VALUES)))


def insert_line(path: Path, chance: random.Random) -> None:
    """A line that holds no record between others, as a full disk or a crash of the machine leaves them."""
    lines = path.read_bytes().splitlines(keepends=True)
    bad = chance.choice([b"", b"\0" * 40, b"garbage", b"\xff\xfe", b"[]", b"{}", b'{"step": "3"}', b"3", b"[" * 9999])
    lines.insert(chance.randrange(len(lines)), bad + b"\n")
    path.write_bytes(b"".join(lines))


ANY_FILE: list[Mutation] = [
    truncate,
    flip_bit,
    empty,
    remove,
    become_folder,
    become_pipe,
    become_link_to_pipe,
    become_link_to_nothing,
    become_noise,
    become_json,
]

# Values of other types and ranges, for fields of config.json and of checkpoints

VALUES: list[Any] = [
    None,
    True,
    "",
    "3",
    "\0",
    "\x1b[2J\n",
    "../" * 9,
    "x" * 5000,
    0,
    -1,
    10**18,
    2**70,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    [],
    [0],
    [1, 2, 3],
    [[]],
    {},
    {"a": 1},
]


def places(record: Any, start: tuple = ()) -> Iterator[tuple]:
    """The path of keys to every value of nested dictionaries and lists."""
    keys = record.keys() if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else ()
    for key in keys:
        yield (*start, key)
        yield from places(record[key], (*start, key))


def put(record: Any, place: tuple, value: Any) -> None:
    for key in place[:-1]:
        record = record[key]
    record[place[-1]] = value


def pull(record: Any, place: tuple) -> None:
    for key in place[:-1]:
        record = record[key]
    del record[place[-1]]


def change_config(path: Path, chance: random.Random, place: tuple | None = None) -> str:
    """One field of config.json has another value, is missing, or an unknown one is added; says which."""
    record = json.loads(path.read_text())
    place = place or chance.choice(list(places(record)))
    kind, value = chance.choice(["value", "value", "value", "missing", "unknown"]), chance.choice(VALUES)
    if kind == "value":
        put(record, place, value)
    elif kind == "missing":
        pull(record, place)
    else:
        put(record, (*place[:-1], "unknown") if isinstance(place[-1], str) else place, value)
    path.write_text(json.dumps(record))
    return f"{kind} {place} {value!r:.40}"


def change_checkpoint(path: Path, chance: random.Random) -> str:
    """One entry of a checkpoint has another value; the name has the digest of the new content."""
    state = read_checkpoint(path)
    place = chance.choice(list(places(state)))
    value = chance.choice([*VALUES[:-4], *TENSORS])
    if chance.random() < 0.2:
        pull(state, place)
    else:
        put(state, place, value)
    write_checkpoint(path, state)
    return f"{place} {value!r:.60}"


TENSORS = [
    torch.zeros(0),
    torch.full((4,), torch.nan),
    torch.ones(4, 192, dtype=torch.complex64),
    torch.ones(192),
    torch.zeros(3, dtype=torch.uint8),
    torch.zeros(5056, dtype=torch.uint8),
]


def read_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def write_checkpoint(path: Path, state: Any) -> Path:
    """Replaces a checkpoint by one with other content and the name of its bytes."""
    memory = io.BytesIO()
    torch.save(state, memory)
    digest = hashlib.sha256(memory.getvalue()).hexdigest()[: checkpoint.DIGEST]
    path.unlink()
    path = path.with_name(f"{path.name.split('.')[0]}.{digest}.pt")
    path.write_bytes(memory.getvalue())
    return path


# What is done with the folder


def resume(folder: Path) -> Run:
    return fastssl.pretrain(resume=folder, epochs=3)


def repeat(folder: Path, epochs: int = 3) -> Run:
    settings = {"epochs": epochs, "seed": 1, **FAST}
    return fastssl.pretrain(toy_method, "tests.support.toy_source:3", folder=folder, resume="auto", **settings)


def long_run(folder: Path) -> Run:
    return repeat(folder, 40)


def knn(folder: Path) -> dict:
    return fastssl.open_run(folder).knn(k=3)


def export(folder: Path) -> Path:
    return fastssl.open_run(folder).export("safetensors", folder.parent / "weights")


def report(folder: Path) -> Path:
    return fastssl.open_run(folder).report()


ACTIONS = {function.__name__: function for function in (resume, repeat, knn, export, report, long_run)}


class Hang(Exception):
    """An action has taken longer than `LIMIT`."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, folder: Path) -> tuple[str, str]:
    """(what was printed, the sentence of a refusal or ""). Any other exception than ValueError and MissingExtra, and a
    sentence of several lines or with control characters, is an error of fastssl."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), time_limit(LIMIT):
        try:
            ACTIONS[name](folder)
        except (ValueError, MissingExtra) as error:
            assert str(error).isprintable(), f"not one line: {error!r}"
            return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def content(folder: Path) -> dict[str, bytes]:
    """{name: content} of the regular files of a folder, without the lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
