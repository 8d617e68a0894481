"""What is refused before a run folder is written, what a resumed run must find again, and who may write to a folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fastssl
from fastssl.evaluation import finetune_defaults, linear_defaults
from fastssl.methods import mae
from fastssl.report.run_data import RunData
from fastssl.train import checkpoint
from fastssl.train.lock import Lock
from tests.support import toy_method
from tests.support.command import refused, run
from tests.support.toy_source import Brightness

METHOD, DATA = "tests.support.toy_method", "tests.support.toy_source:3"
FAST = {"workers": 0, "tensorboard": False, "log_every": 1, "device": "cpu", "batch_size": 16, "dim": 4}


class Images(Brightness):
    """Brightness without labels, with as many images as wanted."""

    def __init__(self, count):
        super().__init__("train")
        self.count, self.classes = count, None

    def __len__(self):
        return self.count

    def label(self, index):
        return -1

    def read(self, index):
        return Brightness("train").read(index)


def images(count):
    return Images(count), Images(16)


def lines(folder):
    return [(line["step"], line["epoch"]) for line in map(json.loads, (folder / "metrics.jsonl").open())]


# Starts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"freeze": ("encodr",)}, r"^train: --freeze must name parameters or modules of the method, got 'encodr'"),
        ({"batch_size": 64}, r"^data: the batch of 64 is larger than the data, which has 48 images$"),
        ({"backbone": "cnn"}, r"^toy_method: unknown backbone 'cnn'"),
        ({"weights": "none.pth"}, r"^weights: none\.pth is no file$"),
        ({"device": "cuda:x"}, r"^--device must be auto, cpu or an available cuda device, got 'cuda:x'$"),
        (
            {"epochs": 2, "warmup_epochs": 2.0},
            r"^pretrain: --warmup-epochs must lie before --epochs 2, got 2: lower it",
        ),
        ({"keep_last": 10**15}, r"needs .* GB for 1000000000000001 checkpoints and its disk has .* GB free: choose an"),
    ],
)
def test_after_a_refusal_the_same_command_works(tmp_path, settings, sentence):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=sentence):
        fastssl.pretrain(METHOD, DATA, folder=folder, **{**FAST, **settings})
    assert not folder.exists()


def test_features_of_images_without_labels_are_watched_too(tmp_path, capsys):
    fastssl.pretrain(METHOD, images(48), folder=tmp_path / "run", epochs=1, **FAST)
    out = capsys.readouterr().out
    assert out.count("features: RankMe ") == 2 and "kNN" not in out.replace("for kNN", "")
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_a_method_whose_groups_leave_out_a_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_method, "parameter_groups", lambda method: [{"params": method.encoder.parameters()}])
    with pytest.raises(ValueError, match=r"^train: parameter_groups must hold every parameter"):
        fastssl.pretrain(METHOD, DATA, folder=tmp_path / "run", **FAST)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
    method = mae.build(mae.Config.small())
    method.norm.bias.data[0] = torch.nan
    torch.save({"model": method.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(ValueError) as error:
        fastssl.pretrain("mae", "shapes:count=80", folder=tmp_path / "run", weights=tmp_path / "nan.pth")
    assert str(error.value) == f"weights: {tmp_path}/nan.pth has NaN or infinity in norm.bias"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_failed_before_its_first_step_is_started_anew(tmp_path, monkeypatch, resume):
    folder = tmp_path / "run"

    def fail(*_):
        raise ValueError("the first step fails")

    with monkeypatch.context() as patch:
        patch.setattr(toy_method.Autoencoder, "forward", fail)
        with pytest.raises(ValueError, match="the first step fails"):
            fastssl.pretrain(METHOD, DATA, folder=folder, epochs=1, lr=0.5, **FAST)
    assert (folder / "config.json").exists()
    again = fastssl.pretrain(METHOD, DATA, folder=folder, epochs=1, resume=resume, **FAST)  # another learning rate
    assert fastssl.open_run(folder).config.training.lr == 0.01
    assert lines(folder)[-1] == (3, 1.0)
    assert [line["step"] for line in again.evaluations()] == [0, 0, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "checkpoints", "config.json"])
def test_a_folder_that_holds_somebodys_files_is_refused(tmp_path, name):
    text = '{"step": 1, "epoch": 1.0}\n'
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}"):
        fastssl.pretrain(METHOD, DATA, folder=tmp_path, **FAST)
    assert (tmp_path / name).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_that_could_not_be_written_are_refused_before_the_first_step(tmp_path, resume):
    folder = tmp_path / "run"
    fastssl.pretrain(METHOD, DATA, folder=folder, epochs=1, **FAST)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").touch()
    (folder / "metrics.jsonl").unlink()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(
        ValueError, match=r"^pretrain: .*run/checkpoints is no folder that can be written: move it away$"
    ):
        if resume:
            fastssl.pretrain(resume=folder, epochs=2)
        else:
            fastssl.pretrain(METHOD, DATA, folder=folder, epochs=1, **FAST)
    assert sorted(path.name for path in folder.iterdir()) == before


# Resumed runs


def test_added_images_are_named_and_progress_is_kept(tmp_path, capsys):
    folder = tmp_path / "run"
    fastssl.pretrain(toy_method, images(48), folder=folder, epochs=2, **FAST)  # 3 steps an epoch
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        fastssl.pretrain(resume=folder, data=images(80), epochs=4)
    assert str(error.value) == (
        f"pretrain: the images of python:Images are not those that {folder} was started with: 32 added "
        '("train 48", "train 49", "train 50", …); name the folder or file of the original ones (--data), or go on with '
        "these (--allow-changed-data)"
    )
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert fastssl.open_run(folder).config.training.epochs == 2
    resumed = fastssl.pretrain(resume=folder, data=images(80), epochs=4, allow_changed_data=True)
    assert lines(folder)[5:] == [(6, 2.0), *((6 + i, 2 + i / 5) for i in range(1, 11))]
    assert "resuming after step 6 (epoch 2)" in capsys.readouterr().out
    assert 'data: 32 added ("train 48"' in resumed.facts["changed"]
    assert resumed.facts["images"] == 80
    assert fastssl.pretrain(resume=folder, data=images(80), epochs=5).metrics()[-1]["epoch"] == 5


def test_a_shrunk_folder_is_not_done(tmp_path):
    folder = tmp_path / "run"
    fastssl.pretrain(toy_method, images(80), folder=folder, epochs=2, keep_every=1, **FAST)
    with pytest.raises(ValueError, match=r'48 removed \("train 32", "train 33", "train 34", …\)'):
        fastssl.pretrain(resume=folder, data=images(32), epochs=3)
    fastssl.pretrain(resume=folder, data=images(32), epochs=3, allow_changed_data=True)
    assert lines(folder)[9:] == [(10, 2.0), (11, 2.5), (12, 3.0)]
    steps = [checkpoint._step_of(path) for path in checkpoint.files(folder / "checkpoints")]
    assert steps == [5, 10, 12]  # those that were kept for good stay


def test_other_held_out_images_are_named_and_do_not_stop_a_run(tmp_path, capsys):
    folder, train = tmp_path / "run", images(48)[0]
    fastssl.pretrain(toy_method, (train, Images(16)), folder=folder, epochs=1, **FAST)
    resumed = fastssl.pretrain(resume=folder, data=(train, Images(20)), epochs=2)
    said = 'data: held-out images: 4 added ("train 16", "train 17", "train 18", …)'
    assert said in capsys.readouterr().out and said in resumed.facts["changed"]
    fastssl.pretrain(resume=folder, data=(train, Images(20)), epochs=3)
    assert "held-out images" not in capsys.readouterr().out


def test_a_moved_folder_is_named_anew(tmp_path, monkeypatch, capsys):
    """The path is relative when the run starts, and stored absolute: another working directory changes nothing."""
    for number in range(32):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Brightness("train").read(number)).save(path)
    monkeypatch.chdir(tmp_path)
    run_folder = fastssl.pretrain(METHOD, "folder:photos", folder="run", epochs=1, **FAST).folder.absolute()
    assert fastssl.open_run(run_folder).options.data == f"folder:{tmp_path}/photos"
    monkeypatch.chdir("/")
    fastssl.pretrain(resume=run_folder, epochs=2)
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"^data: .*{tmp_path}/photos"):
        fastssl.pretrain(resume=run_folder, epochs=3)
    monkeypatch.chdir(tmp_path)
    moved = fastssl.pretrain(resume=run_folder, data="folder:moved", epochs=3)
    assert moved.options.data == f"folder:{tmp_path}/moved"
    assert [line["epoch"] for line in moved.metrics()] == [1, 2, 3]
    curves = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kNN accuracy")]
    assert "untrained encoder" in curves[-1]  # the curve goes on from before
    assert [epoch for epoch, _ in RunData(moved, "run", "red").knn()[0]] == [0, 1, 2, 3]


def test_a_model_too_large_for_any_memory(tmp_path):
    for dim in (10**13, 2**62):
        with pytest.raises(
            ValueError, match=r"^toy_method: a model of these sizes cannot be built, it is too large \("
        ):
            fastssl.pretrain(METHOD, DATA, folder=tmp_path / "run", **{**FAST, "dim": dim})
    assert not (tmp_path / "run").exists()


def test_names_of_a_run_folder_are_escaped(trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained.folder, tmp_path / "a\n\x1b[2J")
    run(monkeypatch, "pretrain", "--resume", folder, "--epochs", 2)
    run(monkeypatch, "eval", "knn", folder, "--k", 3)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "pretrain", "--resume", folder / "none")
    shown = capsys.readouterr().out
    assert r"a\n\x1b[2J" in shown and "\x1b" not in shown
    assert str(stopped.value).isprintable()


def test_lost_checkpoints_do_not_erase_the_metrics(tmp_path):
    folder = tmp_path / "run"
    fastssl.pretrain(toy_method, images(48), folder=folder, epochs=4, **FAST)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(
        ValueError, match=r"has metrics up to step 12 and no checkpoint in .*: put its checkpoints back"
    ):
        fastssl.pretrain(resume=folder, data=images(48), epochs=5)
    assert len(lines(folder)) == 12


def test_a_folder_in_use_is_refused(tmp_path):
    folder = tmp_path / "run"
    fastssl.pretrain(toy_method, images(48), folder=folder, epochs=1, **FAST)
    (tmp_path / "new").mkdir()
    for busy in (folder, tmp_path / "new"):
        lock = Lock(busy)
        lock.acquire()
        with pytest.raises(ValueError, match=rf"^train: {busy} is in use by process \d+ on "):
            if busy == folder:
                fastssl.pretrain(resume=folder, data=images(48), epochs=2)
            else:
                fastssl.pretrain(toy_method, images(48), folder=busy, **FAST)
        lock.close()
    assert len(lines(folder)) == 3
    assert not (tmp_path / "new" / "config.json").exists()
    assert fastssl.pretrain(resume=folder, data=images(48), epochs=2).metrics()[-1]["epoch"] == 2


def test_milestones_of_the_command_and_of_python_agree(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "images.npy", np.zeros((64, 32, 32, 3), np.uint8))
    data = f"arrays:{tmp_path}/images.npy"
    for name in ("command", "python"):
        folder, epochs = tmp_path / name, 1
        if name == "command":
            words = ["--folder", folder, "--workers", 0, "--no-tensorboard", "--batch-size", 64, "--epochs", epochs]
            run(monkeypatch, "pretrain", "mae", "--data", data, *words, "--decoder-depth", 1)
        else:
            fast = {"workers": 0, "tensorboard": False, "batch_size": 64, "decoder_depth": 1}
            call = {"data": data, "folder": folder, "resume": "auto", **fast}
            fastssl.pretrain("mae", epochs=epochs, **call)
        assert fastssl.open_run(folder).config.training.warmup_epochs == 0.1  # 4 of 40
        assert "--warmup-epochs 4 → 0.1: in proportion to --epochs 1 of the preset's 40; " in capsys.readouterr().out
    longer = fastssl.pretrain("mae", epochs=2, **call)
    assert (longer.config.training.epochs, longer.config.training.warmup_epochs) == (2, 0.1)
    with pytest.raises(ValueError, match=r"is a run with --warmup-epochs 0\.1, which cannot change to 1\.0"):
        fastssl.pretrain("mae", epochs=3, warmup_epochs=1, **call)
    assert linear_defaults(longer, "official", 9).warmup_epochs == 1
    assert finetune_defaults(longer, 10).warmup_epochs == 1


def test_milestones_of_a_run_bound_its_epochs(tmp_path):
    folder = tmp_path / "run"
    settings = {"epochs": 6, "lr_drops": (4,), "weight_decay_end": None}
    fastssl.pretrain(toy_method, images(16), folder=folder, **settings, **FAST)
    path = folder / "checkpoints"
    shutil.rmtree(path)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError) as error:
        fastssl.pretrain(resume=folder, data=images(16), epochs=4)
    assert str(error.value) == (
        f"pretrain: --epochs must be above 4, a milestone of the schedules of {folder} (--lr-drops 4), got 4"
    )


# What is read back


CONFIGS = [
    (("options", "seed"), -1, r"config\.json does not fit this version of fastssl: --seed must be at least 0, got -1$"),
    (("options", "seed"), "0", r"--seed must be an integer, got '0'$"),
    (("options", "execution"), None, r"Execution must be an object with a value for each option, got None$"),
    (("options", "execution", "log_every"), 0, r": --log-every must be at least 1, got 0$"),
    (("options", "workers"), 1.5, r"--workers must be an integer or None, got 1\.5$"),
    (("config", "dim"), [4], r"--dim must be an integer, got \[4\]$"),
    (("config", "image_size"), [32], r"--image-size must be a tuple of int, int, got \[32\]$"),
    (("config", "training", "epochs"), 2.5, r"--epochs must be an integer, got 2\.5$"),
    (("config", "training", "lr"), float("nan"), r": --lr must be at least 0, got nan$"),
    (("config", "training", "betas"), [0.9, 2], r": --betas must be at least 0 and below 1, got 0\.9 2\.0$"),
    (
        ("config", "training", "optimizer"),
        "adam",
        r"--optimizer must be adamw or sgd or lars or lars_simclr or larc, got 'adam'$",
    ),
    (("config", "training"), [], r"Training must be an object with a value for each option, got \[\]$"),
    (("config", "training", "lr"), 10**400, r"--lr must be a number, got 1000"),
    (("options", "workers"), 10**18, r"--workers must be at least 0 and at most 1024, got 1000000000000000000$"),
    (("options", "keep_every"), 3, r"config\.json does not fit this version of fastssl: unknown field 'keep_every'$"),
    (("method",), "../mae", r"^pretrain: unknown method '\.\./mae', there are "),
    (("comment",), "", r"config\.json does not fit this version of fastssl: unknown field 'comment'$"),
    (("facts",), [], r"\(method, facts or id has another type\)$"),
    (("method",), 3, r"\(method, facts or id has another type\)$"),
    (("id",), None, r"\(method, facts or id has another type\)$"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fastssl.pretrain(METHOD, DATA, folder=tmp_path_factory.mktemp("toy") / "run", epochs=1, **FAST)


@pytest.mark.parametrize(("place", "value", "sentence"), CONFIGS)
def test_an_edited_config_is_refused_in_a_sentence(trained, tmp_path, monkeypatch, place, value, sentence):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    part = record
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=sentence):
        fastssl.pretrain(resume=folder, epochs=2)
    with pytest.raises(SystemExit, match=sentence.replace("^", "^fastssl: ")):
        run(monkeypatch, "pretrain", "--resume", folder, "--epochs", 2)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"\0" * 9, b"[" * 100_000, b"3"])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^run: .*config\.json does not fit this version of fastssl"):
        fastssl.open_run(tmp_path)


def test_garbage_among_the_evaluations_stays_and_hurts_nothing(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    path = folder / "evaluations.jsonl"
    path.write_bytes(b'garbage \xff\n\n{"evaluation": "knn", "step": 3}\n' + path.read_bytes())
    opened = fastssl.open_run(folder)
    opened.knn(k=3)
    assert path.read_bytes().startswith(b'garbage \xff\n\n{"evaluation": "knn", "step": 3}\n{')
    assert opened.evaluations()[-1]["k"] == 3
    assert f"{path}: line 1 and 2 more holds no record: passed over" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_not_taken(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    other = fastssl.pretrain(METHOD, DATA, folder=tmp_path / "other", epochs=3, **FAST)
    newest = checkpoint.files(other.checkpoints)[-1]
    shutil.copy(newest, folder / "checkpoints")
    assert fastssl.open_run(folder).state()["step"] == 3
    assert f"{newest.name} is of the run {other.id}, not of this one ({trained.id})" in capsys.readouterr().out


def test_where_an_export_cannot_be_written(trained, monkeypatch, tmp_path):
    for layout in ("safetensors", "torchvision"):
        with pytest.raises(
            SystemExit, match=r"^fastssl: export: /proc/self/weights cannot be written \(.*\): name a f"
        ):
            run(monkeypatch, "export", trained.folder, "--format", layout, "--to", "/proc/self/weights")


def test_an_export_that_fails_keeps_the_file_before_it(trained, tmp_path, monkeypatch):
    path = trained.export("torchvision", tmp_path / "weights")
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ValueError, match=r"^export: .*weights cannot be written \(No space left on device\): name a"):
        trained.export("torchvision", tmp_path / "weights")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_ids_tell_runs_apart(trained, tmp_path):
    other = fastssl.pretrain(METHOD, DATA, folder=tmp_path / "other", epochs=1, **FAST)
    assert len(trained.id) == len(other.id) == 16
    assert trained.id != other.id
    assert trained.state()["run"] == fastssl.open_run(trained.folder).id == trained.id


def test_the_command_can_go_on_with_changed_images(trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    words = ["pretrain", "--resume", folder, "--data", "tests.support.toy_source:2", "--epochs", 2]
    sentence = (
        f"pretrain: the images of tests.support.toy_source:2 are not those that {folder} was started with: 32 with "
        "another label"
    )
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert str(stopped.value).startswith(f"fastssl: {sentence}")
    run(monkeypatch, *words, "--allow-changed-data")
    assert "data: 32 with another label" in capsys.readouterr().out
    assert lines(folder)[-1] == (6, 2.0)
    refused(monkeypatch, f"run: {tmp_path} is not a run folder: it has no config.json", *words[:2], tmp_path)
