"""Sources of captions: drawn shapes, emoji, tables, COCO's files, tar shards, packs; rules for bad captions."""

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli.data_page import Side, page
from fastssl.data.captioned import decode_text
from fastssl.data.findings import scan
from fastssl.data.packing import Encoding, write_pack
from fastssl.data.source import BadImage, has_captions, open_source, read_captions
from fastssl.data.sources import captions as drawn
from fastssl.data.sources import emoji as emoji_source

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def captions_of(source):
    return {Path(source.identity(i)).name: source.captions(i) for i in range(len(source))}


def sentence_of(spec, split="train"):
    with pytest.raises(ValueError) as error:
        open_source(spec, split)
    return str(error.value)


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# Drawn shapes


def test_drawn_captions_name_what_is_drawn():
    source = open_source("captions:count=200,size=48,seed=2")
    for index in range(len(source)):
        pixels = source.read(index).astype(int)
        first = source.captions(index)[0]
        size, hue, shape = first.split()[1:4]
        background, place = first.split()[6], first.partition(", ")[2]
        assert shape == source.classes[source.label(index)]
        assert (pixels[0, 0] < 128).all() == (background == "dark")
        inside = np.argwhere(pixels.max(2) - pixels.min(2) > 60)  # coloured
        middle = (inside.min(0) + inside.max(0)) / 2 / 48
        row, column = place.split()
        assert ("upper", "centre", "lower")[round((middle[0] - 0.26) / 0.24)] == row
        assert ("left", "middle", "right")[round((middle[1] - 0.26) / 0.24)] == column
        extent = (inside.max(0) - inside.min(0)).max() / 48
        assert (extent > 0.33) == (size == "large") or shape in ("heart", "crescent", "bar", "triangle")
        colour = pixels[tuple(np.argwhere(pixels.max(2) - pixels.min(2) > 100).mean(0).round().astype(int))]
        if np.ptp(colour) > 100:  # a ring or crescent has none in the middle
            image = Image.fromarray(colour.astype(np.uint8)[None, None]).convert("HSV")
            turn = np.asarray(image)[0, 0, 0] / 255 * 360 - drawn.HUES[hue]
            assert abs((turn + 180) % 360 - 180) < 12, (first, colour)
        assert len(source.captions(index)) == 3 and all(shape in text for text in source.captions(index))


def test_no_two_test_images_have_the_same_caption():
    test = open_source("captions:seed=7", "test")
    texts = [text for i in range(len(test)) for text in test.captions(i)]
    assert len(set(texts)) == len(texts) == 3_000
    assert len({open_source("captions").captions(i)[0] for i in range(4_096)}) > 2_000
    assert np.bincount([test.label(i) for i in range(1_000)]).tolist() == [100] * 10


def test_drawn_images_follow_split_seed_and_number():
    def pixels(spec, split="train"):
        source = open_source(spec, split)
        return [source.read(i).tobytes() for i in range(5)]

    assert pixels("captions:count=5") == pixels("captions:count=50")
    assert len({*pixels("captions"), *pixels("captions:seed=1"), *pixels("captions", "test")}) == 15
    assert len(open_source("captions:count=7,size=16")) == 7 and open_source("captions:size=16", "test").size == (
        16,
        16,
    )
    assert sentence_of("captions:size=4") == "data: captions takes a size from 8 to 2,048, got 'size=4'"
    assert sentence_of("captions:sise=4") == "data: captions takes count=N, size=N and seed=N, got 'sise=4'"


def test_check_and_show_tell_of_captions():
    source = open_source("captions:count=20")
    blocks = list(page({"training": Side(source, scan(source))}, []))
    rows = dict(zip(*(list(column.cells) for column in blocks[0].columns)))
    assert str(rows["captions of an image"]) == "3" and str(rows["without a caption"]) == "0"
    assert str(rows["words of a caption"]) == "10 to 13, median 10"
    assert "caption  a small red disc on a light background, upper middle" in str(blocks[-1])
    digits = open_source("digits")
    without = list(page({"training": Side(digits, scan(digits))}, []))
    assert "without a caption" not in list(without[0].columns[0].cells)


# Emoji

FONT = next((path for path in emoji_source.FONTS if Path(path).is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(not FONT or not importlib.util.find_spec("emoji"), reason="needs the font and the package emoji")
def test_emoji_have_their_names():
    train, test = open_source("emoji:size=32"), open_source("emoji:size=32", "test")
    assert len(train) + len(test) > 3_000 and 0.19 < len(test) / (len(train) + len(test)) < 0.21
    names = [source.captions(i)[0] for source in (train, test) for i in range(len(source))]
    assert {"grinning face", "Japan", "thumbs up dark skin tone"} <= set(names)
    images = {train.read(i).tobytes() for i in range(len(train))}
    assert len(images) == len(train) and train.read(0).shape == (32, 32, 3)
    german = open_source("emoji:size=32,language=de")
    assert "esel" in {german.captions(i)[0] for i in range(len(german))}
    assert sentence_of("emoji:language=xx").startswith("data: emoji has names in en, es,")


def test_emoji_says_what_is_missing(tmp_path, monkeypatch):
    assert sentence_of(f"emoji:font={tmp_path}/no.ttf") == (
        f"data: emoji needs the font {tmp_path}/no.ttf, which is missing: apt-get install fonts-noto-color-emoji "
        "(Debian, Ubuntu), or emoji:font=PATH of NotoColorEmoji.ttf"
    )
    assert sentence_of("emoji:size=4") == "data: emoji takes a size from 8 to 128, got 4"
    assert sentence_of("emoji:colour=red").startswith("data: emoji takes size=N, language=CODE and font=PATH, got")
    if importlib.util.find_spec("emoji"):
        (tmp_path / "x.ttf").write_bytes(b"no font")
        assert "must be a NotoColorEmoji.ttf" in sentence_of(f"emoji:font={tmp_path}/x.ttf")


# Tables


def write_table(path, rows, delimiter=",", encoding="utf-8"):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    path.write_bytes(buffer.getvalue().encode(encoding, "surrogateescape"))
    for row in rows[1:]:
        if (target := path.parent / row[0]).suffix == ".jpg":
            target.write_bytes(jpeg())


def rows_of(count):
    return [("filepath", "title"), *((f"{i}.jpg", f"caption {i}, of a dog") for i in range(count))]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_paths_and_captions(tmp_path, kind, encoding):
    rows = [*rows_of(10), ("3.jpg", "a second – Ünïcode")]
    write_table(tmp_path / "x", rows, "," if kind == "csv" else "\t", encoding)
    train, test = open_source(f"{kind}:{tmp_path}/x"), open_source(f"{kind}:{tmp_path}/x", "test")
    found = captions_of(train) | captions_of(test)
    assert found == {
        f"{i}.jpg": (f"caption {i}, of a dog", *(("a second – Ünïcode",) if i == 3 else ())) for i in range(10)
    }
    assert (len(train), len(test), train.notes, train.classes) == (8, 2, (), None)
    assert train.read(0).tobytes() == jpeg() and train.name(0) == str(tmp_path / train.identity(0))


def test_columns_and_splits_of_a_table(tmp_path):
    rows = [("id", "Img", "words", "Split")]
    rows += [(str(i), f"{i}.jpg", f"caption {i}", ("train", "val", "test", "restval")[i % 4]) for i in range(8)]
    write_table(tmp_path / "x.csv", rows)
    spec = f"csv:{tmp_path}/x.csv::caption=words"
    assert [*captions_of(open_source(spec))] == ["0.jpg", "4.jpg"]
    assert [*captions_of(open_source(spec, "test"))] == ["2.jpg", "6.jpg"]
    assert sentence_of(f"csv:{tmp_path}/x.csv") == (
        f"data: {tmp_path}/x.csv must begin with the names of its columns and have one of captions (::caption=NAME "
        "names it), such as caption or title, got id, Img, words, Split"
    )
    assert sentence_of(f"csv:{tmp_path}/x.csv::caption=no").endswith("got id, Img, words, Split without no")


def test_bad_captions_of_a_table_are_counted(tmp_path):
    rows = [*rows_of(6), ("6.jpg", ""), ("7.jpg", " \t "), ("8.jpg", "\udcff\udcfe latin"), ("0.jpg", ""), ("9.jpg",)]
    write_table(tmp_path / "x.csv", rows)
    source = open_source(f"csv:{tmp_path}/x.csv")
    assert source.notes == (
        "1 row has too few fields and is passed over",
        "captions that do not count: 3 are blank and 1 is not UTF-8",
        "3 of 9 images have no caption and are left out",
    )
    assert len(source) + len(open_source(f"csv:{tmp_path}/x.csv", "test")) == 6


def test_tables_that_cannot_be_used_get_a_sentence(tmp_path):
    path = tmp_path / "x.csv"
    assert sentence_of(f"csv:{path}") == f"data: {path} does not exist"
    assert sentence_of("csv") == "data: csv needs a table of paths and captions: csv:FILE"
    assert "can't be read" in sentence_of(f"tsv:{tmp_path}")
    path.write_text("")
    assert sentence_of(f"csv:{path}").endswith("got an empty file")
    path.write_text("path,caption\nx.jpg,a dog\n")
    assert sentence_of(f"csv:{path}").startswith(f"data: csv:{path} must have two images with captions or more")
    path.write_text("path,caption\nx.jpg," + "a" * 2_000_000)
    assert sentence_of(f"csv:{path}").startswith(f"data: {path} is no table: line 2: field larger than field limit")
    path.write_text("path,caption\na\0b.jpg,x\ngone.jpg,y\n/etc,z\n")
    bad = 0
    for split in ("train", "test"):
        source = open_source(f"csv:{path}", split)
        for i in range(len(source)):
            with pytest.raises(BadImage):
                source.read(i)
            bad += 1
    assert bad == 3


def test_quotes_of_a_tsv_need_not_be_pairs(tmp_path):
    lines = ["path\tcaption", '0.jpg\t"The end" he said', '1.jpg\t"a ""red"" star"', '2.jpg\t5" screen']
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    source = open_source(f"tsv:{tmp_path}/x.tsv"), open_source(f"tsv:{tmp_path}/x.tsv", "test")
    found = captions_of(source[0]) | captions_of(source[1])
    assert found == {"0.jpg": ('"The end" he said',), "1.jpg": ('a "red" star',), "2.jpg": ('5" screen',)}


def test_text_of_other_encodings():
    assert decode_text("é".encode("utf-16")) == decode_text(b"\xef\xbb\xbf\xc3\xa9") == decode_text(b"\xc3\xa9") == "é"
    assert decode_text("é".encode("utf-16-be").join([b"\xfe\xff", b""])) == "é"
    assert decode_text(b"\xe9") == "\udce9" and decode_text(b"\xff\xfea") == "\udcff\udcfea"


# COCO


def write_coco(root, split, count=6, annotations=None):
    (root / split).mkdir(parents=True)
    for i in range(count):
        (root / split / f"{i}.jpg").write_bytes(jpeg())
    if annotations is None:
        annotations = [
            {"image_id": i, "caption": f"{word} {i} of {split}"} for word in ("one", "two") for i in range(count)
        ]
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"captions_{split}.json"
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_coco_has_several_captions_an_image(tmp_path):
    for split in ("train2017", "val2017"):
        path = write_coco(tmp_path, split)
    train, test = open_source(f"coco:{tmp_path}"), open_source(f"coco:{tmp_path}", "test")
    for source, split in ((train, "train2017"), (test, "val2017")):
        assert captions_of(source) == {f"{i}.jpg": (f"one {i} of {split}", f"two {i} of {split}") for i in range(6)}
        assert source.read(3).tobytes() == jpeg() and source.name(3) == f"{tmp_path}/{split}/3.jpg"
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    assert sentence_of(f"coco:{path}").endswith("beside it or above: name it (coco:FILE.json::images=FOLDER)")
    halves = [open_source(f"coco:{path}::images={tmp_path}/elsewhere", split) for split in ("train", "test")]
    assert len(open_source(f"coco:{path}::images=../elsewhere")) == len(halves[0])
    assert sorted(map(len, halves)) == [1, 5] and halves[0].read(0).tobytes() == jpeg()


def test_bad_files_of_coco_get_a_sentence(tmp_path):
    annotations = [{"image_id": 0, "caption": "a dog"}, {"image_id": 1}, {"image_id": 2, "caption": "\ud800"}]
    path = write_coco(tmp_path, "train2017", 4, annotations)
    source = open_source(f"coco:{tmp_path}")
    assert source.notes == (
        "captions that do not count: 1 is no text and 1 is not UTF-8",
        "3 of 4 images have no caption and are left out",
    )
    assert sentence_of(f"coco:{tmp_path}", "test") == (
        f"data: {tmp_path} must have one annotations/captions_val*.json, got captions_train2017.json: name one "
        "(coco:FILE.json)"
    )
    for content in ("[]", "{", "[" * 100_000, '{"images": [{"id": 1}], "annotations": []}', '{"images": 3}'):
        path.write_text(content)
        assert sentence_of(f"coco:{path}").startswith(f"data: {path} must be COCO's JSON with images (id, file_name)")
    assert sentence_of(f"coco:{tmp_path}/no.json") == f"data: {tmp_path}/no.json does not exist"


# Tar shards and packs


def test_captions_of_tar_shards(tmp_path):
    texts = {
        "0.txt": b"a dog\n",
        "1.json": json.dumps({"caption": "a cat", "url": "x"}).encode(),
        "2.json": json.dumps({"captions": ["one", "two", ""]}).encode(),
        "3.txt": "Ü".encode("utf-16"),
        "4.txt": b"of the text",
        "4.json": json.dumps({"caption": "of the JSON"}).encode(),
        "5.txt": b" ",
        "6.txt": b"\xe9t\xe9",
        "7.json": b'{"url": "x"}',
        "8.json": b"{" * 1_000,
        "9.txt": b"x" * (2**20 + 1),
        "a.txt": b"\n",
        "a.json": json.dumps({"caption": "behind a blank text"}).encode(),
        "b.json": json.dumps({"caption": "before a blank text"}).encode(),
        "b.txt": b"",
        "c.json": json.dumps({"caption": "of the JSON"}).encode(),
        "c.txt": b"of the later text",
    }
    members = {f"{i}.jpg": jpeg() for i in "0123456789abc"} | texts
    shard(tmp_path / "train-0.tar", members)
    shard(tmp_path / "val-0.tar", {"0.jpg": jpeg(), "0.txt": b"held out"})
    expected = {0: ("a dog",), 1: ("a cat",), 2: ("one", "two"), 3: ("Ü",), 4: ("of the text",)}
    expected |= {10: ("behind a blank text",), 11: ("before a blank text",), 12: ("of the later text",)}
    for _ in range(2):  # from the tar, then from the cache
        source = open_source(f"webdataset:{tmp_path}")
        assert [source.captions(i) for i in range(13)] == [expected.get(i, ()) for i in range(13)]
        assert source.notes[:2] == (
            "images are the members .jpg (13); passed over: .json (4), .txt (3) (::image_key=EXTENSION for another "
            "image)",
            "captions that do not count: 4 are blank and 1 is not UTF-8",
        )
        assert open_source(f"webdataset:{tmp_path}", "test").captions(0) == ("held out",)


def test_of_shards_with_captions_and_no_labels_a_fifth_is_held_out(tmp_path):
    shard(
        tmp_path / "x.tar",
        {f"{i}.{kind}": data for i in range(20) for kind, data in (("jpg", jpeg()), ("txt", b"a dog"))},
    )
    train, test = (open_source(f"webdataset:{tmp_path}/x.tar", split) for split in ("train", "test"))
    assert (len(train), len(test), train.classes, train.notes) == (16, 4, None, ())
    assert not {train.identity(i) for i in range(16)} & {test.identity(i) for i in range(4)}


@pytest.mark.parametrize("shards", [1, 3])
def test_packs_keep_captions(tmp_path, shards):
    rows = [*rows_of(10), ("3.jpg", "second")]
    write_table(tmp_path / "x.csv", rows)
    sources = {split: open_source(f"csv:{tmp_path}/x.csv", split) for split in ("train", "test")}
    write_pack(sources, tmp_path / "x.pack", Encoding("copy"), shards=shards)
    for split, source in sources.items():
        packed = open_source(f"pack:{tmp_path}/x.pack", split)
        assert has_captions(packed) and captions_of(packed) == captions_of(source)
    if shards == 1:  # cut off: the captions are read from the records
        data = (tmp_path / "x.pack").read_bytes()
        (tmp_path / "x.pack").write_bytes(data[:-10])
        assert captions_of(open_source(f"pack:{tmp_path}/x.pack")) == captions_of(sources["train"])
    digits = {split: open_source("digits", split) for split in ("train", "test")}
    write_pack(digits, tmp_path / "digits.pack", Encoding("rgb"))
    assert not has_captions(open_source(f"pack:{tmp_path}/digits.pack"))
    assert read_captions(open_source(f"pack:{tmp_path}/digits.pack"), 0) == ()
