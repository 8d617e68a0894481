"""The command line: pretraining, evaluation, export, and one sentence for each mistake."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

from fastssl.data.source import source_names
from fastssl.method_modules import method_names
from tests.support.command import refused, run

FAST = ["--epochs", "1", "--batch-size", "32", "--workers", "0"]


def accuracies(folder):
    """kNN accuracies of raw pixels, and of the encoder before and after the run."""
    return [json.loads(line)["accuracy"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def pictures(folder, count, bad=0):
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        path = folder / "ab"[i % 2] / f"{i:03}.png"
        if i < bad:
            path.write_bytes(b"broken")
        else:
            Image.new("RGB", (16 + i % 5, 20), (i, 99, 255 - i)).save(path)
    return f"folder:{folder}"


def test_pretrain_evaluate_report(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    run(monkeypatch, "pretrain", "mae", "--data", "digits", "--folder", folder, *FAST)
    out = capsys.readouterr().out
    assert "preset `small`" in out
    assert "raw pixels" in out
    assert out.count("features: RankMe ") == 2 and "positives: " not in out
    written = {
        "config.json",
        "data.npz",
        "held-out.npz",
        "run.lock",
        "metrics.jsonl",
        "checkpoints",
        "evaluations.jsonl",
        "reconstructions",
        "tensorboard",
    }
    assert set(os.listdir(folder)) == written
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert record.keys() == {
        "step",
        "epoch",
        "lr",
        "loss",
        "grad_norm",
        "skipped",
        "images_per_second",
        "data_wait",
        "peak_memory",
    }
    assert record["step"] == 1438 // 32
    raw, untrained, trained = accuracies(folder)
    assert raw > untrained
    run(monkeypatch, "eval", "knn", folder)
    assert f"{trained:.1%}" in capsys.readouterr().out
    run(monkeypatch, "report", folder)
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    refused(
        monkeypatch,
        f"pretrain: {folder} has a run already: continue it (--resume {folder}, or --resume auto beside its original "
        f"options) or choose another folder (--folder)",
        "pretrain",
        "mae",
        "--data",
        "digits",
        "--folder",
        folder,
        *FAST,
    )
    refused(
        monkeypatch, f"pretrain: {folder} is a run of mae, not of moco_v2", "pretrain", "moco_v2", "--resume", folder
    )
    other = f"pretrain: {folder} is a run of mae, not of moco_v2"
    refused(monkeypatch, other, "pretrain", "moco_v2", f"--resume={folder}")


def test_export_and_start_from_weights(monkeypatch, capsys, tmp_path):
    folder, more = tmp_path / "run", tmp_path / "more"
    data = ["--data", "shapes:count=64", *FAST, "--hidden", "32", "--backbone", "vit_mini", "--dim", "16"]
    run(monkeypatch, "pretrain", "moco_v3", "--folder", folder, *data)
    assert capsys.readouterr().out.count(" rank first among 31 negatives; the entropy of their ranks is ") == 2
    for layout, name in (("timm", "moco_v3-timm.safetensors"), ("moco", "moco_v3-moco.pth")):
        run(monkeypatch, "export", folder, "--format", layout)
        assert capsys.readouterr().out.strip() == str(folder / name)
    assert "patch_embed.proj.weight" in load_file(folder / "moco_v3-timm.safetensors")
    run(monkeypatch, "export", folder, "--format", "moco", "--to", tmp_path / "other.pth")
    run(monkeypatch, "pretrain", "moco_v3", "--folder", more, "--weights", tmp_path / "other.pth", *data)
    first, second = accuracies(folder), accuracies(more)
    assert second[1] == first[2]  # the given encoder is the one that was trained
    refused(
        monkeypatch,
        "export: MoCoV3 has no weights in the format mae: use timm, torchvision, safetensors, moco",
        "export",
        folder,
        "--format",
        "mae",
    )
    with pytest.raises(SystemExit, match=r"moco_v3-moco\.pth has no weights of a ResNetMini"):
        words = ["pretrain", "moco_v1", "--data", "shapes:count=64", "--folder", tmp_path / "third", *FAST]
        run(monkeypatch, *words, "--weights", folder / "moco_v3-moco.pth")


def test_the_papers_numbers_follow_the_backbone(monkeypatch, capsys):
    """`--preset paper --backbone resnet50` takes the ResNet's recipe."""
    for backbone, tau in (("vit_small", "0.2"), ("resnet50", "1.0")):
        with pytest.raises(SystemExit, match="0"):
            run(
                monkeypatch,
                "pretrain",
                "moco_v3",
                "--data",
                "digits",
                "--preset",
                "paper",
                "--backbone",
                backbone,
                "--help",
            )
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"--tau FLOAT temperature τ of the contrastive loss (default: {tau})" in text


def test_a_folder_with_a_bad_image_trains_to_the_end(monkeypatch, capsys, tmp_path):
    data, folder = pictures(tmp_path / "data", 200, bad=1), tmp_path / "run"
    run(monkeypatch, "pretrain", "mae", "--preset", "small", "--data", data, "--folder", folder, *FAST)
    assert "1 of 160 images could not be decoded" in capsys.readouterr().out
    assert "000.png: no JPEG, PNG, WEBP" in (folder / "bad_files.txt").read_text()


def test_too_many_bad_images_stop_the_run(monkeypatch, tmp_path):
    data, folder = pictures(tmp_path / "data", 200, bad=2), tmp_path / "run"
    with pytest.raises(SystemExit, match=r"2 of 160 images can't be decoded, more than the 1\.0% that max_bad allows"):
        run(monkeypatch, "pretrain", "mae", "--preset", "small", "--data", data, "--folder", folder, *FAST)


def test_mistakes_get_one_sentence(monkeypatch, tmp_path):
    new = tmp_path / "run"
    commands = "pretrain, eval, embed, report, export, data, bench, env"
    refused(monkeypatch, f"unknown command 'train', there are {commands}", "train")
    refused(
        monkeypatch,
        f"pretrain: unknown method 'dinov9', there are {', '.join(method_names())}, or your own module: package.module",
        "pretrain",
        "dinov9",
        "--data",
        "digits",
    )
    refused(
        monkeypatch,
        f"data: unknown source 'cifar', there are {', '.join(source_names())} (folder:PATH for your images, "
        f"package.module:ARGUMENT for a source of your own)",
        "pretrain",
        "mae",
        "--data",
        "cifar",
        "--folder",
        new,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match=f"data: {empty} .*holds no image"):
        run(monkeypatch, "pretrain", "mae", "--data", f"folder:{empty}", "--folder", new)
    for words, argument, value in (
        (("mae", "--image-size", "30", "32"), "img_size", "30×32"),
        (("mae", "--mask-ratio", "0.999"), "mask_ratio", "0.999"),
        (("moco_v2", "--tau", "0"), "tau", "0.0"),
        (("moco_v3", "--tau", "0"), "tau", "0.0"),
        (("mae", "--batch-size", "5000"), "batch of 5000", "1438 images"),
        (("mae", "--preset", "huge"), "--preset must be small or paper", "'huge'"),
        (("mae", "--device", "tpu"), "--device must be auto, cpu or an available cuda device", "'tpu'"),
        (("moco_v1", "--bn-splits", "0"), "--bn-splits must be at least 1", "0"),
        (("moco_v3", "--hidden", "0"), "--hidden must be at least 1", "0"),
        (("moco_v1", "--image-size", "32", "0"), "--image-size must be at least 1", "32 0"),
        (("moco_v1", "--epochs", "10", "--lr-drops", "6", "12"), "--lr-drops must lie before --epochs 10", "12"),
        (("mae", "--epochs", "3", "--warmup-epochs", "3"), "--warmup-epochs must lie before --epochs 3", "3: lower it"),
        (("mae", "--lr-drops", "-1"), "--lr-drops must be at least 0", "-1"),
        (("mae", "--flip-p", "7"), "--flip-p must be at least 0 and at most 1", "7.0"),
        (("mae", "--freeze", "encodre"), "--freeze must name parameters or modules", "'encodre'"),
        (("moco_v3", "--batch-size", "1"), "--batch-size must give at least 2 images at once", "1"),
        (("moco_v3", "--batch-size", "4", "--accumulate", "4"), "at least 2 images at once", "4 micro-batches"),
        (("moco_v1", "--batch-size", "1"), "batch norms need two images on each rank", "1"),
        (("mae", "--lr", "nan"), "--lr must be at least 0", "nan"),
        (("mae", "--workers", "-2"), "--workers must be at least 0", "-2"),
        (("mae", "--accumulate", "3"), "--batch-size must be divisible by 1 ranks times --accumulate 3", "64"),
        (("mae", "--shard"), "--shard needs several ranks", "torchrun"),
        (("mae", "--clip-norm", "-1"), "--clip-norm must be at least 0", "-1.0"),
        (("mae", "--keep-last", "0"), "--keep-last must be at least 1", "0"),
        (("moco_v2", "--batch-size", "8", "--bn-splits", "8"), "bn_splits=8", "8"),
        (("mae", "--log-every", "0"), "--log-every must be at least 1", "0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, "pretrain", *words, "--data", "digits", "--folder", new)
        sentence = str(stopped.value)
        assert argument in sentence, sentence
        assert value in sentence, sentence
        assert "\n" not in sentence
        assert not new.exists()
    refused(monkeypatch, f"run: {empty} is not a run folder: it has no config.json", "pretrain", "--resume", empty)
    evaluations = "knn, linear, finetune, few-labels, zeroshot or retrieval"
    refused(monkeypatch, f"eval: name an evaluation: {evaluations}, got nothing", "eval")


def test_a_run_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    sentence = f"pretrain: {folder} cannot be created (Not a directory): choose another --folder"
    refused(monkeypatch, sentence, "pretrain", "mae", "--data", "digits", "--folder", folder, *FAST)


def test_help_and_env_read_well(monkeypatch, capsys):
    run(monkeypatch, "--help")
    assert "fastssl pretrain METHOD --data SOURCE" in capsys.readouterr().out
    run(monkeypatch, "env")
    out = capsys.readouterr().out
    assert "ema_update_" in out
    assert "kernels up to 512 tokens" in out
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "pretrain", "mae", "--help")
    assert "--mask-ratio" in capsys.readouterr().out


def test_import_is_light():
    """`import fastssl` does not import torch, and `fastssl.ops` no optional dependency."""
    subprocess.run([sys.executable, "-c", "import sys, fastssl; assert 'torch' not in sys.modules"], check=True)
    heavy = "{'torchvision', 'sklearn', 'matplotlib', 'triton'}"
    script = f"import sys, fastssl.ops; heavy = {heavy} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", script], check=True)
