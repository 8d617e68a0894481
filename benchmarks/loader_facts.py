"""What surrounds a loader: opening large sources, packing, memory over many epochs, and the floors of its steps.

Each function takes a folder of photographs and gives rows {"case", "values": {unit: number}, "others"}.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, View
from fastssl.data.decoding import open_image
from fastssl.data.draws import draw, mix, windows
from fastssl.data.loader import Loader, has_dali
from fastssl.data.pack_format import header_bytes, index_bytes, record_bytes, scan
from fastssl.data.packing import KINDS, Encoding, write_pack
from fastssl.data.source import SPLITS, Source, open_source
from fastssl.data.torchvision import change_colours
from fastssl.method_modules import find_augmentation
from fastssl.ops import normalise, resized_crops_

from .loader_clock import cpu_seconds, memory_mb, release_memory, tree
from .machine import OtherPrograms

FILES, FILES_PER_FOLDER = 1_000_000, 1000  # of the folder that is opened
SAMPLES, SAMPLES_PER_SHARD = 100_000, 10_000  # of the shards and of the pack that are opened
EPOCHS, WORKERS, BATCH = 20, 2, 32
FLOOR_SECONDS = 0.5  # for each floor
FLOORS = ("mae", "moco_v2", "dino", "evaluation")
MEAN, STD = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
OPEN = """
import sys, time
from fastssl.data.source import open_source
start = time.perf_counter()
open_source(sys.argv[1])
print(time.perf_counter() - start)
"""


def opening(root: Path) -> Iterator[dict]:
    """Seconds to open a folder, tar shards and a pack of many images for the first time, and again."""
    file = next(root.rglob("*.jpg")).read_bytes()[:512]
    for kind, (path, write) in SOURCES.items():
        images = FILES if kind == "folder" else SAMPLES
        with tempfile.TemporaryDirectory() as home:
            Path(home, "data").mkdir()
            write(Path(home, "data"), file)
            time.sleep(2.5)  # a folder that changed less than two seconds ago is not cached
            with quiet_check() as facts:
                first, *again = (_seconds_to_open(f"{kind}:{path}", Path(home)) for _ in range(3))
            values = {"s the first time": round(first, 2), "s again": round(min(again), 2)}
            yield {"case": f"{kind} of {images:,} images", "values": values, **facts}


def _seconds_to_open(source: str, home: Path) -> float:
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache")}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-c", OPEN, source]
    return float(subprocess.run(command, cwd=home, env=environment, capture_output=True, check=True).stdout)


def _write_files(folder: Path, file: bytes) -> None:
    """Empty files: a folder is opened without reading them."""
    for number in range(-(-FILES // FILES_PER_FOLDER)):
        part = folder / f"{number:04d}"
        part.mkdir()
        for name in range(min(FILES_PER_FOLDER, FILES - number * FILES_PER_FOLDER)):
            os.close(os.open(part / f"{name:04d}.jpg", os.O_CREAT | os.O_WRONLY))


def _write_shards(folder: Path, file: bytes) -> None:
    members = {"jpg": file, "cls": b"1"}
    for begin in range(0, SAMPLES, SAMPLES_PER_SHARD):
        with tarfile.open(folder / f"{begin // SAMPLES_PER_SHARD:04d}.tar", "w") as tar:
            for number in range(begin, min(begin + SAMPLES_PER_SHARD, SAMPLES)):
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                tar.members = []  # it would remember all of them


def _write_index(folder: Path, file: bytes) -> None:
    header = {
        "source": "photographs",
        "encoding": Encoding()._asdict(),
        "images": [SAMPLES, 0],
        "classes": [["0"], None],
        "notes": [[], []],
    }
    image, records = np.frombuffer(file, np.uint8), []
    with open(folder / "images.pack", "wb") as pack:
        pack.write(header_bytes(header))
        for number in range(SAMPLES):
            name = f"0/{number:07d}.jpg"
            facts = {"name": name, "identity": name, "label": 0, "split": SPLITS.index("train")}
            data, begin = record_bytes(number, image, facts), pack.tell()
            pack.write(data)
            records += [record._replace(offset=record.offset + begin) for record in scan(data, 0)]
        pack.write(index_bytes(records, header, pack.tell()))


def packing(root: Path) -> Iterator[dict]:
    """Images per second of processor time that one process packs, of each kind, and the bytes of an image."""
    source, side = open_source(f"folder:{root}"), Encoding().side
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as home, quiet_check() as facts:
            start = time.process_time()
            packed = write_pack({"train": source}, Path(home, "images.pack"), Encoding(kind))
            seconds = time.process_time() - start
        resized = "" if kind == "copy" else f", {root.name.removeprefix('photos-')} to {side} pixels"
        values = {
            "images/s a core": round(len(source) / seconds),
            "kB an image": round(packed.bytes / len(source) / 1e3),
        }
        yield {"case": f"{kind}{resized}", "values": values, **facts}


def memory(root: Path) -> Iterator[dict]:
    """Resident memory after two epochs and after many, of all processes of a loader."""
    augmentation = find_augmentation("mae", open_source(f"folder:{root}"))
    with tempfile.TemporaryDirectory() as home:
        write_pack({"train": open_source(f"folder:{root}")}, Path(home, "images.pack"), Encoding())
        cases = [("folder", "torchvision"), ("pack", "torchvision"), *([("folder", "dali")] if has_dali() else [])]
        for kind, engine in cases:
            source = f"folder:{root}" if kind == "folder" else f"pack:{home}/images.pack"
            loader = Loader(open_source(source), augmentation, BATCH, workers=WORKERS, engine=engine)
            release_memory()
            after = []
            for epoch in range(EPOCHS):
                for _ in loader.epoch(epoch):
                    pass
                after.append(memory_mb(tree()))
            del loader
            values = {"MB after epoch 2": round(after[1]), f"MB after epoch {EPOCHS}": round(after[-1])}
            yield {"case": f"{kind}, engine {engine}, `mae`", "values": values}


def floors(root: Path) -> Iterator[dict]:
    """Each step of a loader alone: milliseconds an image in one thread, and the images per second of two."""
    source = open_source(f"folder:{root}")
    images = np.linspace(0, len(source) - 1, BATCH).astype(np.int64)
    with quiet_check() as facts:
        rows = [(case, _best(run) / BATCH) for case, run in _steps(source, images)]
    for case, seconds in rows:
        values = {"ms an image": round(seconds * 1e3, 4), f"images/s on {WORKERS} cores": round(WORKERS / seconds)}
        yield {"case": case, "values": values, **facts}


def _steps(source: Source, images: np.ndarray) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, function) of the steps of a batch of these images."""
    files = [torch.from_numpy(np.array(source.read(int(index)))) for index in images]
    yield "decode, Pillow", lambda: [np.asarray(Image.open(io.BytesIO(file.numpy().data))) for file in files]
    yield "decode, torchvision", lambda: [torchvision.io.decode_jpeg(file) for file in files]
    yield "decode, fastssl", lambda: [open_image(source, int(index)).pixels() for index in images]
    decoded = [torchvision.io.decode_jpeg(file, torchvision.io.ImageReadMode.RGB) for file in files]
    pixels = [image.permute(1, 2, 0).contiguous() for image in decoded]
    sizes, seeds = np.array([image.shape[:2] for image in pixels]), mix(0, 0, images)
    for name in FLOORS:
        views = find_augmentation(name, source).views
        draws = [draw(view, number, seeds) for number, view in enumerate(views)]
        boxes = [windows(view, drawn, sizes) for view, drawn in zip(views, draws)]
        batches = [torch.zeros(BATCH, 3, *view.size, dtype=torch.uint8) for view in views]
        yield f"crops of `{name}`, torch", lambda v=views, b=boxes: _torch_crops(pixels, v, b)
        yield f"crops of `{name}`, `resized_crops_`", lambda v=views, b=boxes, o=batches: _our_crops(pixels, v, b, o)
        if any(any(view.jitter) or view.flip_p for view in views):
            steps = list(zip(batches, views, draws))
            yield f"colours and flips of `{name}`, `augment_`", lambda s=steps: [change_colours(*step) for step in s]
        yield f"floats of `{name}`, torch", lambda b=batches: [x.float().sub_(MEAN).div_(STD) for x in b]
        yield (
            f"floats of `{name}`, `normalise`",
            lambda b=batches: [normalise(x, IMAGENET_MEAN, IMAGENET_STD) for x in b],
        )


def _torch_crops(pixels: list[torch.Tensor], views: tuple[View, ...], boxes: list[np.ndarray]) -> None:
    for view, box in zip(views, boxes):
        for image, (top, left, height, width) in zip(pixels, box.tolist()):
            window = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
            F.interpolate(window, view.size, mode=view.interpolation, antialias=True)


def _our_crops(
    pixels: list[torch.Tensor], views: tuple[View, ...], boxes: list[np.ndarray], batches: list[torch.Tensor]
) -> None:
    for view, box, out in zip(views, boxes, batches):
        resized_crops_(out, pixels, torch.from_numpy(np.asarray(box, np.int64)), view.interpolation)


def _best(run: Callable[[], object]) -> float:
    """Processor seconds of the fastest call."""
    run()
    best, end = float("inf"), time.perf_counter() + FLOOR_SECONDS
    while time.perf_counter() < end:
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


@contextmanager
def quiet_check() -> Iterator[dict]:
    """A dictionary that gets the share of the processors that other programs used, as "others"."""
    facts: dict = {}
    programs = OtherPrograms(_seconds_with_children)
    yield facts
    facts["others"] = round(programs.share() or 0.0, 3)


def _seconds_with_children() -> float:
    """Processor time of this process and of those it started, whether they still run or ended."""
    children = os.times()
    return cpu_seconds(tree()) + children.children_user + children.children_system


SOURCES: dict[str, tuple[str, Callable[[Path, bytes], None]]] = {  # that are opened: their path, what writes them
    "folder": ("data", _write_files),
    "webdataset": ("data", _write_shards),
    "pack": ("data/images.pack", _write_index),
}
FACTS: dict[str, Callable[[Path], Iterator[dict]]] = {
    "opening": opening,
    "packing": packing,
    "memory": memory,
    "floors": floors,
}
