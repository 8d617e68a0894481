import pytest
import torch
from PIL import Image

from fastssl.data.loader import Loader, _mix
from fastssl.data.recipe import Recipe, View, plain
from fastssl.data.source import BadImage, open_source
from fastssl.data.torchvision import augmentation
from tests.ops.contract import refused

VIEW = View(
    (16, 24), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, flip_p=0.5
)
TWO = Recipe((VIEW, VIEW))


class Numbers:
    """Image i is grey of value i; some can't be decoded."""

    classes, size = None, (8, 8)

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def label(self, index):
        return -1

    def image(self, index):
        if index in self.bad:
            raise BadImage(f"image {index}: broken")
        return Image.new("RGB", (8, 8), (index % 256,) * 3)


def indices(loader, epoch, start=0):
    return [i for batch in loader.epoch(epoch, start) for i in batch.index.tolist()]


def test_an_epoch_has_every_image_once_in_another_order_each_time():
    loader = Loader(Numbers(20), plain((8, 8)), 4)
    orders = [indices(loader, epoch) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != indices(Loader(Numbers(20), plain((8, 8)), 4, seed=1), 0)


def test_the_incomplete_batch_is_left_out_in_training_alone():
    train, test = (Loader(Numbers(10), plain((8, 8)), 4, train=train) for train in (True, False))
    assert (len(train), len(indices(train, 0))) == (2, 8)
    assert (len(test), indices(test, 0)) == (3, list(range(10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_epoch_and_index_alone(workers):
    """…so an epoch that is entered in the middle goes on as if it had been run from its start."""
    source = open_source("shapes:count=24")
    whole = list(Loader(source, TWO, 4, seed=3).epoch(5))
    loader = Loader(source, TWO, 4, seed=3, workers=workers)
    torch.manual_seed(99)  # the global generator has no part in it
    before = torch.get_rng_state()
    entered = list(loader.epoch(5, start=2))
    assert torch.equal(before, torch.get_rng_state())
    assert len(entered) == 4
    for ours, theirs in zip(entered, whole[2:]):
        assert torch.equal(ours.index, theirs.index)
        assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views))
    assert not torch.equal(whole[0].views[0], whole[0].views[1])


def test_pixels_are_normalised():
    (batch,) = Loader(Numbers(3), plain((8, 8)), 3, train=False).epoch(0)
    expected = (torch.tensor([0, 1, 2.0]).view(3, 1) / 255 - torch.tensor(VIEW.mean)) / torch.tensor(VIEW.std)
    torch.testing.assert_close(batch.views[0].mean((2, 3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_named(tmp_path, workers):
    log = tmp_path / "bad_files.txt"
    loader = Loader(Numbers(300, bad=[7, 100, 222]), plain((8, 8)), 10, workers=workers, bad_files=log)
    for epoch in (0, 1):
        seen = indices(loader, epoch)
        assert len(seen) == 300  # others of the batch stand in, so that every step has a whole batch
        assert set(seen) == set(range(300)) - {7, 100, 222}
    assert loader.bad == 3
    assert sorted(log.read_text().splitlines()) == [f"image {i}: broken" for i in (100, 222, 7)]


def test_too_many_bad_images_stop_the_run(tmp_path):
    loader = Loader(Numbers(100, bad=[3, 4]), plain((8, 8)), 100, bad_files=tmp_path / "bad.txt")
    with pytest.raises(
        ValueError, match=r"^data: 2 of 100 images can't be decoded, more than the 1.0% allowed, see .*bad.txt"
    ):
        list(loader.epoch(0))
    assert len(set(indices(Loader(Numbers(100, bad=[3, 4]), plain((8, 8)), 100, max_bad=0.02), 0))) == 98


def test_a_batch_of_bad_images_alone_stops_the_run():
    with pytest.raises(ValueError, match=r"^data: none of the 2 images of a batch can be decoded \(the last: image \d"):
        list(Loader(Numbers(4, bad=range(4)), plain((8, 8)), 2, max_bad=1.0).epoch(0))
    assert list(Loader(Numbers(4, bad=range(4)), plain((8, 8)), 2, max_bad=1.0, train=False).epoch(0)) == []


def test_error_sentences():
    refused(
        "data: the batch of 64 is larger than the data, which has 10 images",
        ValueError, Loader, Numbers(10), plain((8, 8)), 64,
    )  # fmt: skip


def test_view_steps_and_their_probabilities():
    image = open_source("shapes").image(4)
    assert augmentation(VIEW)(image).shape == (3, 16, 24)
    assert [type(step).__name__ for step in augmentation(VIEW).transforms] == [
        "RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply", "RandomHorizontalFlip", "PILToTensor",
    ]  # fmt: skip
    flips = augmentation(View((32, 32), flip_p=0.25))
    plain_pixels = augmentation(View((32, 32)))(image)
    share = sum(not torch.equal(flips(image), plain_pixels) for _ in range(400)) / 400
    assert 0.15 < share < 0.35
    solarized = augmentation(View((32, 32), solarize_p=1.0))(image)
    assert torch.equal(solarized, torch.where(plain_pixels >= 128, 255 - plain_pixels, plain_pixels))


def test_blur_takes_edges_away():
    """The sum of squared differences of neighbours, which a step of one pixel has most of."""
    image = open_source("shapes").image(4)
    views = [View((32, 32), blur_p=p, blur_sigma=(1.0, 1.0)) for p in (0, 1)]
    sharp, blurred = (augmentation(view)(image).float().diff(dim=2).square().sum() for view in views)
    assert blurred < 0.6 * sharp


def test_moco_v1_takes_the_grayscale_before_the_jitter():
    """A grey picture stays grey under jitter of saturation and hue, where a jittered one would be made grey of other
    brightness: red turned to blue is darker."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    seen = {}
    for first in (False, True):
        torch.manual_seed(0)
        view = View((8, 8), jitter=(0, 0, 0, 0.5), grayscale_p=1.0, grayscale_first=first)
        names = [type(step).__name__ for step in augmentation(view).transforms]
        order = ["RandomGrayscale", "RandomApply"] if first else ["RandomApply", "RandomGrayscale"]
        assert names == ["Resize", *order, "PILToTensor"]
        seen[first] = {int(augmentation(view)(red)[0, 0, 0]) for _ in range(20)}
    assert seen[True] == {76}  # the grey of red, always
    assert len(seen[False]) > 5


@pytest.mark.parametrize("workers", [0, 1])
def test_each_sample_brings_a_seed_of_run_epoch_and_image(workers):
    loader = Loader(Numbers(8, bad={3}), plain((8, 8)), 4, seed=5, workers=workers, max_bad=1.0)
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            assert batch.seed.tolist() == [_mix(5, epoch, index) for index in batch.index.tolist()]


def test_seeds_of_neighbours_differ():
    seeds = {_mix(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(200)}
    assert len(seeds) == 5000
    assert _mix(1, 2) != _mix(2, 1)
