import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.augmentation import Augmentation, View, multi_crop
from fastssl.data.draws import mix
from fastssl.data.loader import Loader, has_dali
from fastssl.data.order import BUFFER, Order
from fastssl.data.source import BadImage, open_source
from tests.support.contract import refused
from tests.support.loaders import digest, engines, indices, plain

VIEW = View(
    (16, 24), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, flip_p=0.5
)
TWO = Augmentation((VIEW, VIEW))


class Numbers:
    """A source whose image i is grey of value i, as pixels or as JPEG files; some images can't be decoded."""

    classes, size, shards = None, (8, 8), None

    def __init__(self, count, bad=(), encoded=False):
        self.count, self.bad, self.encoded = count, set(bad), encoded

    def __len__(self):
        return self.count

    def label(self, index):
        return -1

    def name(self, index):
        return f"image {index}"

    def read(self, index):
        pixels = np.full((8, 8, 3), index % 256, dtype=np.uint8)
        if self.encoded:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=95)
            data = np.frombuffer(file.getvalue(), np.uint8).copy()
            return data[: len(data) // 2] if index in self.bad else data  # the header stays complete
        if index in self.bad:
            raise BadImage(f"image {index}: broken")
        return pixels


@engines
def test_each_epoch_has_every_image_once_in_a_new_order(engine):
    loader = Loader(Numbers(20), plain((8, 8)), 4, engine=engine)
    orders = [indices(loader, epoch) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != indices(Loader(Numbers(20), plain((8, 8)), 4, seed=1), 0)


@engines
def test_only_training_leaves_out_the_incomplete_batch(engine):
    train, test = (Loader(Numbers(10), plain((8, 8)), 4, train=train, engine=engine) for train in (True, False))
    assert (len(train), len(indices(train, 0))) == (2, 8)
    assert (len(test), indices(test, 0)) == (3, list(range(10)))


@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_an_epoch_started_in_its_middle_is_bit_equal(engine, workers):
    """Batches depend on seed, epoch and index alone, so they are the same with any number of workers."""
    source = open_source("shapes:count=24")
    whole = [digest(batch) for batch in Loader(source, TWO, 4, seed=3, engine=engine).epoch(5)]
    loader = Loader(source, TWO, 4, seed=3, workers=workers, engine=engine)
    torch.manual_seed(99)  # the global generator is not used
    before = torch.get_rng_state()
    next(iter(loader.epoch(0)))  # an unfinished epoch has no effect on the next one
    assert [digest(batch) for batch in loader.epoch(5, start=2)] == whole[2:]
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(whole)) == len(whole) == 6


@engines
def test_views_of_a_sample_differ_and_so_do_epochs(engine):
    loader = Loader(open_source("shapes:count=8"), TWO, 8, engine=engine)
    first, second = (next(iter(loader.epoch(epoch))) for epoch in (0, 1))
    permutation = second.index.argsort()[first.index.argsort().argsort()]  # to the same images, with other draws
    assert torch.equal(first.index, second.index[permutation])
    for a, b in ((first.views[0], first.views[1]), (first.views[0], second.views[0][permutation])):
        assert (a != b).flatten(1).any(1).all()


@engines
def test_a_sample_is_the_same_in_any_batch(engine):
    source = open_source("shapes:count=24")
    by_index = [{}, {}]
    for views, batch_size in zip(by_index, (24, 5)):
        for batch in Loader(source, TWO, batch_size, engine=engine).epoch(0):
            views.update(zip(batch.index.tolist(), batch.views[1]))
    assert all(torch.equal(by_index[0][index], view) for index, view in by_index[1].items())


@engines
def test_pixels_are_normalised(engine):
    (batch,) = Loader(Numbers(3), plain((8, 8)), 3, train=False, engine=engine).epoch(0)
    expected = (torch.tensor([0, 1, 2.0]).view(3, 1) / 255 - torch.tensor(VIEW.mean)) / torch.tensor(VIEW.std)
    torch.testing.assert_close(batch.views[0].mean((2, 3)), expected, rtol=1e-4, atol=1e-5)
    assert batch.views[0].is_contiguous()


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_views_of_16_bits_are_the_rounded_floats(engine, dtype, space):
    source, augmentation = open_source("shapes:count=4"), Augmentation((View((32, 32), colour_space=space),))
    wide, narrow = (
        next(iter(Loader(source, augmentation, 4, engine=engine, dtype=d).epoch(0))).views[0]
        for d in (torch.float32, dtype)
    )
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    assert torch.equal(narrow, wide.to(dtype))


def test_a_dtype_that_is_not_offered_is_refused():
    sentence = "data: dtype must be float32, bfloat16 or float16, got float64"
    refused(sentence, TypeError, Loader, open_source("shapes:count=4"), TWO, 4, dtype=torch.float64)


@engines
def test_multi_crop_has_views_of_two_sizes(engine):
    (batch,) = Loader(open_source("shapes:count=4"), multi_crop((32, 48), (16, 16), 3), 4, engine=engine).epoch(0)
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 32, 48)] * 2 + [(4, 3, 16, 16)] * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "files"])
@engines
def test_bad_images_are_skipped_counted_and_named(tmp_path, engine, encoded, workers):
    """Truncated files have a valid header, so a decoder fails on them in the middle of a batch."""
    log = tmp_path / "bad_files.txt"
    source, view = Numbers(300, bad=[7, 100, 222], encoded=encoded), View((8, 8), crop=(0.5, 1.0))
    loader = Loader(source, Augmentation((view,)), 10, workers=workers, bad_files=log, engine=engine)
    for epoch in (0, 1):
        seen = indices(loader, epoch)
        assert len(seen) == 300  # other images of the batch fill in, so that every batch is complete
        assert set(seen) == set(range(300)) - {7, 100, 222}
    assert loader.bad_count == 3
    assert sorted(line.split(":")[0] for line in log.read_text().splitlines()) == ["image 100", "image 222", "image 7"]
    assert ("truncated" if encoded else "broken") in log.read_text().lower()
    sample = next(iter(Loader(source, Augmentation((view,)), 10, engine=engine).epoch(0)))
    expected = torch.tensor([index % 256 for index in sample.index.tolist()]) / 255
    torch.testing.assert_close((sample.views[0] * 0.229 + 0.485)[:, 0].mean((1, 2)), expected, atol=2 / 255, rtol=0)


def test_too_many_bad_images_stop_the_run(tmp_path):
    loader = Loader(Numbers(100, bad=[3, 4]), plain((8, 8)), 100, bad_files=tmp_path / "bad.txt")
    with pytest.raises(
        ValueError,
        match=r"^data: 2 of 100 images can't be decoded, more than the 1.0% that max_bad allows, see .*bad.txt",
    ):
        list(loader.epoch(0))
    assert len(set(indices(Loader(Numbers(100, bad=[3, 4]), plain((8, 8)), 100, max_bad=0.02), 0))) == 98


@engines
def test_a_batch_without_good_images_stops_the_run(engine):
    bad = Numbers(4, bad=range(4))
    with pytest.raises(ValueError, match=r"^data: none of the 2 images of a batch can be decoded \(the last: image \d"):
        list(Loader(bad, plain((8, 8)), 2, max_bad=1.0, engine=engine).epoch(0))
    assert list(Loader(bad, plain((8, 8)), 2, max_bad=1.0, train=False, engine=engine).epoch(0)) == []


def test_error_sentences():
    refused(
        "data: the batch of 64 is larger than the data, which has 10 images",
        ValueError,
        Loader,
        Numbers(10),
        plain((8, 8)),
        64,
    )
    refused(
        "data: the batch of 4 on each of 3 ranks is larger than the data, which has 10 images",
        ValueError,
        Loader,
        Numbers(10),
        plain((8, 8)),
        4,
        world=3,
    )
    for sentence, options in (
        ("batch_size must be at least 1, got 0", {"batch_size": 0}),
        ("workers must be at least 0, got -1", {"workers": -1}),
        ("rank must be one of 0 … 1, got 2", {"rank": 2, "world": 2}),
    ):
        refused(f"data: {sentence}", ValueError, Loader, Numbers(10), plain((8, 8)), **{"batch_size": 4, **options})
    refused(
        "data: start must be a batch of the epoch, 0 … 2, got 3",
        ValueError,
        Loader(Numbers(10), plain((8, 8)), 4).epoch,
        0,
        3,
    )
    refused(
        "data: unknown engine 'ffcv', there are torchvision, device, dali",
        ValueError,
        Loader,
        Numbers(10),
        plain((8, 8)),
        4,
        engine="ffcv",
    )


@pytest.mark.parametrize("workers", [0, 1])
@engines
def test_each_sample_has_a_seed_of_run_epoch_and_image(engine, workers):
    loader = Loader(Numbers(8, bad={3}), plain((8, 8)), 4, seed=5, workers=workers, max_bad=1.0, engine=engine)
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            assert batch.seed.tolist() == [int(mix(5, epoch, index)[0]) for index in batch.index.tolist()]


@engines
@pytest.mark.parametrize("train", [True, False])
def test_three_ranks_divide_the_data(engine, train):
    """Together they get the batches of one process with the threefold batch size, in the same order."""
    source, augmentation = open_source("shapes:count=25"), plain((8, 8))
    whole = list(Loader(source, augmentation, 6, train=train).epoch(1))
    ranks = [
        list(Loader(source, augmentation, 2, train=train, rank=rank, world=3, engine=engine).epoch(1))
        for rank in range(3)
    ]
    seen = [{i for batch in batches for i in batch.index.tolist()} for batches in ranks]
    assert sum(map(len, seen)) == len(set.union(*seen)) == (24 if train else 25)
    if train:
        for step, batch in enumerate(whole):
            assert torch.equal(batch.index, torch.cat([batches[step].index for batches in ranks]))
            assert torch.equal(batch.seed, torch.cat([batches[step].seed for batches in ranks]))
    else:
        assert set.union(*seen) == set(range(25))


def test_every_rank_has_the_same_number_of_batches():
    for count, world in ((25, 3), (24, 3), (7, 4)):
        for train in (True, False):
            orders = [Order(count, 2, 0, train, rank=rank, world=world) for rank in range(world)]
            assert len({len(order) for order in orders}) == 1
            assert all(len(order.batches(0)) == len(order) for order in orders)


def test_the_images_left_out_differ_from_epoch_to_epoch():
    order = Order(10, 4, 0, True)
    left_out = {tuple(set(range(10)) - set(np.concatenate(order.batches(epoch)).tolist())) for epoch in range(8)}
    assert len(left_out) > 4


def test_shards_are_read_almost_in_sequence():
    """The order of shards is shuffled; each image stays within `BUFFER` places of its place in that order."""
    ends = np.arange(0, 101_000, 1000)
    order = Order(100_000, 100, 0, True, ends)
    sequence = np.concatenate(order.batches(3))
    assert sorted(sequence) == list(range(100_000))
    shard = sequence // 1000
    first, last = (np.array([np.flatnonzero(shard == s)[end] for s in range(100)]) for end in (0, -1))
    assert (last - first).max() <= 1000 + 2 * BUFFER
    assert not np.array_equal(first.argsort(), np.arange(100))
    assert np.abs(np.diff(sequence)).mean() > 1000  # neighbours in a batch come from different shards
    assert not np.array_equal(sequence, np.concatenate(order.batches(4)))


def test_seeds_of_neighbours_differ():
    seeds = mix(np.arange(5)[:, None, None], np.arange(5)[:, None], np.arange(200))
    assert len(set(seeds.ravel().tolist())) == 5000
    assert seeds.min() >= 0
    assert mix(1, 2) != mix(2, 1)


@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_a_loader_runs_one_epoch_at_a_time(engine, workers):
    """A second epoch ends the first, which then raises instead of giving pixels of the other."""
    source = open_source("shapes:count=24")
    whole = [digest(batch) for batch in Loader(source, TWO, 4, engine=engine).epoch(1)]
    loader = Loader(source, TWO, 4, engine=engine, workers=workers)
    first = loader.epoch(0)
    next(first)
    second = loader.epoch(1)
    beginning = [digest(next(second)) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"^data: a later epoch ended this one"):
        next(first)
    del first
    assert beginning + [digest(batch) for batch in second] == whole


def test_batches_that_are_kept_hold_no_files_open():
    """Workers send tensors in shared memory, one open file each, and a large source has thousands of batches."""
    loader = Loader(open_source("shapes:count=160,size=8"), plain((8, 8)), 4, workers=1)
    kept, counts = [], []
    for batch in loader.epoch(0):
        kept.append((batch.index, batch.label, batch.seed))
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(kept) == 40
    assert counts[-1] - counts[4] < 8


@pytest.mark.skipif(not has_dali(), reason="needs DALI")
def test_workers_do_not_collect_an_inherited_pipeline_of_dali():
    """A pipeline waits for its threads when it is collected, and a forked worker does not have them: it would hang."""
    source = open_source("shapes:count=24")
    for _ in range(3):
        list(
            Loader(source, TWO, 4, engine="dali").epoch(0)
        )  # a pipeline refers to itself, so it stays until the collector runs
        loader = Loader(source, TWO, 4, workers=2)
        assert len(list(loader.epoch(0))) == 6
        del loader
