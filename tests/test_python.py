"""The Python interface and the command line with a method and a source from outside the package."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastssl
from fastssl.extras import MissingExtra
from tests.support import toy_method
from tests.support.command import refused, run
from tests.support.toy_source import Brightness

METHOD, DATA = "tests.support.toy_method", "tests.support.toy_source:3"
FAST = {"workers": 0, "tensorboard": False, "log_every": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """One thread: a second one on a busy core slows small steps down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("fastssl.machine.cores", lambda: 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("fastssl.machine.cores", lambda: 1)
        folder = tmp_path_factory.mktemp("toy") / "run"
        return fastssl.pretrain(METHOD, DATA, folder=folder, dim=8, batch_size=16, **FAST)


@pytest.fixture
def toy(trained, tmp_path):
    """A copy of the toy run, opened anew."""
    return fastssl.open_run(shutil.copytree(trained.folder, tmp_path / "run"))


def test_pretraining_returns_the_run(trained):
    assert isinstance(trained, fastssl.Run)
    assert (trained.method_name, trained.options.data, trained.config.dim) == (METHOD, DATA, 8)
    assert [line["step"] for line in trained.metrics()] == list(range(1, 7))  # 48 images, batches of 16, 2 epochs
    assert {line["evaluation"] for line in trained.evaluations()} == {"knn of raw pixels", "knn"}
    assert trained.facts["images"] == 48
    opened = fastssl.open_run(str(trained.folder))
    assert (opened.options, opened.config) == (trained.options, trained.config)


def test_evaluations_return_and_note_their_results(toy):
    accuracies = toy.knn(k=3)
    assert accuracies == {3: 1.0}  # brightness is in the thumbnails
    assert toy.knn(k=(1, 5), tau=0.1, data="tests.support.toy_source:2").keys() == {1, 5}
    accuracy = toy.linear(optimizers=["lbfgs"], epochs=5)
    assert accuracy.top1 == 1.0
    assert accuracy.top5 is None  # three classes
    lines = [line for line in toy.evaluations() if line["step"]]
    assert [(line["evaluation"], line.get("k"), line["data"]) for line in lines] == [
        ("knn", 20, DATA),
        ("knn", 3, DATA),
        ("knn", 1, "tests.support.toy_source:2"),
        ("knn", 5, "tests.support.toy_source:2"),
        ("linear", None, DATA),
    ]


def test_the_encoder_gives_the_embedded_features(toy):
    encoder = toy.encoder()
    assert not encoder.training
    x, labels = toy.embed(split="test")
    assert (x.shape, x.dtype, labels.dtype) == ((24, 8), torch.float32, torch.int64)
    assert labels.tolist() == [i % 3 for i in range(24)]
    source = Brightness("test")
    images = torch.stack([torch.from_numpy(source.read(i)).permute(2, 0, 1) for i in range(24)]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(encoder((images - mean) / std), x, rtol=1e-4, atol=1e-4)
    everything, _ = toy.embed()
    assert len(everything) == 72
    torch.testing.assert_close(everything[48:], x)
    other, _ = toy.embed("shapes:count=20", split="train")
    assert other.shape == (20, 8)


def test_export_and_report(toy):
    assert toy.export("safetensors") == toy.folder / "toy_method-safetensors.safetensors"
    assert toy.report() == toy.folder / "report.html"
    page = (toy.folder / "report.html").read_text()
    assert f"fastssl pretrain {METHOD} --data {DATA}" in page.replace("<span>", "").replace("</span>", "")
    assert "Nearest neighbours" in page


def test_what_the_method_does_not_define_is_refused(toy):
    with pytest.raises(ValueError, match=r"^eval: --protocol official .*toy_method defines none: use --protocol feat"):
        toy.linear("official")
    with pytest.raises(ValueError, match=r"^export: Autoencoder has no weights in the format moco: use timm, "):
        toy.export("moco")
    with pytest.raises(
        ValueError, match=r"^eval: finetune is for ViTs, ResNets and networks .* encoder of Autoencoder is"
    ):
        toy.finetune(epochs=1, warmup_epochs=0, batch_size=16)
    with pytest.raises(ValueError, match=r"^eval: --pool is for ViTs, and the encoder of Autoencoder is not one$"):
        toy.linear(pool="avg")


def test_the_command_line_does_the_same(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    words = ["--folder", folder, "--dim", 8, "--batch-size", 16, "--workers", 0, "--no-tensorboard", "--log-every", 1]
    run(monkeypatch, "pretrain", METHOD, "--data", DATA, *words)
    run(monkeypatch, "eval", "knn", folder, "--k", 3)
    assert f"kNN accuracy of {folder} on {DATA}: k=3 100.0%" in capsys.readouterr().out
    run(monkeypatch, "embed", folder, DATA, "--out", tmp_path / "x.npz", "--split", "test")
    assert capsys.readouterr().out == f"{tmp_path / 'x.npz'}: 24 images, 8 features each\n"
    with np.load(tmp_path / "x.npz") as columns:
        assert columns["features"].shape == (24, 8)
        assert columns["features"].dtype == np.float32
        assert columns["labels"].tolist() == [i % 3 for i in range(24)]
        assert columns["indices"].tolist() == list(range(24))
        assert columns["names"].tolist() == [f"test {i}" for i in range(24)]
        assert set(columns["splits"].tolist()) == {"test"}
    run(monkeypatch, "export", folder, "--format", "timm")
    run(monkeypatch, "report", folder)
    assert capsys.readouterr().out.split() == [str(folder / "toy_method-timm.safetensors"), str(folder / "report.html")]
    official = f"eval: --protocol official is the linear probe of the method's paper, and {METHOD} defines none: "
    refused(monkeypatch, f"{official}use --protocol features", "eval", "linear", folder, "--protocol", "official")
    formats = "timm, torchvision, safetensors"
    refused(
        monkeypatch,
        f"export: Autoencoder has no weights in the format mae: use {formats}",
        *("export", folder, "--format", "mae"),
    )


def test_features_as_parquet(monkeypatch, toy, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run(monkeypatch, "embed", toy.folder, DATA, "--out", tmp_path / "x.parquet")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["features", "labels", "indices", "names", "splits"]
    expected, labels = toy.embed(DATA)
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), dtype=np.float32), expected.numpy())
    assert table["labels"].to_pylist() == labels.tolist()


def test_where_features_cannot_be_written(monkeypatch, toy, tmp_path):
    words = ("embed", toy.folder, DATA, "--out")
    refused(
        monkeypatch, f"embed: --out must end in .npz or .parquet, got {tmp_path}/x.csv", *words, f"{tmp_path}/x.csv"
    )
    missing = f"{tmp_path}/no/x.npz"
    refused(monkeypatch, f"embed: --out must be in a folder that exists, got {missing}", *words, missing)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence = "embed --out FILE.parquet needs pyarrow: pip install pyarrow"
    refused(monkeypatch, sentence, *words, f"{tmp_path}/x.parquet")


def test_sources_and_a_module_as_objects(tmp_path):
    sources = Brightness("train", 2), Brightness("test", 2)
    trained = fastssl.pretrain(toy_method, sources, folder=tmp_path / "run", epochs=1, batch_size=16, dim=4, **FAST)
    assert (trained.method_name, trained.options.data) == (METHOD, "python:Brightness")
    assert trained.knn(k=1) == {1: 1.0}
    opened = fastssl.open_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"was trained on sources given as objects \(python:Brightness\): give them"):
        opened.knn(k=1)
    assert opened.knn(k=1, data=sources) == {1: 1.0}
    assert opened.resume(data=sources, epochs=2).metrics()[-1]["epoch"] == 2


def test_a_run_is_resumed_and_extended(toy, capsys):
    assert [line["epoch"] for line in toy.metrics()][-1] == 2
    resumed = toy.resume(epochs=3, log_every=3)
    out = capsys.readouterr().out
    assert "--epochs: 2 -> 3 (schedules are those of 3 epochs from here on)\n" in out
    assert "--log-every: 1 -> 3\n" in out
    assert resumed.metrics()[-1]["step"] == 9
    stored = fastssl.open_run(toy.folder)
    assert (stored.config.training.epochs, stored.options.execution.log_every) == (3, 3)
    assert stored.facts["changed"] == "after step 6: --log-every: 1 -> 3, --epochs: 2 -> 3"
    again = fastssl.pretrain(resume=toy.folder, epochs=4)
    assert again.metrics()[-1]["step"] == 12
    assert fastssl.open_run(toy.folder).facts["changed"].count("after step") == 2


def test_what_resuming_refuses(toy):
    before = json.loads((toy.folder / "config.json").read_text())
    for changes, sentence in {
        (
            "batch_size",
            8,
        ): r"is a run with --batch-size 16, which cannot change to 8 when it is resumed: start a new run",
        ("lr", 0.5): r"is a run with --lr 0\.01, which cannot change to 0\.5 when it is resumed",
        ("seed", 1): r"--seed 0, which cannot change to 1",
        ("dim", 16): r"--dim 8, which cannot change to 16",
        ("epochs", 1): r"--epochs must be at least 2, which .* has begun, got 1$",
        ("epochs", 0): r"--epochs must be at least 1, got 0$",
        (
            "data",
            "shapes:count=40",
        ): r"the images of shapes:count=40 are not those that .*: none of the 40 images .* is one of the 48 before; ",
        ("folder", "x"): r"^pretrain: folder belongs to a new run, got x beside resume=",
        ("epoch", 3): r"^pretrain: unknown setting 'epoch'; the closest are .*epochs",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            toy.resume(**dict([changes]))
    with pytest.raises(ValueError, match=r"^pretrain: .* is a run of tests\.support\.toy_method, not of mae$"):
        fastssl.pretrain("mae", resume=toy.folder)
    with pytest.raises(ValueError, match=r"^pretrain: preset belongs to a new run, got small beside resume="):
        fastssl.pretrain(resume=toy.folder, preset="small")
    assert json.loads((toy.folder / "config.json").read_text()) == before


def test_a_run_finds_its_data_where_it_moved(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "a" / "images.npy", pixels)
    monkeypatch.chdir(tmp_path / "a")
    trained = fastssl.pretrain(METHOD, "arrays:images.npy", epochs=1, batch_size=16, dim=4, **FAST)
    assert trained.folder == (tmp_path / "a/runs/toy_method-arrays").relative_to(tmp_path / "a")
    assert trained.options.data == f"arrays:{tmp_path}/a/images.npy"
    folder = (tmp_path / "a" / trained.folder).rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert fastssl.open_run(folder).embed(split="train")[0].shape == (40, 4)  # from another working folder
    (tmp_path / "a" / "images.npy").rename(tmp_path / "moved.npy")
    with pytest.raises(ValueError, match=r"images\.npy"):
        fastssl.open_run(folder).resume(epochs=2)
    resumed = fastssl.open_run(folder).resume(data="arrays:moved.npy", epochs=2)
    assert resumed.options.data == f"arrays:{tmp_path}/moved.npy"
    assert resumed.metrics()[-1]["epoch"] == 2


def test_resume_auto_starts_and_continues(tmp_path, capsys):
    call = {"method": METHOD, "data": DATA, "folder": tmp_path / "run", "batch_size": 16, "resume": "auto", **FAST}
    fastssl.pretrain(**call, epochs=1)
    continued = fastssl.pretrain(**call, epochs=2)
    assert "--epochs: 1 -> 2 " in capsys.readouterr().out
    assert continued.metrics()[-1]["epoch"] == 2
    with pytest.raises(
        ValueError, match=r"--lr 0\.01, which cannot change to 0\.1 .*: --resume auto takes the original"
    ):
        fastssl.pretrain(**call, epochs=2, lr=0.1)
    call["resume"] = None
    with pytest.raises(ValueError, match=r"has a run already: continue it \(--resume "):
        fastssl.pretrain(**call)


def test_mistakes_get_one_sentence(tmp_path):
    for arguments, sentence in (
        ((), r"^pretrain: a method is needed: albef, barlow_twins, beit, byol, .*, mae, .*, vicreg$"),
        (("mae",), r"^pretrain: data is needed, such as folder:PATH, patterns or digits$"),
        (("simclr", "digits"), r"^pretrain: unknown method 'simclr', there are albef, barlow_twins, "),
        (("no_such.method", "digits"), r"^pretrain: the method no_such\.method cannot be imported .*PYTHONPATH"),
        (
            ("tests.support.toy_source", "digits"),
            r"^pretrain: the method tests\.support\.toy_source must define Config",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastssl.pretrain(*arguments, folder=tmp_path / "run")
    for settings, sentence in (
        ({"epoch": 3}, r"^pretrain: unknown setting 'epoch'; the closest are .*epochs"),
        ({"epochs": "3"}, r"^pretrain: --epochs must be an integer, got '3'$"),
        ({"optimizer": "adam"}, r"^pretrain: --optimizer must be adamw or sgd or lars or .* or larc, got 'adam'$"),
        ({"image_size": [32]}, r"^pretrain: --image-size must be a tuple of int, int, got \[32\]$"),
        ({"epochs": 0}, r"^pretrain: --epochs must be at least 1, got 0$"),
        ({"preset": "tiny"}, r"^pretrain: --preset must be small or paper, got 'tiny'$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastssl.pretrain("mae", "digits", folder=tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=r"^run: .*run is not a run folder: it has no config\.json$"):
        fastssl.open_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_extras_are_named(monkeypatch, toy):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        MissingExtra, match=r"^report: --map umap needs umap-learn: pip install 'fastssl-engine\[umap\]'$"
    ):
        toy.report(map="umap")


def test_importing_the_package_loads_nothing_else():
    script = (
        "import sys, fastssl; assert 'torch' not in sys.modules; assert 'pretrain' in dir(fastssl); "
        "from fastssl import pretrain, open_run, Run; assert fastssl.pretrain is pretrain and callable(pretrain); "
        "import fastssl.pretraining, fastssl.run; assert callable(fastssl.pretrain); "
        "heavy = {'matplotlib', 'sklearn', 'timm', 'fastssl.report.page'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'train_it'"):
        fastssl.train_it  # noqa: B018
