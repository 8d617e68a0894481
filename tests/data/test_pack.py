"""Packs: the same images, labels, names and splits as their source, whatever happens to the file."""

import io
import itertools
import json
import pickle
import random
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from fastssl.cli import data_pack
from fastssl.data import pack_format, packing
from fastssl.data.decoding import open_image, planes_to_rgb, rgb_to_planes
from fastssl.data.fingerprint import describe_changes, take_fingerprint
from fastssl.data.loader import Loader
from fastssl.data.packing import Encoding, write_pack
from fastssl.data.source import BadImage, Source, Subset, identity, open_source
from fastssl.data.sources import pack as pack_source
from fastssl.method_modules import find_augmentation
from tests.support.command import refused, run


def photo(height, width, seed):
    """A smooth picture."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes in two splits, of several sizes and formats; one file is damaged."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 9), ("val", 4)):
        for i in range(count):
            path = root / split / f"class {i % 2}" / (f"é{i}.jpg" if i % 3 else f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(40 + 7 * i, 60 + 3 * i, i).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    (root / "train" / "class 0" / "bad.jpg").write_bytes(b"no image")
    return f"folder:{root}"


def splits(spec):
    return {split: open_source(spec, split) for split in ("train", "test")}


def packed(folder, path, **options):
    encoding = Encoding(**{"side": 48, **options})
    return write_pack(splits(folder), path, encoding, name=folder)


def good(source):
    """{identity: (label, pixels)} of the images that can be decoded."""
    images = {}
    for i in range(len(source)):
        try:
            images[identity(source, i)] = source.label(i), open_image(source, i).pixels()
        except BadImage:
            continue
    return images


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pack_is_its_source(folder, tmp_path, kind, workers):
    path = tmp_path / "x.pack"
    result = write_pack(splits(folder), path, Encoding(kind, 48), workers=workers, name=folder)
    assert (result.images, len(result.bad), result.bytes) == (13, 1, path.stat().st_size)
    assert "bad.jpg" in result.bad[0]
    for split, source in splits(folder).items():
        pack, expected = open_source(f"pack:{path}", split), good(source)
        assert pack.classes == source.classes == ["class 0", "class 1"]
        found = good(pack)
        assert list(found) == list(expected)
        for name, (label, pixels) in found.items():
            assert label == expected[name][0]
            if kind == "copy":
                assert torch.equal(pixels, expected[name][1])
            else:
                side = min(48, *expected[name][1].shape[1:])
                assert min(pixels.shape[1:]) == (side + side % 2 if kind == "yuv" else side)
        assert all(pack.name(i).startswith(f"{path}: ") for i in range(len(pack)))
    note = open_source(f"pack:{path}").notes[-1]
    assert note == "1 of 10 images could not be decoded when the pack was written"
    assert not path.with_name("x.pack.part").exists()


def test_pixels_are_those_of_the_resized_image(folder, tmp_path):
    """Within 1 of 255 of Pillow's bicubic filter."""
    packed(folder, tmp_path / "x.pack", kind="rgb")
    source, pack = open_source(folder), good(open_source(f"pack:{tmp_path / 'x.pack'}"))
    for name, (_, pixels) in good(source).items():
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        if min(picture.size) > 48:
            scale = 48 / min(picture.size)
            size = [max(48, round(side * scale)) for side in picture.size]
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        torch.testing.assert_close(pack[name][1], torch.from_numpy(np.array(picture)).permute(2, 0, 1), rtol=0, atol=1)


def test_small_jpegs_are_kept_and_turned_ones_are_not(tmp_path):
    (tmp_path / "x").mkdir()
    photo(30, 40, 0).save(tmp_path / "x" / "a.jpg", quality=70)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(30, 40, 1).save(tmp_path / "x" / "b.jpg", exif=exif)
    source = open_source(f"folder:{tmp_path / 'x'}::labels=none")
    write_pack({"train": source}, tmp_path / "x.pack", Encoding())
    pack = open_source(f"pack:{tmp_path / 'x.pack'}")
    assert pack.read(0).tobytes() == (tmp_path / "x" / "a.jpg").read_bytes()
    image = Image.open(io.BytesIO(pack.read(1).tobytes()))
    assert image.size == (30, 40) and not image.getexif().get(0x0112)


class WithExtras(Source):
    """Pixels with an array each, and a name that is no UTF-8."""

    classes, size, shards = None, (4, 4), None

    def __init__(self, count=5):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, index):
        return np.full((4, 4, 3), index, np.uint8)

    def name(self, index):
        return f"\udcff{index}"

    def label(self, index):
        return -1

    def extras(self, index):
        return {"tokens": np.arange(index, index + 3), "depth": np.full((2, 2), index, np.float32)}


def test_extras_and_names_of_any_bytes(tmp_path):
    source = WithExtras()
    write_pack({"train": source}, tmp_path / "x.pack", Encoding("rgb"))
    pack = open_source(f"pack:{tmp_path / 'x.pack'}")
    assert pack.size == (4, 4) and pack.classes is None
    for i in range(5):
        assert identity(pack, i) == source.name(i) and pack.label(i) == -1
        np.testing.assert_array_equal(pack.read(i), source.read(i))
        assert {k: v.tolist() for k, v in pack.extras(i).items()} == {
            k: v.tolist() for k, v in source.extras(i).items()
        }
    with pytest.raises(ValueError, match=r"x\.pack holds no images of the test split"):
        open_source(f"pack:{tmp_path / 'x.pack'}", "test")


@pytest.mark.parametrize("engine", ["torchvision", "dali"])
def test_engines_make_the_views_of_the_source(folder, tmp_path, engine):
    """From copied files: the same draws and pixels, in the same order."""
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    packed(folder, tmp_path / "x.pack", kind="copy")
    views = find_augmentation("moco_v2", open_source(folder), (32, 32))

    def batches(spec, indices):
        source = open_source(spec)
        loader = Loader(source, views, 3, engine=engine, max_bad=1.0, train=False)
        return {
            identity(source, int(i)): view for b in loader.epoch(0) for i, view in zip(b.index, b.views[0]) if indices
        }

    ours, theirs = batches(f"pack:{tmp_path / 'x.pack'}", True), batches(folder, True)
    assert ours.keys() == theirs.keys() and len(ours) == 9
    first = next(iter(ours))  # numbers before the damaged image are equal, so its draws are too
    assert torch.equal(ours[first], theirs[first])


def test_a_pack_cut_off_at_any_byte_gives_a_sentence_and_the_rest(folder, tmp_path):
    path, cut = tmp_path / "x.pack", tmp_path / "cut.pack"
    packed(folder, path, kind="jpeg")
    data, whole = path.read_bytes(), good(open_source(f"pack:{path}"))
    counts = set()
    for end in [*range(0, 200, 7), *range(200, len(data), 997), len(data) - 1]:
        cut.write_bytes(data[:end])
        try:
            pack = open_source(f"pack:{cut}")
        except ValueError as error:
            assert str(error).startswith("data: ") and "cut.pack" in str(error) and "\n" not in str(error)
            continue
        found = good(pack)
        counts.add(len(found))
        assert len(found) == len(pack) and any("the file is cut off, or not finished" in note for note in pack.notes)
        assert all(torch.equal(pixels, whole[name][1]) for name, (_, pixels) in found.items())
    assert counts >= {1, 5, 9}


def test_flipped_bytes_cost_their_images_alone(folder, tmp_path):
    path, broken = tmp_path / "x.pack", tmp_path / "broken.pack"
    packed(folder, path, kind="jpeg")
    data, whole = path.read_bytes(), good(open_source(f"pack:{path}"))
    chosen, lost = random.Random(0), set()
    for _ in range(60):
        place = chosen.randrange(len(data))
        broken.write_bytes(data[:place] + bytes([data[place] ^ (1 + chosen.randrange(255))]) + data[place + 1 :])
        try:
            pack = open_source(f"pack:{broken}")
        except ValueError as error:
            assert place < 8 and "no pack" in str(error)
            continue
        found = good(pack)
        lost.add(len(whole) - len(found))
        assert all(torch.equal(pixels, whole[name][1]) for name, (_, pixels) in found.items())
    assert lost == {0, 1}  # one damaged byte costs at most one image


def test_an_interrupted_pack_is_continued(folder, tmp_path):
    path, part = tmp_path / "x.pack", tmp_path / "x.pack.part"
    packed(folder, path, kind="jpeg")
    data = path.read_bytes()
    for end in (0, 11, 300, len(data) // 3, len(data) // 2, len(data) - 6000):
        path.unlink(missing_ok=True)
        part.write_bytes(data[:end])
        result = packed(folder, path, kind="jpeg")
        assert result.images == 13 and path.read_bytes() == data
    assert result.continued > 5
    path.unlink()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x\.pack\.part was begun with other images or another encoding"):
        packed(folder, path, kind="rgb")
    assert part.read_bytes() == data[: len(data) // 2]


def test_refusals(folder, tmp_path, monkeypatch):
    path = tmp_path / "x.pack"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data: --out .*x\.pack exists"):
        packed(folder, path)
    for content, reason in ((b"", "is empty, no pack"), (b"PNG" * 20, "is no pack"), (b"FSSLPACK", "is no pack")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            open_source(f"pack:{path}")
    with pytest.raises(ValueError, match="pack needs a file: pack:FILE"):
        open_source("pack")
    with pytest.raises(ValueError, match=r"nothing\.pack can't be read \(No such file or directory\)"):
        open_source(f"pack:{tmp_path / 'nothing.pack'}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 1 images of .* can be decoded"):
        write_pack({"train": open_source(f"folder:{tmp_path / 'bad'}")}, tmp_path / "y.pack", Encoding(), name="bad")
    refused(monkeypatch, "data: --out is needed: the file to write, or --estimate", "data", "pack", folder)
    refused(monkeypatch, "data: --quality must be at most 95, got 96", "data", "pack", folder, "--quality", "96")


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "photos.pack"
    words = ["data", "pack", folder, "--out", path, "--side", "48", "--workers", "0"]
    run(monkeypatch, *words)
    said = capsys.readouterr().out
    assert "left out: " in said and f"13 images, {path.stat().st_size / 1e9:,.3g} GB: pack:{path}" in said
    run(monkeypatch, "data", "check", f"pack:{path}", "--seconds", "0", "--workers", "0")
    assert "1 of 10 images could not be decoded when the pack was written" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_estimate(folder, monkeypatch, capsys):
    monkeypatch.setattr(data_pack, "SECONDS", 0.05)
    run(monkeypatch, "data", "pack", folder, "--estimate", "--side", "48")
    said = capsys.readouterr().out
    for choice in ("the source", "--kind copy", "--kind jpeg --side 48", "--kind rgb --side 256"):
        assert choice in said


def test_a_pack_with_right_checksums_and_wrong_content_is_refused(tmp_path):
    """As an attacker would write it: each field of the index out of range, and a header of another shape."""
    path = tmp_path / "x.pack"
    write_pack({"train": WithExtras()}, path, Encoding("rgb"))
    index = pack_format.read_index(path)
    data = path.read_bytes()[: int(index.columns["offset"][-1])]

    def opens_as(header, columns):
        blob = safetensors.numpy.save(columns, {"header": json.dumps(header)})
        end = pack_format.TRAILER.pack(b"FSSLEND0", len(data), len(blob), zlib.crc32(blob), 0)
        path.write_bytes(data + blob + end)
        with pytest.raises(ValueError, match=r"x\.pack is no pack of this program"):
            open_source(f"pack:{path}")

    columns, header = index.columns, index.header
    for name, value in (("offset", -8), ("size", 2**40), ("extras_size", 2**62), ("height", -1), ("label", 3)):
        opens_as(header, {**columns, name: np.full_like(columns[name], value)})
    opens_as(header, {**columns, "name_end": columns["name_end"][::-1].copy()})
    opens_as(header, {**columns, "crc": columns["crc"].astype(np.float64)})
    opens_as(header, {name: column for name, column in columns.items() if name != "width"})
    opens_as({**header, "classes": None}, columns)
    opens_as({**header, "notes": [[1], []]}, columns)
    opens_as([], columns)


def test_extras_that_end_before_they_begin_are_damage():
    """As an attacker would write them: the next record would be the same one, for ever."""
    image, facts = np.zeros((4, 4, 3), np.uint8), {"name": "x", "identity": "x", "label": -1, "split": 0}
    record = pack_format.record_bytes(1, image, facts)
    hostile = pack_format.record_bytes(0, image, {**facts, "extras": [-500, 0]})
    found = list(itertools.islice(pack_format.scan(hostile + record, 0), 3))
    assert [one.number for one in found] == [1]


def test_planes_are_the_colours_of_the_image(folder, tmp_path):
    """4:2:0 loses the finer half of the colours, which a smooth picture hardly has."""
    packed(folder, tmp_path / "rgb.pack", kind="rgb", side=500)
    packed(folder, tmp_path / "yuv.pack", kind="yuv", side=500)
    exact, planes = open_source(f"pack:{tmp_path / 'rgb.pack'}"), open_source(f"pack:{tmp_path / 'yuv.pack'}")
    for i in range(len(exact)):
        pixels, (height, width, _) = planes.read(i), exact.read(i).shape
        height, width = height + height % 2, width + width % 2
        assert pixels.shape == (3 * height // 2, width) and open_image(planes, i).size == (height, width)
        found = open_image(planes, i).pixels()[:, : exact.read(i).shape[0], : exact.read(i).shape[1]]
        difference = (found.int() - open_image(exact, i).pixels().int()).abs().float()
        assert difference.mean() < 2 and found.shape == open_image(exact, i).pixels().shape
    luma = np.asarray(Image.fromarray(exact.read(1)).convert("YCbCr"))[..., 0]
    np.testing.assert_array_equal(planes.read(1)[: luma.shape[0], : luma.shape[1]], luma)


@pytest.mark.parametrize("color", [(255, 0, 0), (10, 200, 60), (255, 255, 255)])
def test_planes_of_one_colour_keep_it(color):
    pixels = np.tile(np.array(color, np.uint8), (6, 5, 1))
    planes = rgb_to_planes(Image.fromarray(pixels))
    assert planes.shape == (9, 6)
    difference = planes_to_rgb(planes).astype(int) - np.array(color)
    assert abs(difference).max() <= 1


def test_a_pack_of_planes_is_packed_again(folder, tmp_path):
    packed(folder, tmp_path / "planes.pack", kind="yuv")
    source = open_source(f"pack:{tmp_path / 'planes.pack'}")
    for kind in packing.KINDS:
        write_pack({"train": source}, tmp_path / f"{kind}.pack", Encoding(kind, 48))
        again = open_source(f"pack:{tmp_path / f'{kind}.pack'}")
        if kind in ("yuv", "copy"):
            assert all(np.array_equal(again.read(i), source.read(i)) for i in range(len(source)))
        else:
            first, second = open_image(source, 0).pixels().float(), open_image(again, 0).pixels().float()
            assert (first - second).abs().mean() < (0.1 if kind == "rgb" else 3)


def test_pixels_are_the_mapped_memory_and_stay_as_they_are(folder, tmp_path):
    path = tmp_path / "x.pack"
    packed(folder, path, kind="rgb")
    data, pack = path.read_bytes(), open_source(f"pack:{path}")
    image = pack.read(0)
    assert not image.flags.owndata and image.flags.writeable
    image[:] = 0
    assert path.read_bytes() == data and open_source(f"pack:{path}").read(0).any()
    again = pickle.loads(pickle.dumps(pack))
    np.testing.assert_array_equal(again.read(0), open_source(f"pack:{path}").read(0))


def test_a_checksum_is_verified_once_a_process(folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "x.pack", kind="rgb")
    pack, checked = open_source(f"pack:{tmp_path / 'x.pack'}"), []
    verify = zlib.crc32
    monkeypatch.setattr(pack_source.zlib, "crc32", lambda part: checked.append(len(part)) or verify(part))
    for _ in range(3):
        pack.read(0)
    assert len(checked) == 1
    pack.read(1)
    assert len(checked) == 2


@pytest.mark.parametrize("kind", ["jpeg", "yuv"])
@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_one_source(folder, tmp_path, shards, kind):
    sources, calls = splits(folder), []
    write_pack(sources, tmp_path / "one.pack", Encoding(kind, 48), name=folder)
    result = write_pack(
        sources,
        tmp_path / "x.pack",
        Encoding(kind, 48),
        name=folder,
        shards=shards,
        progress=lambda done, total: calls.append((done, total)),
    )
    files = sorted(tmp_path.glob("x-*.pack"))
    assert [file.name for file in files] == [f"x-{i:05d}-of-{shards:05d}.pack" for i in range(shards)]
    assert (result.images, len(result.bad), result.bytes) == (13, 1, sum(file.stat().st_size for file in files))
    assert calls == [(i + 1, 14) for i in range(14)]
    for split in ("train", "test"):
        one, many = (open_source(f"pack:{tmp_path / name}", split) for name in ("one.pack", "x.pack"))
        assert len(one) == len(many) and one.classes == many.classes and one.notes == many.notes
        for i in range(len(one)):
            assert (identity(one, i), one.label(i)) == (identity(many, i), many.label(i))
            np.testing.assert_array_equal(one.read(i), many.read(i))
        assert describe_changes(take_fingerprint(one), take_fingerprint(many)) == []
    single = open_source(f"pack:{files[0]}")
    assert 0 < len(single) < 9


def test_shards_are_continued_and_a_damaged_one_costs_its_images_alone(folder, tmp_path):
    path = tmp_path / "x.pack"
    files = [tmp_path / f"x-{i:05d}-of-00003.pack" for i in range(3)]
    write_pack(splits(folder), path, Encoding("jpeg", 48), name=folder, shards=3)
    data, whole = [file.read_bytes() for file in files], good(open_source(f"pack:{path}"))
    files[1].rename(tmp_path / "x-00001-of-00003.pack.part")
    (tmp_path / "x-00001-of-00003.pack.part").write_bytes(data[1][: len(data[1]) // 2])
    files[2].unlink()
    with pytest.raises(ValueError, match=r"data: 2 of the 3 shards of .*x\.pack are missing, the first .*-00001-of-"):
        open_source(f"pack:{path}")
    result = write_pack(splits(folder), path, Encoding("jpeg", 48), name=folder, shards=3)
    assert result.continued > 4 and result.images == 13 and [file.read_bytes() for file in files] == data
    files[0].write_bytes(data[0][: len(data[0]) // 2])
    damaged = open_source(f"pack:{path}")
    found = good(damaged)
    assert 0 < len(whole) - len(found) <= 4 and any("the file is cut off" in note for note in damaged.notes)
    assert all(torch.equal(pixels, whole[name][1]) for name, (_, pixels) in found.items())
    files[0].write_bytes(data[0])
    with pytest.raises(ValueError, match=r"-00000-of-00003\.pack was begun with other images or another encoding"):
        write_pack(splits(folder), path, Encoding("rgb", 48), name=folder, shards=3)
    assert files[0].read_bytes() == data[0]
    (tmp_path / "x-00000-of-00002.pack").write_bytes(data[0])
    with pytest.raises(ValueError, match=r"has shards of several calls, of 2 and 3 files"):
        open_source(f"pack:{path}")
    with pytest.raises(ValueError, match=r"--shards must be at most the number of images, 14, got 15"):
        write_pack(splits(folder), tmp_path / "y.pack", Encoding(), shards=15)


def test_captions_and_bad_images_of_shards(tmp_path):
    """A shard may hold no image at all, when none of its own can be decoded."""

    class Broken(WithExtras):
        def read(self, index):
            if index < 2:
                raise BadImage(f"{index}: broken")
            return super().read(index)

    write_pack({"train": Broken(6)}, tmp_path / "x.pack", Encoding("copy"), shards=3)
    pack = open_source(f"pack:{tmp_path / 'x.pack'}")
    assert [identity(pack, i) for i in range(4)] == [f"\udcff{i}" for i in range(2, 6)]
    assert [pack.extras(i)["tokens"].tolist() for i in range(4)] == [[i, i + 1, i + 2] for i in range(2, 6)]
    assert pack.notes == ("2 of 6 images could not be decoded when the pack was written",)
    with pytest.raises(ValueError, match="none of the 2 images"):
        write_pack({"train": Subset(Broken(6), [0, 1])}, tmp_path / "y.pack", Encoding("copy"), shards=2)


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("engine", ["torchvision", "dali"])
def test_ranks_share_the_images_of_a_pack(folder, tmp_path, engine, kind):
    """Over ranks and shards: all images once, with the views that one rank makes."""
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    write_pack(splits(folder), tmp_path / "x.pack", Encoding(kind, 48), shards=2)
    pack = open_source(f"pack:{tmp_path / 'x.pack'}")
    views = find_augmentation("mae", pack, (32, 32))

    def batches(rank, world):
        loader = Loader(pack, views, 4, engine=engine, rank=rank, world=world)
        return {int(i): view for b in loader.epoch(3) for i, view in zip(b.index, b.views[0])}

    alone, first, second = batches(0, 1), batches(0, 2), batches(1, 2)
    assert len(alone) == 8 and not first.keys() & second.keys() and len(first) == len(second) == 4
    for i in alone.keys() & (first | second).keys():
        torch.testing.assert_close(alone[i], (first | second)[i], rtol=0, atol=0)
