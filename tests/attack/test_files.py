"""Damaged and hostile files of every kind: images, bad images or one sentence, soon and in little memory."""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl.data.source import source_names

from .files import KINDS

START = 120  # seconds of the imports on a busy machine
PATIENCE = 60  # seconds without a word, on a busy machine: most cases take a hundredth of a second
GROWTH = 400 * 2**20  # bytes of memory beyond those of the first case
ROOT = Path(__file__).parents[2]


def attacked(seed: int, kinds: list[str], count: int, folder: Path):
    """(case, what became of it) of each case; a hang and the end of the process are the last one's failures."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.attack.files"]
    words += [str(seed), ",".join(kinds), "0", str(count), str(folder / "files")]
    with (
        (folder / "stderr").open("wb") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT) as process,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(process.stdout, selectors.EVENT_READ)
        text, case, patience = b"", "the imports", START
        while True:
            if not selector.select(patience):
                process.kill()
                yield case, {"failure": f"no end within {patience} seconds"}
                return
            read = os.read(process.stdout.fileno(), 2**16)
            if not read:
                break
            patience = PATIENCE
            *lines, text = (text + read).split(b"\n")
            for line in map(json.loads, lines):
                if "case" in line:
                    case = line["case"]
                else:
                    yield case, line
                    case = ""
        if process.wait() or case:
            told = (folder / "stderr").read_text(errors="replace")[-2000:]
            yield case, {"failure": f"the process ended with {process.returncode}: {told}"}


def check(seed: int, kinds: list[str], count: int, folder: Path) -> dict[str, dict[str, int]]:
    """{kind: {outcome: cases}} of an attack without a failure."""
    outcomes: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    first = None
    for case, result in attacked(seed, kinds, count, folder):
        kind, _, number = case.partition(" ")
        again = f"python -m tests.attack.files {seed} {kind} {number} 1 FOLDER"
        assert not result["failure"], f"{case}: {result.get('change')}: {result['failure']}\nagain: {again}"
        first = first or result["peak"]
        assert result["peak"] - first < GROWTH, f"{case}: {result['change']}: {result['peak']:,} bytes\nagain: {again}"
        outcomes[kind][result["outcome"]] = outcomes[kind].get(result["outcome"], 0) + 1
    assert all(sum(counts.values()) == count for counts in outcomes.values())
    return outcomes


def test_every_source_of_files_is_attacked():
    """A new source joins by a line in `kinds.KINDS`. Torchvision compares CIFAR's files with their checksums."""
    attacked_ones = {"folder", "webdataset", "arrays", "idx", "pack", "csv", "tsv", "coco"}
    assert {*source_names()} == attacked_ones | {
        "cifar10",
        "cifar100",
        "digits",
        "patterns",
        "shapes",
        "captions",
        "emoji",
    }


@pytest.mark.slow
def test_mutated_files(seed, tmp_path):
    outcomes = check(seed, list(KINDS), 20, tmp_path)
    total = {name: sum(counts.get(name, 0) for counts in outcomes.values()) for name in ("images", "bad images")}
    assert min(total.values()) > len(KINDS)  # the files were understood, and the mutations did something


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(seed, tmp_path, kind):
    outcomes = check(seed, [kind], 2_000, tmp_path)
    assert len(outcomes[kind]) > 1
