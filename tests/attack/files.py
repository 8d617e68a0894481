"""Mutations of the files of `kinds.KINDS`, and a process that opens them.

    mutate              changes a file in one of many ways
    python -m tests.attack.files SEED KINDS FIRST COUNT FOLDER      prints a JSON line for each case

A case is a kind and a number: its random choices follow (seed, kind, number) alone. It may end in images, bad images or
a sentence; everything else is written to its line as a failure. Who starts the process watches the time.
"""

import gzip
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import torch

from fastssl.cli.data_page import Side, bad_images, page
from fastssl.data import captioned, decoding, listing, numpy_files, reading
from fastssl.data.findings import scan
from fastssl.data.fingerprint import take_fingerprint
from fastssl.data.source import BadSource, has_captions, open_source
from fastssl.data.sources import arrays, idx
from fastssl.data.text import TextInput
from fastssl.data.token_table import build_table, with_captions
from fastssl.text import printable
from tests.attack.kinds import KINDS, NAMES, encoded

MEMORY = 100_000_000  # bytes that the sources are told this machine has
PIXELS = 2**20  # most of an image here, so that an image at the limit takes megabytes
ADDRESS_SPACE = 3 * 2**30  # beyond that of the imports; a bomb beyond it fails at once
LONGEST = 6_000  # characters of a sentence
SECRET = b"content of a file that no source was given"
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[place(rng, data)] ^= 1 << rng.randrange(8)


def place(rng: random.Random, data: bytearray) -> int:
    """A position, more often among the first bytes, where headers are."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 512, len(data)))))


def put_number(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = place(rng, data)
    number = rng.choice(NUMBERS) % 256**size
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def drop(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    del data[at : at + rng.randrange(1, 100)]


def repeat(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    data[at:at] = data[at : at + rng.randrange(1, 1000)] * rng.choice((1, 2, 50))


def blank(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    size = len(data[at : at + rng.randrange(1, 100)])
    data[at : at + size] = rng.choice((b"\0", b"\xff", b" ", b"9")) * size


def append(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((bytes(1000), rng.randbytes(1000), bytes(data)))


BYTES = (flip, put_number, cut, drop, repeat, blank, append)


def mend_png(data: bytearray) -> None:
    """Corrects the checksums, so that the decoder sees the change behind them."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        data[at + 8 + size : at + 12 + size] = zlib.crc32(data[at + 4 : at + 8 + size]).to_bytes(4, "big")
        at += 12 + size


def mend_tar(data: bytearray) -> None:
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def mutate_tar_header(rng: random.Random, data: bytearray) -> None:
    """Another size, type or name of a member, with a right checksum."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers) if headers else 0
    sizes = (b"77777777777\0", b"00000000000\0", b"-0000000100\0", b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12)
    change = rng.choice(("size", "type", "name", "pax"))
    if change == "size":
        data[at + 124 : at + 136] = rng.choice(sizes)
    elif change == "type":
        data[at + 156] = rng.choice(b"01234567xgLKSVDMNAX\0\xff")
    elif change == "name":
        data[at : at + 100] = rng.choice(NAMES).encode(errors="surrogateescape")[:99].ljust(100, b"\0")
    else:
        for key in (b"size=", b"path=", b"mtime="):
            data[:] = data.replace(key, rng.choice((b"size=", b"GNU.sparse.size=", b"hdrcharset=", b"9999=")))
    mend_tar(data)


def mutate_npy_header(rng: random.Random, data: bytearray) -> None:
    """Another shape or dtype in the header of an array."""
    sides = (0, 1, 3, 6, 12, 16, -1, 10**6, 2**31, 2**62, 2**64, 10**30)
    shape = tuple(rng.choice(sides) for _ in range(rng.randrange(6)))
    dtype = rng.choice(("'|u1'", "'<f8'", "'<c16'", "'|O'", "'<U1000004'", "'|V9'", "'<M8[s]'", "[('a','<i4')]", "3"))
    header = rng.choice((f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}", "(" * 5000, "{}", "\0"))
    at = data.find(b"\x93NUMPY")
    if at >= 0:
        size = int.from_bytes(data[at + 8 : at + 10], "little")
        text = header.encode().ljust(max(1, size - 1)) + b"\n"
        data[at + 8 : at + 10 + size] = struct.pack("<H", len(text)) + text


def mutate_bytes(rng: random.Random, path: Path) -> str:
    """Changes the content of a file, behind its compression or checksums at times."""
    content, changes = path.read_bytes(), list(BYTES)
    inside = rng.random() < 0.6
    if path.suffix == ".gz" and inside:
        content = gzip.decompress(content)
    if path.suffix == ".tar":
        changes += [mutate_tar_header] * 4
    if path.suffix == ".npy":
        changes += [mutate_npy_header] * 4
    if path.suffix == ".npz" and inside:
        return mutate_npz(rng, path)
    data = bytearray(content)
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(changes)
        told.append(change.__name__)
        if data:
            change(rng, data)
    if inside and path.suffix in (".png", ".tar"):
        (mend_png if path.suffix == ".png" else mend_tar)(data)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and inside else data)
    return f"{' and '.join(told)} {path.name}{' inside' if inside else ''}"


def mutate_npz(rng: random.Random, path: Path) -> str:
    """Changes an array in a .npz file, whose checksum is right."""
    with zipfile.ZipFile(path) as file:
        members = {name: bytearray(file.read(name)) for name in file.namelist()}
    name = rng.choice(sorted(members))
    change = rng.choice((*BYTES, mutate_npy_header, mutate_npy_header, mutate_npy_header))
    change(rng, members[name])
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))) as file:
        for member, data in members.items():
            file.writestr(member, bytes(data))
    return f"{change.__name__} {name} in {path.name}"


def make_sparse(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(rng.choice((2**30, 64 * 2**30)))
        if rng.random() < 0.5:
            file.write(bytes(len(content)))


def substitute(rng: random.Random, path: Path) -> str:
    """Puts something else in the place of a file."""
    kinds = ("pipe", "folder", "loop", "dangling", "link to a pipe", "device", "sparse", "empty", "another file")
    kind = rng.choice(kinds)
    if kind == "sparse":
        make_sparse(path, rng)
        return f"{kind} {path.name}"
    pipe = path.parent / ".pipe"
    if kind == "link to a pipe":
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("empty", "another file"):
        path.write_bytes(b"" if kind == "empty" else encoded(rng, rng.choice(("PNG", "JPEG", "GIF", "BMP"))))
    else:
        path.symlink_to({"loop": path, "dangling": "nowhere", "link to a pipe": pipe, "device": "/dev/zero"}[kind])
    return f"{kind} {path.name}"


def rename(rng: random.Random, path: Path) -> str:
    name = rng.choice(NAMES)
    path.rename(path.with_name(f"{name}{path.suffix}"))
    return f"{path.name} renamed to {name!r}"


def mutate(rng: random.Random, path: Path) -> str:
    """Changes a file in one of the ways above, and says how."""
    return rng.choices((mutate_bytes, substitute, rename), (8, 2, 1))[0](rng, path)


def mutate_cache(rng: random.Random, cache: Path, secret: Path) -> str:
    """Changes one of the files that an earlier opening has cached; at times so that it leads to another file."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    if not paths:
        return "no cache"
    path = rng.choice(paths)
    if path.suffix != ".json" or rng.random() < 0.4:
        return mutate(rng, path)
    strings = sorted({*re.findall(r'"[^"\\]{1,40}"', path.read_text())})
    old = rng.choice(strings) if strings else ""
    leads = (
        str(secret),
        f"../{secret.name}",
        f"class0/../../{secret.name}",
        "\0",
        f"//{secret}",
        "class0/./0.png",
        "x",
    )
    new = rng.choice((*map(json.dumps, leads), "1e999", "null", "[]", "-1", "9" * 5000, "{}", "[" * 100_000))
    path.write_text(path.read_text().replace(old, new))
    return f"{old} of {path.name} became {new[:80]}"


class Failure(Exception):
    """What a source must not do."""


def check_sentence(text: str, start: str = "") -> None:
    if printable(text) != text or len(text) > LONGEST or not text.startswith(start):
        raise Failure(f"no sentence that a terminal can show: {text[:500]!r} ({len(text)} characters)")


def open_everything(spec: str) -> str:
    """Does with a source what `data check` and the start of a run do.

    Returns:
        The outcome: "images", "bad images" or "refused".

    Raises:
        Failure: a message is no sentence, or the content of another file was read.
    """
    outcome = "refused"
    for split in ("train", "test"):
        try:
            source = open_source(spec, split)
        except BadSource:
            raise
        except ValueError as error:
            check_sentence(str(error), "data: ")
            continue
        for note in source.notes:
            check_sentence(note)
        findings = scan(source)
        side = Side(source, findings)
        for line in bad_images({split: side}):
            check_sentence(line)
        list(page({split: side}, source.notes))
        if any(SECRET in source.read(number).tobytes() for number in range(len(source)) if not is_bad(source, number)):
            raise Failure("the content of a file that the source was not given")
        take_fingerprint(source, with_captions=True)
        if has_captions(source):
            source = with_captions(source)
            build_table(source, TextInput("bert", 16)).gather(torch.arange(len(source)), torch.arange(len(source)))
        outcome = "bad images" if findings.bad or outcome == "bad images" else "images"
    return outcome


def is_bad(source, number: int) -> bool:
    try:
        source.read(number)
    except decoding.BadImage:
        return True
    return False


def attack(seed: str, kind: str, number: int, folder: Path) -> tuple[str, str]:
    """(what was changed, the outcome) of a case."""
    rng = random.Random(f"{seed} {kind} {number}")
    root, cache, secret = folder / "root", folder / "cache", folder / "secret.png"
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True)
    secret.write_bytes(SECRET)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    spec = KINDS[kind](rng, root)
    if kind in ("tree", "tar") and rng.random() < 0.4:
        open_everything(spec)
        change = mutate_cache(rng, cache, secret)
    else:
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        change = "; ".join(mutate(rng, path) for path in rng.sample(paths, min(len(paths), rng.choice((1, 1, 2)))))
    return change, open_everything(spec)


def limit_sizes() -> None:
    """Makes the limits of the sources small, so that an attack at a limit is quick, and one beyond it shows."""
    decoding.MAX_PIXELS = arrays.MAX_PIXELS = PIXELS
    reading.MAX_IMAGE_BYTES = 2**24
    numpy_files.usable_memory = idx.usable_memory = captioned.usable_memory = lambda: MEMORY
    listing.MAX_CACHE = 2**24
    listing.SETTLED = -(10**15)  # a folder that has just changed is cached too
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))


def main(seed: str, kinds: str, first: str, count: str, folder: str) -> None:
    limit_sizes()
    started = time.monotonic()
    for number in range(int(first), int(first) + int(count)):
        for kind in kinds.split(","):
            print(json.dumps({"case": f"{kind} {number}"}), flush=True)
            case = {"change": "", "outcome": "", "failure": ""}
            try:
                case["change"], case["outcome"] = attack(seed, kind, number, Path(folder))
            except BaseException:
                case["failure"] = traceback.format_exc()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({**case, "peak": peak, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
