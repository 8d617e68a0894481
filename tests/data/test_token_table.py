"""Tokens of captions in batches: the same with every engine, number of workers and resumed run; the cached table."""

import fcntl
import os
import threading

import numpy as np
import pytest
import torch

import fastssl
from fastssl.data.draws import mix
from fastssl.data.loader import Loader
from fastssl.data.source import BadSource, Source, cache_folder, has_captions, open_source, read_captions
from fastssl.data.text import TextInput
from fastssl.data.token_table import build_table, with_captions
from fastssl.data.tokenizers import build_tokenizer, clip
from fastssl.extras import MissingExtra
from tests.data.test_loader import Numbers
from tests.support import toy_text_method
from tests.support.loaders import digest, engines, plain

BERT = build_tokenizer("bert")
INPUT = TextInput("bert", 16)
METHOD = "tests.support.toy_text_method"


class Told(Numbers):
    """`Numbers` of which image i has the captions that `texts` gives it."""

    def __init__(
        self, count, bad=(), encoded=False, texts=lambda i: tuple(f"{word} {i}" for word in ("a", "the", "one dog"))
    ):
        super().__init__(count, bad, encoded)
        self.texts = texts

    def captions(self, index):
        return self.texts(index)


def words(row):
    return BERT.decode(row.tolist())


def test_a_batch_has_a_caption_of_each_image_which_its_seed_chooses():
    source = open_source("captions:count=64")
    table = build_table(source, TextInput("clip", 77))
    clip, index = build_tokenizer("clip"), torch.tensor([3, 60, 3, 0])
    seen = set()
    for epoch in range(20):
        tokens = table.gather(index, torch.from_numpy(mix(5, epoch, index.numpy())))
        assert tokens.dtype == torch.int64 and tokens.shape == (4, 16)  # the longest has 13 to 16 tokens
        assert torch.equal(tokens[0], tokens[2])
        for image, row in zip(index.tolist(), tokens):
            captions = [clip.encode(text) for text in source.captions(image)]
            ids = row.tolist()[: row.tolist().index(49_407) + 1]
            assert ids in captions and not row[len(ids) :].any()
            seen.add((image, captions.index(ids)))
    assert len(seen) == 3 * 3  # each phrasing comes


def test_padding_is_to_the_longest_in_steps_of_eight():
    source = Told(4, texts=lambda i: ("dog " * (1, 5, 7, 100)[i],))
    lengths = [
        build_table(source, INPUT).gather(torch.tensor([i]), torch.zeros(1, dtype=torch.int64)).shape[1]
        for i in range(4)
    ]
    assert lengths == [8, 8, 16, 16]
    table = build_table(source, TextInput("bert", 21, trim=False))
    rows = table.gather(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    assert rows.shape == (4, 21) and rows[0].tolist() == [101, 3899, 102] + [0] * 18
    assert rows[3].tolist() == [101] + [3899] * 19 + [102]
    assert table.notes() == ("1 of 4 captions is cut to 21 tokens, the longest has 102",)
    assert build_table(Told(4), INPUT).notes() == ()


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_tokens_belong_to_the_images_of_a_batch(engine, workers, encoded):
    """Images 3 and 11 can't be decoded; those that fill in bring their own captions."""
    source = Told(24, bad=[3, 11], encoded=encoded)
    table = build_table(source, INPUT)
    loader = Loader(source, plain((8, 8)), 8, workers=workers, engine=engine, max_bad=1.0, tokens=table)
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            assert torch.equal(batch.seed, torch.from_numpy(mix(0, epoch, batch.index.numpy())))
            assert torch.equal(batch.extras["tokens"], table.gather(batch.index, batch.seed))
            for index, row in zip(batch.index.tolist(), batch.extras["tokens"]):
                assert words(row) in source.captions(index)


def test_an_epoch_goes_on_with_the_same_tokens_with_any_engine():
    source = open_source("captions:count=40")
    whole = [digest(batch) for batch in Loader(source, plain((8, 8)), 8, tokens=build_table(source, INPUT)).epoch(2)]
    resumed = Loader(source, plain((8, 8)), 8, tokens=build_table(source, INPUT), engine="device").epoch(2, start=3)
    assert [digest(batch) for batch in resumed] == whole[3:]


def test_every_caption_is_made_once(monkeypatch):
    """Ranks that start together wait for the one that makes the table, and find it."""
    made, source = [], Told(50, texts=lambda i: (f"once only {i}",))
    encode = type(BERT).encode

    def counted(self, text, length=None):
        made.append(text)
        return encode(self, text, length)

    monkeypatch.setattr(type(BERT), "encode", counted)
    tables = [None] * 4
    threads = [threading.Thread(target=lambda i=i: tables.__setitem__(i, build_table(source, INPUT))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(f"once only {i}" for i in range(50))
    assert len({table.path for table in tables}) == 1 and isinstance(tables[0].rows, np.memmap)
    assert all(np.array_equal(table.rows, tables[0].rows) for table in tables)
    assert not list(tables[0].path.parent.glob("*.lock"))


def test_other_captions_lengths_and_tokenizers_have_other_tables():
    inputs = (INPUT, TextInput("bert", 17), TextInput("bert", 16, separator=False), TextInput("bert", 16, clean=True))
    paths = [build_table(Told(5), text).path for text in (*inputs, TextInput("clip", 16))]
    paths += [build_table(Told(5, texts=texts), INPUT).path for texts in (lambda i: ("a",), lambda i: ("a", "b"))]
    joined, split = (
        build_table(Told(2, texts=lambda i, t=t: t[i]), INPUT).path
        for t in ((("a", "b"), ("c",)), (("a",), ("b", "c")))
    )
    assert len({*paths, joined, split}) == 9
    assert build_table(Told(5), INPUT).path == paths[0]
    padded = build_table(Told(5), TextInput("bert", 16, trim=False))
    assert padded.path == paths[0]  # only the batches differ


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "pipe"])
def test_a_damaged_table_is_made_anew(damage):
    source = Told(6, texts=lambda i: (f"{damage} {i}",))
    table = build_table(source, INPUT)
    expected, path = np.array(table.rows), table.path
    del table
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "text":
        path.write_text("no table")
    elif damage == "shape":
        np.save(path, expected[:, :-1])
    else:
        path.unlink()
        os.mkfifo(path)
    assert np.array_equal(build_table(source, INPUT).rows, expected)


def test_ids_beyond_the_vocabulary_are_refused():
    table = build_table(Told(6), INPUT)
    rows = np.array(table.rows)
    rows[:, 2] = 30_522
    table.rows = rows
    with pytest.raises(ValueError, match=r"^data: .*tokens-\w+\.npy, a cached table of tokens, is damaged: remove it$"):
        table.gather(torch.arange(6), torch.arange(6))


@pytest.mark.parametrize("place", ["a file", "no locks"])
def test_without_a_cache_the_table_is_in_memory(tmp_path, monkeypatch, place):
    if place == "a file":
        (tmp_path / "taken").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    table = build_table(Told(6), INPUT)
    assert isinstance(table.rows, np.memmap) == (place == "no locks")
    told = [note for note in table.notes() if "of each rank's memory" in note]
    assert len(told) == (place == "a file") and all(str(tmp_path / "taken") in note for note in told)
    assert words(table.gather(torch.tensor([4]), torch.tensor([0]))[0]) in Told(6).captions(4)


# Bad captions


def test_images_without_a_caption_are_left_out_and_counted():
    source = Told(10, texts=lambda i: () if i % 3 == 0 else ("", " \n", f"a dog {i}"))
    source.shards, source.notes = np.array([0, 4, 4, 10]), ("a note",)
    kept = with_captions(source)
    assert kept.notes == ("a note", "4 of 10 training images have no caption and are left out")
    assert [kept.name(i) for i in range(len(kept))] == [f"image {i}" for i in (1, 2, 4, 5, 7, 8)]
    assert kept.shards.tolist() == [0, 2, 2, 6]
    assert read_captions(kept, 2) == ("a dog 4",)
    whole = Told(3)
    assert with_captions(whole) is whole


def test_captions_that_are_no_texts_get_a_sentence():
    with pytest.raises(BadSource) as error:
        read_captions(Told(3, texts=lambda i: "a dog"), 1)
    assert str(error.value) == "data: captions of an image must be a tuple of texts, got 'a dog' for image 1"
    for wrong in ((b"a dog",), (3,), None):
        with pytest.raises(BadSource, match=r"^data: captions of an image must be a tuple of texts, got"):
            read_captions(Told(3, texts=lambda i, wrong=wrong: wrong), 1)


def test_extras_with_the_name_of_tokens_are_refused():
    source = Told(8)
    source.extras = lambda i: {"tokens": np.zeros(3, np.int64)}
    with pytest.raises(BadSource, match=r"^data: extras of a source with captions must have other keys than tokens$"):
        next(Loader(source, plain((8, 8)), 4, tokens=build_table(source, INPUT)).epoch(0))


# Runs

FAST = {"device": "cpu", "workers": 0, "batch_size": 16, "warmup_epochs": 0.0, "knn_every": 0}


def test_data_without_captions_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError) as error:
        fastssl.pretrain(METHOD, "shapes:count=64", folder=tmp_path / "run", **FAST)
    sentence = "data: this method learns from images and text, and no image of the data has a caption: use captions, "
    assert str(error.value).startswith(sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocabulary": 9}, "pretrain: --vocabulary must be at least 49,408, the tokens of the tokenizer clip, got 9"),
        ({"text_length": 1}, "pretrain: --text-length must be at least 2 and at most 65535, got 1"),
    ],
)
def test_tokens_beyond_the_methods_embeddings_are_refused_before_anything_is_written(tmp_path, options, sentence):
    with pytest.raises(ValueError) as error:
        fastssl.pretrain("clip", "captions:count=64", folder=tmp_path / "run", **options, **FAST)
    assert str(error.value) == sentence
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_trains_with_the_same_captions(tmp_path, capsys, monkeypatch):
    data = open_source("captions:count=64"), Told(16)
    options = {"epochs": 2, "tokens": 10, "checkpoint_every": 3, **FAST}  # 4 steps an epoch
    whole = fastssl.pretrain(toy_text_method, data, folder=tmp_path / "whole", **options)
    assert "192 of 192 captions are cut to 10 tokens, the longest has 17" in capsys.readouterr().out
    forward, calls = toy_text_method.Matching.forward, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 6:
            raise ValueError("stopped")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(toy_text_method.Matching, "forward", interrupted)
        with pytest.raises(ValueError, match="stopped"):
            fastssl.pretrain(toy_text_method, data, folder=tmp_path / "half", **options)
    half = fastssl.pretrain(resume=tmp_path / "half", data=data)
    assert "resuming after step 3 (epoch 0.75)" in capsys.readouterr().out
    states = [run.state()["model"] for run in (whole, half)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_captions_of_the_same_images_are_named(tmp_path):
    folder, test = tmp_path / "run", Told(16)
    fastssl.pretrain(toy_text_method, (Told(32), test), folder=folder, epochs=1, **FAST)
    changed = Told(32, texts=lambda i: ("another",) if i in (4, 6) else Told(32).captions(i))
    with pytest.raises(ValueError, match=r'started with: 2 with other captions \("image \d", "image \d"\); name the'):
        fastssl.pretrain(resume=folder, data=(changed, test), epochs=2)
    fastssl.pretrain(resume=folder, data=(changed, test), epochs=2, allow_changed_data=True)


def test_a_source_has_captions_only_if_an_image_has_one():
    class Silent(Source):
        def __len__(self):
            return 3

        def captions(self, index):
            return ("",)

    assert has_captions(Told(3)) and not has_captions(Silent()) and not has_captions(Numbers(3))
    assert not has_captions(open_source("digits"))


def test_without_ftfy_a_table_that_needs_it_is_refused_and_nothing_is_left(monkeypatch):
    def missing(package, what, extra):
        raise MissingExtra(f"{what} needs {package}: pip install 'fastssl-engine[{extra}]'")

    monkeypatch.setattr(clip, "need", missing)
    source = Told(4, texts=lambda i: (f"un café {i}",))
    before = sorted(cache_folder().glob("tokens-*"))
    with pytest.raises(MissingExtra) as error:
        build_table(source, TextInput("clip", 77))
    assert str(error.value) == (
        "the tokenizer clip, for text with more than plain ASCII, needs ftfy: pip install 'fastssl-engine[text]'"
    )
    assert sorted(cache_folder().glob("tokens-*")) == before
    assert len(build_table(source, INPUT).rows) == 4
