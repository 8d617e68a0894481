"""Loaders of other packages, each with its own format and best documented options, as rivals of ours.

    pip install webdataset litdata mosaicml-streaming spdl nvidia-dali-cuda130

A rival is `function(setting)`: it writes its format once, and gives a function that starts it. It makes the same views
as ours, as normalised floats [B, 3, H, W] in the main process, with the same number of workers. Rivals whose package is
missing are named in the legend of the table.
"""

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from fastssl.data.augmentation import Augmentation, View
from tests.support.transforms import plain_transform

from .loader_clock import Batches

Start = Callable[[], Batches]
BASELINE = "ImageFolder, Pillow"  # the pipeline of the reference code
GEOMETRY = (v2.RandomResizedCrop, v2.Resize, v2.CenterCrop)


class Setting(NamedTuple):
    """What a rival is to load."""

    photos: Path  # class folders of JPEG files
    shards: Path  # the same images in tar files
    written: Path  # a folder for the rivals' own formats
    augmentation: Augmentation
    batch: int
    workers: int

    def files(self) -> list[Path]:
        return sorted(self.photos.rglob("*.jpg"))


class Views:
    """The views of an augmentation, made by torchvision's transforms and normalised where the image is decoded.

    Args:
        augmentation: the views.
        from_tensors: for decoders that give tensors [3, H, W] uint8: torchvision crops these several times faster than
            Pillow, whose colours are faster.
    """

    def __init__(self, augmentation: Augmentation, from_tensors: bool = False):
        self.views = [self._transform(view, from_tensors) for view in augmentation.views]

    @staticmethod
    def _transform(view: View, from_tensors: bool) -> v2.Compose:
        steps = list(plain_transform(view).transforms)
        if from_tensors and (any(view.jitter) or view.blur_p):
            crops = sum(isinstance(step, GEOMETRY) for step in steps)  # they stand first
            steps.insert(crops, v2.ToPILImage())
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)])

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        return [view(image) for view in self.views]


def endless(loader: Any) -> Batches:
    """The views of a loader of (views, labels), epoch after epoch."""
    return (views for _ in itertools.count() for views, _ in loader)


def torch_loader(data: Any, setting: Setting, loader: type = DataLoader, **options) -> Any:
    return loader(
        data,
        batch_size=setting.batch,
        num_workers=setting.workers,
        drop_last=True,
        persistent_workers=setting.workers > 0,
        **options,
    )


def image_folder(setting: Setting) -> Start:
    def start():
        data = torchvision.datasets.ImageFolder(str(setting.photos), Views(setting.augmentation))
        return endless(torch_loader(data, setting, shuffle=True))

    return start


def decode(file: str) -> Tensor:
    """Pixels [3, H, W] of a file, by torchvision."""
    return torchvision.io.decode_image(file, torchvision.io.ImageReadMode.RGB)


def image_folder_of_tensors(setting: Setting) -> Start:
    def start():
        views = Views(setting.augmentation, from_tensors=True)
        data = torchvision.datasets.ImageFolder(str(setting.photos), views, loader=decode)
        return endless(torch_loader(data, setting, shuffle=True))

    return start


def webdataset(setting: Setting) -> Start:
    import webdataset as wds

    def start():
        paths = sorted(map(str, setting.shards.glob("*.tar")))
        data = (
            wds.WebDataset(paths, shardshuffle=len(paths), nodesplitter=wds.split_by_node).shuffle(1000).decode("pil")
        )
        views = Views(setting.augmentation)
        data = data.to_tuple("jpg", "cls").map_tuple(views, int)
        data = data.batched(setting.batch, partial=False, collation_fn=default_collate)
        workers = setting.workers
        return endless(wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0))

    return start


def litdata(setting: Setting) -> Start:
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    folder = setting.written / "litdata"
    if not folder.exists():
        files = list(map(str, setting.files()))
        # it makes its way of starting processes that of the whole process: fork is the one of the other loaders
        options = {"num_workers": setting.workers or 1, "start_method": "fork", "verbose": False}
        with mock.patch.object(tempfile, "tempdir", str(setting.written)):  # it leaves files there
            optimize(litdata_sample, files, str(folder), chunk_bytes="64MB", **options)
    # its workers don't end when they are told to: torch stops them after this many seconds each, else after 5
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

    def start():
        views = Views(setting.augmentation, from_tensors=True)
        data = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=lambda s: (views(s[0]), s[1]))
        return endless(torch_loader(data, setting, StreamingDataLoader))

    return start


def litdata_sample(file: str) -> tuple[Image.Image, int]:
    """Image and label as LitData writes them: the bytes of the file, which it decodes to a tensor."""
    return Image.open(file), int(Path(file).parent.name)


def mosaic(setting: Setting) -> Start:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    folder = setting.written / "mosaic"
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image": "jpeg", "label": "int"}) as writer:
            for file in setting.files():
                writer.write({"image": Image.open(file), "label": int(file.parent.name)})

    class Samples(StreamingDataset):
        def __init__(self, views: Views, **options):
            super().__init__(**options)
            self.views = views

        def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
            sample = super().__getitem__(index)
            return self.views(sample["image"].convert("RGB")), sample["label"]

    def start():
        clean_stale_shared_memory()  # of the round before
        data = Samples(Views(setting.augmentation), local=str(folder), shuffle=True, batch_size=setting.batch)
        return endless(torch_loader(data, setting))

    return start


def spdl(setting: Setting) -> Start:
    """Threads, which torchvision's decoder serves without the system's FFmpeg that SPDL's own decoder needs."""
    from spdl.pipeline import PipelineBuilder

    files, views = list(map(str, setting.files())), Views(setting.augmentation, from_tensors=True)

    def endless_source() -> Iterator[str]:
        for _ in itertools.count():
            yield from random.sample(files, len(files))

    def stack(samples: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(view) for view in zip(*samples)]

    def start():
        threads = setting.workers or 1
        builder = PipelineBuilder().add_source(endless_source())
        builder = builder.pipe(lambda file: views(decode(file)), concurrency=threads)
        pipeline = builder.aggregate(setting.batch, drop_last=True).pipe(stack).add_sink(2).build(num_threads=threads)
        with pipeline.auto_stop():
            yield from pipeline

    return start


def dali(setting: Setting) -> Start:
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    from .loader_dali import graph

    names = [f"view {number}" for number in range(len(setting.augmentation.views))]

    def start():
        pipeline = graph(
            str(setting.photos),
            setting.augmentation.views,
            batch_size=setting.batch,
            num_threads=setting.workers or 1,
            device_id=None,
        )
        iterator = DALIGenericIterator(
            pipeline, names, reader_name="photos", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
        )
        return ([output[0][name] for name in names] for _ in itertools.count() for output in iterator)

    return start


class Rival(NamedTuple):
    """A loader of another package."""

    package: str  # on PyPI
    module: str
    start: Callable[[Setting], Start]


RIVALS = {  # by name in the table
    BASELINE: Rival("torchvision", "torchvision", image_folder),
    "ImageFolder, tensors": Rival("torchvision", "torchvision", image_folder_of_tensors),
    "DALI": Rival("nvidia-dali-cuda130", "nvidia.dali", dali),
    "webdataset": Rival("webdataset", "webdataset", webdataset),
    "LitData": Rival("litdata", "litdata", litdata),
    "mosaic streaming": Rival("mosaicml-streaming", "streaming", mosaic),
    "SPDL": Rival("spdl", "spdl.pipeline", spdl),
}


def installed(rival: Rival) -> bool:
    """Whether the rival's package can be imported."""
    parent = rival.module.partition(".")[0]
    return find_spec(parent) is not None and find_spec(rival.module) is not None


def absent() -> list[str]:
    """Packages of the rivals that are not installed."""
    return sorted({rival.package for rival in RIVALS.values() if not installed(rival)})
