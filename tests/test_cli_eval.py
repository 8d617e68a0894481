"""`fastssl eval`: kNN, linear and fine-tuned accuracy of a run, their records, one sentence for each mistake."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fastssl
from fastssl import evaluation
from fastssl.data.source import Subset, open_source
from fastssl.eval.features import extract
from fastssl.eval.knn import knn_accuracy
from fastssl.evaluation import note_knn
from fastssl.methods import barlow_twins
from fastssl.run import open_run
from tests.support.command import refused, run
from tests.support.ranks import run_ranks
from tests.support.runs import make_run

TINY = ["--data", "digits", "--epochs", "1", "--batch-size", "512", "--decoder-depth", "1", "--image-size", "8", "8"]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """One thread: a second one on a busy core slows small steps down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("fastssl.machine.cores", lambda: 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "mae"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("fastssl.machine.cores", lambda: 1)
        run(monkeypatch, "pretrain", "mae", *TINY, "--folder", folder)
    return folder


@pytest.fixture
def folder(pretrained, tmp_path):
    """A copy of the run for the records of evaluations."""
    return shutil.copytree(pretrained, tmp_path / "mae")


def noted(folder, evaluation):
    lines = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    return [line for line in lines if line["evaluation"] == evaluation]


def test_knn(monkeypatch, capsys, folder):
    (online,) = [line for line in noted(folder, "knn") if line["step"] > 0]
    run(monkeypatch, "eval", "knn", folder)
    of_k = {line["k"]: line for line in noted(folder, "knn") if line["step"] > 0}
    assert list(of_k) == [10, 20, 200]
    assert of_k[20] == online  # the same question has one line
    said = " · ".join(f"k={k} {line['accuracy']:.1%}" for k, line in of_k.items())
    assert capsys.readouterr().out == f"kNN accuracy of {folder} on digits: {said}\n"
    run(monkeypatch, "eval", "knn", folder, "--k", "1", "--tau", "0.1", "--data", "shapes:count=40")
    (line,) = [line for line in noted(folder, "knn") if line["data"] != "digits"]
    assert 1 <= line.pop("rankme") <= 128 and 0 < line.pop("two_directions") <= 1 and 0 < line.pop("deviation") <= 1
    assert {**line, "accuracy": 0} == {
        "evaluation": "knn",
        "step": 2,
        "data": "shapes:count=40",
        "epoch": 1.0,
        "k": 1,
        "tau": 0.1,
        "accuracy": 0,
    }


def test_few_labels(monkeypatch, capsys, folder):
    """A number of labels, as many of each class, is noted with the seed that drew them."""
    for words in ([], ["--labels", "20"], ["--labels", "20", "--seed", "1"]):
        run(monkeypatch, "eval", "knn", folder, "--k", "5", *words)
    whole, few, other = (line for line in noted(folder, "knn") if line["k"] == 5)
    assert (few["labels"], few["seed"], other["seed"]) == (20, 0, 1)
    assert whole["accuracy"] > few["accuracy"] != other["accuracy"]
    assert "labels" not in whole
    assert capsys.readouterr().out.splitlines()[1].endswith("(20 labels, seed 0)")


def test_linear(monkeypatch, capsys, folder):
    fast = ["--epochs", "5", "--optimizers", "sgd", "lbfgs"]
    run(monkeypatch, "eval", "linear", folder, *fast)
    run(monkeypatch, "eval", "linear", folder, *fast, "--pool", "avg", "--labels", "0.1", "--seed", "1")
    whole, few = noted(folder, "linear")
    assert whole["accuracy"] > 0.8
    assert few["accuracy"] < whole["accuracy"] < whole["top5"]
    assert (whole["protocol"], whole["labels"], whole["step"], whole["epoch"]) == ("features", 1.0, 2, 1.0)
    assert (few["labels"], few["seed"], few["pool"]) == (0.1, 1, "avg")
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"linear accuracy of {folder} on digits: top-1 {whole['accuracy']:.1%}, top-5 {whole['top5']:.1%} "
        f"(features, {whole['setting']})"
    )
    assert second.endswith("0.1 of the labels, seed 1)")


def test_linear_by_the_official_protocol(monkeypatch, folder):
    run(
        monkeypatch,
        "eval",
        "linear",
        folder,
        "--protocol",
        "official",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--batch-size",
        "64",
        "--lr",
        "0.2",
        "--optimizer",
        "sgd",
    )
    (line,) = noted(folder, "linear")
    assert (line["protocol"], line["epochs"], line["warmup_epochs"]) == ("official", 1, 0)
    assert (line["batch_size"], line["lr"], line["optimizer"]) == (64, 0.2, "sgd")
    assert "weight_decay" not in line  # only what was asked to differ from the paper
    assert line["accuracy"] > 0.2


def test_finetune(monkeypatch, folder):
    run(
        monkeypatch,
        "eval",
        "finetune",
        folder,
        "--labels",
        "0.1",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0.5",
        "--batch-size",
        "32",
    )
    (line,) = noted(folder, "finetune")
    assert (line["labels"], line["seed"], line["epochs"], line["data"]) == (0.1, 0, 2, "digits")
    assert line["accuracy"] > 0.11


def test_few_labels_in_numbers(monkeypatch, capsys, folder):
    """A line for each row and number of labels; the table, and one sentence on it."""
    words = ["--counts", "100", "10", "5000", "--draws", "2", "--steps", "2", "--seed", "4"]
    run(monkeypatch, "eval", "few-labels", folder, *words)
    said, lines = capsys.readouterr().out, noted(folder, "few labels")
    assert said.startswith("eval few-labels: 5,000 labels are left out, as counts go from the 10 classes to the 1,438")
    assert "mean ± standard deviation over 2 draws of the labels" in said
    rows = [(line["start"], line["classifier"], line["labels"]) for line in lines]
    assert len(rows) == len(set(rows)) == 12
    assert {line["labels"] for line in lines} == {10, 100}
    for line in lines:
        assert (line["seed"], line["draws"], line["steps"], line["step"], line["data"]) == (4, 2, 2, 2, "digits")
        assert "lr" not in line and len(line["accuracies"]) == 2
        assert line["accuracy"] == pytest.approx(np.mean(line["accuracies"]))
        assert line["spread"] == pytest.approx(np.std(line["accuracies"], ddof=1))
        assert f"{line['accuracy']:.1%} ± {line['spread']:.1%}" in said
    of = {row: line["accuracies"] for row, line in zip(rows, lines)}
    assert min(of["raw pixels", "knn", 100]) > 0.8
    assert said.splitlines()[-1].startswith("With 100 labels, training from scratch reaches ")
    again = open_run(folder).few_labels(counts=[10], draws=1, steps=2, seed=5)
    assert all(result.accuracies == (of[(*result.row, 10)][1],) for result in again)  # the second draw, alone


def test_help(monkeypatch, capsys, pretrained):
    run(monkeypatch, "eval", "--help")
    out = capsys.readouterr().out
    assert [line.split("RUN")[0].strip() for line in out.splitlines() if "RUN  " in line] == [
        "fastssl eval knn",
        "fastssl eval linear",
        "fastssl eval finetune",
        "fastssl eval few-labels",
        "fastssl eval zeroshot",
        "fastssl eval retrieval",
    ]
    for words, shown in {
        ("knn",): "--k",
        ("linear",): "--optimizers",
        ("linear", "--protocol", "official", pretrained): "--batch-size INT images per step (default: 16384)",
        ("few-labels",): "those that the data cannot have are left out (default: 10 100 1000)",
        ("finetune",): "--batch-size INT images per step (default: 1024)",
        ("finetune", pretrained): "--batch-size INT images per step (default: 64)",  # the run's images are small
    }.items():
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, "eval", *words, "--help")
        assert shown in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_mistakes_get_one_sentence(monkeypatch, tmp_path, pretrained):
    name = "eval: name an evaluation: knn, linear, finetune, few-labels, zeroshot or retrieval, got"
    refused(monkeypatch, f"{name} nothing", "eval")
    refused(monkeypatch, f"{name} probe", "eval", "probe", pretrained)
    for command in ("knn", "linear", "finetune", "few-labels"):
        sentence = f"run: {tmp_path} is not a run folder: it has no config.json"
        refused(monkeypatch, sentence, "eval", command, tmp_path)
        unlabelled = tmp_path / "images"
        unlabelled.mkdir(exist_ok=True)
        for i in range(10):
            (unlabelled / f"{i}.png").write_bytes(b"")
        sentence = f"eval: folder:{unlabelled} has no labels to compare with"
        refused(monkeypatch, sentence, "eval", command, pretrained, "--data", f"folder:{unlabelled}")
    for words, sentence in {
        ("knn", "--k", "0"): "--k must be at least 1, got 0",
        ("knn", "--k", "20", "-3"): "--k must be at least 1, got 20 -3",
        ("knn", "--tau", "nan"): "--tau must be above 0, got nan",
        ("linear", "--labels", "0"): "--labels must be above 0, got 0.0",
        ("knn", "--labels", "1.5"): "--labels must be a share of at most 1 or a whole number of labels, got 1.5",
        ("linear", "--labels", "9"): (
            "--labels must be at least the 10 classes and at most the 1438 labelled images, got 9"
        ),
        ("linear", "--seed", "-1"): "--seed must be at least 0, got -1",
        ("linear", "--epochs", "0"): "--epochs must be at least 1, got 0",
        ("linear", "--lrs", "0.1", "inf"): "--lrs must be above 0, got 0.1 inf",
        ("linear", "--protocol", "papers"): "--protocol must be features or official, got 'papers'",
        ("linear", "--protocol", "official"): "--batch-size must be at most the 1438 labelled images, got 16384",
        ("linear", "--protocol", "official", "--epochs", "5", "--warmup-epochs", "10"): (
            "--warmup-epochs must lie before --epochs 5, got 10: lower it or raise --epochs (without --warmup-epochs "
            "the preset's value follows --epochs in proportion)"
        ),
        ("finetune", "--layer-decay", "1.5"): "--layer-decay must be above 0 and at most 1, got 1.5",
        ("finetune", "--erasing", "2"): "--erasing must be at least 0 and at most 1, got 2.0",
        ("finetune", "--batch-size", "64", "--accumulate", "3"): "--batch-size must be divisible by --accumulate 3, "
        "got 64",
        ("few-labels", "--counts", "10", "0"): "--counts must be at least 1, got 10 0",
        ("few-labels", "--draws", "0"): "--draws must be at least 1, got 0",
        ("few-labels", "--scratch-lr", "0"): "--scratch-lr must be above 0, got 0.0",
        ("few-labels", "--seed", "-1"): "--seed must be at least 0, got -1",
        ("finetune", "--lr-drops", "1", "30"): (
            "--lr-drops must lie before --epochs 20, got 30: lower it or raise --epochs (without --lr-drops the "
            "preset's value follows --epochs in proportion)"
        ),
    }.items():
        refused(monkeypatch, f"eval: {sentence}", "eval", words[0], pretrained, *words[1:])


def test_pooling_is_for_vits(monkeypatch, tmp_path):
    run(
        monkeypatch,
        "pretrain",
        "moco_v1",
        "--data",
        "shapes:count=64",
        "--epochs",
        "1",
        "--batch-size",
        "32",
        "--folder",
        tmp_path / "moco",
    )
    sentence = "eval: --pool is for ViTs, and the encoder of MoCo is not one"
    refused(monkeypatch, sentence, "eval", "linear", tmp_path / "moco", "--pool", "avg")


def test_evaluations_for_one_process_refuse_torchrun(monkeypatch, pretrained):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for command in ("eval linear --protocol official", "eval finetune", "eval few-labels"):
        sentence = f"{command} runs in one process: start it without torchrun, as fastssl {command} RUN"
        first, second, *rest = command.split()
        words = [*rest, "--batch-size", "64", *(["--epochs", "20"] if second != "few-labels" else [])]
        refused(monkeypatch, sentence, first, second, pretrained, *words)


def _note_knn(folder):
    torch.manual_seed(3)
    opened = open_run(folder)
    method, before = opened.load().train(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    evaluation.share_cores = lambda workers, device, ranks: 0
    note_knn(opened, method, 0, 0, torch.device("cpu"))
    note_knn(opened, method, 2, 1, torch.device("cpu"))
    return torch.equal(before, torch.random.get_rng_state()), method.training


def test_ranks_write_the_same_records_as_one_process(capsys, folder):
    """Only the first rank writes the record; the random state is unchanged."""
    (folder / "evaluations.jsonl").unlink()
    state = random.getstate()
    assert _note_knn(folder) == (True, False)
    assert random.getstate() == state
    alone = (folder / "evaluations.jsonl").read_text()
    assert "epoch 1 " in capsys.readouterr().out
    (folder / "evaluations.jsonl").unlink()
    assert run_ranks(2, _note_knn, folder) == [(True, False)] * 2
    assert (folder / "evaluations.jsonl").read_text() == alone
    assert len(alone.splitlines()) == 3


def test_the_log_warns_of_redundant_embeddings_but_not_at_the_start(tmp_path, capsys):
    made = make_run(tmp_path / "run", barlow_twins, "digits", redundancy=0.95)
    method = made.load()
    note_knn(made, method, 0, 0, torch.device("cpu"))
    assert "redundant" not in capsys.readouterr().out
    note_knn(made, method, 30, 3, torch.device("cpu"))
    assert "\nwarning: the embeddings look redundant: in epoch 3 the mean" in capsys.readouterr().out


@pytest.fixture
def partly_labelled(tmp_path):
    """`arrays:` sources of the same digits: one with −1 as every third label, one without these images."""
    splits = {"train": open_source("digits"), "test": open_source("digits", "test")}
    files = {name: tmp_path / f"{name}.npz" for name in ("partly", "labelled")}
    for name, path in files.items():
        arrays = {}
        for split, source in splits.items():
            rows = [i for i in range(180) if name == "partly" or i % 3]
            arrays[f"x_{split}"] = np.stack([source.read(i) for i in rows])
            arrays[f"y_{split}"] = np.array([source.label(i) if i % 3 else -1 for i in rows])
        np.savez(path, **arrays)
    return {name: f"arrays:{path}" for name, path in files.items()}


def test_images_without_a_label_are_left_out(capsys, folder, partly_labelled):
    """Every evaluation has the result that it has without these images, and says how many there are."""
    opened, results = open_run(folder), {}
    for name, data in partly_labelled.items():
        finetuned = opened.finetune(data=data, epochs=1, warmup_epochs=0, batch_size=60, labels=0.5)
        results[name] = (opened.knn(5, data=data), opened.linear(data=data, epochs=2), finetuned)
        said = capsys.readouterr().out
        for split in ("training", "held-out"):
            sentence = f"eval: 60 of 180 images of the {split} split have no label and are left out\n"
            assert said.count(sentence) == 3 * (name == "partly")
    assert results["partly"] == results["labelled"]


def test_knn_during_a_run_leaves_images_without_a_label_out(capsys, monkeypatch, tmp_path, partly_labelled):
    words = ["--data", partly_labelled["partly"], *TINY[2:], "--batch-size", "60", "--folder", tmp_path / "run"]
    run(monkeypatch, "pretrain", "mae", *words)
    said = capsys.readouterr().out
    assert "1 epochs of 180 images (120 held-out images for kNN)" in said
    raw = [line for line in noted(tmp_path / "run", "knn of raw pixels")]
    pixels = knn_of_pixels(open_run(tmp_path / "run"), partly_labelled["labelled"])
    assert [line["accuracy"] for line in raw] == [pixels]


def knn_of_pixels(opened, data):
    """kNN accuracy (k = 20) of raw pixels."""
    tables = [extract(lambda x: x.flatten(1), open_source(data, split), (8, 8)) for split in ("train", "test")]
    return knn_accuracy(*tables[0][:2], *tables[1][:2])[20]


def test_a_split_without_labels_is_named(monkeypatch, tmp_path, pretrained, capsys):
    for path in ("train/cat/0.png", "train/dog/1.png", "val/2.png", "val/3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    sentence = (
        f"eval: the held-out split of folder:{tmp_path} has no labels to compare with, the other one has; val: there "
        "are no labels, as the images are in no folder: 2 of 2"
    )
    for command in ("knn", "linear", "finetune", "few-labels"):
        refused(monkeypatch, sentence, "eval", command, pretrained, "--data", f"folder:{tmp_path}")
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "val" / "4.png")
    (tmp_path / "train" / "cat").rmdir()
    sentence = f"eval: folder:{tmp_path} has no labels to compare with"
    refused(monkeypatch, sentence, "eval", "knn", pretrained, "--data", f"folder:{tmp_path}")


def test_a_run_on_a_test_split_without_labels_says_so(capsys, tmp_path):
    """The number of held-out images for kNN is that of those with labels."""
    train, test = open_source("digits"), Subset(open_source("digits", "test"), range(20))
    test.classes = None
    fastssl.pretrain("mae", (Subset(train, range(60)), test), epochs=1, batch_size=60, folder=tmp_path / "run")
    said = capsys.readouterr().out
    assert "(0 held-out images for kNN)" in said
    assert "kNN accuracy" not in said
