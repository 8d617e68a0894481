"""benchmarks/learning_peers.py and the files beside it: lightly's parts against ours, and the table."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import learning_peers, peers_runs, peers_table, store
from benchmarks.peers_runs import Cell, measure
from benchmarks.peers_table import METHODS, lines_of, minutes_to
from benchmarks.pinned import run_pinned
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation
from fastssl.data.loader import Loader
from fastssl.method_modules import method_module

pytest.importorskip("lightly")
peers_lightly = pytest.importorskip("benchmarks.peers_lightly")

SMALL = {"moco_v2": {"queue_size": 16}, "byol": {"same_initial_weights": True}}


def config_of(name):
    return dataclasses.replace(method_module(name).Config.small(), **SMALL.get(name, {}))


def both(name):
    """Our method, and lightly's parts with all its weights."""
    config = config_of(name)
    method = method_module(name).build(config)
    peer = peers_lightly.PEERS[name][0](config, method.encoder)
    heads = {
        "moco_v2": lambda: [(peer.head, method.encoder_q.fc), (peer.momentum_head, method.encoder_k.module.fc)],
        "simclr_v1": lambda: [(peer.head, method.backbone.fc)],
        "simsiam": lambda: [(peer.head, method.backbone.fc), (peer.predictor, method.predictor)],
        "byol": lambda: [
            (peer.head, method.online.fc),
            (peer.momentum_head, method.target.module.fc),
            (peer.predictor, method.predictor),
        ],
    }
    for theirs, ours in heads.get(name, list)():
        copy_layers(ours, theirs.layers)
    if name == "moco_v2":
        peer.criterion.memory_bank.bank.copy_(method.criterion.queue)
    if name == "dino":
        for theirs, ours in ((peer.head, method.student.head), (peer.teacher_head, method.teacher.module.head)):
            copy_layers(ours.mlp, theirs.layers)
            theirs.last_layer.weight_v.data.copy_(ours.last_layer.weight_v)
    if name == "mae":
        ours = {key.removeprefix("decoder_"): x for key, x in method.state_dict().items()}
        peer.decoder.load_state_dict(
            {key: ours[key] for key in peer.decoder.state_dict() if key != "pos_embed"}, strict=False
        )
        peer.decoder.pos_embed.data.copy_(method.decoder_pos_embed)
        for layer in ("decoder_embed", "decoder_pred"):
            getattr(peer, layer).load_state_dict(getattr(method, layer).state_dict())
    return config, method.train(), peer.train()


def copy_layers(ours, theirs):
    """Copies weights layer by layer. Biases that ours lack become 0; those lightly lacks lie before batch norms."""
    assert [type(x).__name__ for x in theirs] == [type(x).__name__ for x in ours]
    for source, target in zip(ours, theirs):
        missing = target.load_state_dict(source.state_dict(), strict=False).missing_keys
        for name in missing:
            torch.nn.init.zeros_(target.get_parameter(name))


@pytest.mark.parametrize("name", METHODS)
def test_lightlys_parts_have_our_loss_and_gradient(name):
    """With equal weights, and equal views where ours computes batch norms over several views at once."""
    config, method, peer = both(name)
    sizes = [view.size for view in config.augmentation.views]
    if name in ("simclr_v1", "dino"):
        sizes = [sizes[0]] * 2
        views = [torch.randn(6, 3, *sizes[0])] * 2
    else:
        views = [torch.randn(6, 3, *size) for size in sizes]
    torch.manual_seed(1)
    theirs = peer.loss(views)
    if name == "mae":
        torch.manual_seed(1)
        ours = method.loss(views[0], torch.rand(6, 1 + method.length)[:, 1:])
    else:
        ours = method(Batch(tuple(views), torch.arange(6), torch.zeros(6, dtype=torch.int64)))[0]
    constant = 4.0 if name == "byol" else 0.0
    torch.testing.assert_close(theirs + constant, ours, rtol=2e-5, atol=0)
    theirs.backward()
    ours.backward()
    backbone = {"moco_v2": "encoder_q", "byol": "online"}.get(name, "backbone")
    backbone = method if name == "mae" else method.student.backbone if name == "dino" else getattr(method, backbone)
    network = peer.backbone.vit if name == "mae" else peer.backbone
    named = dict(backbone.named_parameters())
    for key, p in network.named_parameters():
        if p.requires_grad:
            scale = named[key].grad.abs().max().item()
            assert (p.grad - named[key].grad).abs().max() < 2e-3 * scale + 1e-6, key


@pytest.mark.parametrize("name", METHODS)
def test_lightlys_views_are_ours_where_nothing_is_random(name):
    config = config_of(name)
    still = {"crop": (1.0, 1.0), "jitter": (0, 0, 0, 0), "grayscale_p": 0.0, "flip_p": 0.0, "jitter_p": 1.0}

    class Still(type(config)):
        augmentation = Augmentation(tuple(dataclasses.replace(view, **still) for view in config.augmentation.views))

    fixed = Still(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    source = peers_runs.in_memory("shapes", "train", 2)
    ours = next(Loader(source, fixed.augmentation, 2, train=False).epoch(0)).views
    transform = peers_lightly.PEERS[name][1](fixed)
    theirs = [torch.stack(views) for views in zip(*(transform(Image.fromarray(source.read(i))) for i in range(2)))]
    assert [view.shape for view in theirs] == [view.shape for view in ours]
    for mine, view in zip(ours, theirs):
        assert (mine - view).abs().max() < 0.03  # two levels of 255, in standard deviations


@pytest.mark.parametrize("name", METHODS)
def test_lightlys_views_have_our_numbers(name):
    config = config_of(name)
    made = peers_lightly.PEERS[name][1](config)
    views, v2 = config.augmentation.views, peers_lightly.v2
    parts = getattr(made, "transforms", [made])
    assert len(parts) == len(views)
    for view, part in zip(views, parts):
        steps = {type(step).__name__: step for step in part.transform.transforms}
        crop = steps["RandomResizedCrop"]
        assert tuple(crop.scale) == view.crop and tuple(crop.size) == view.size
        assert crop.interpolation == v2.InterpolationMode(view.interpolation)
        assert steps["RandomHorizontalFlip"].p == view.flip_p
        assert steps["Normalize"].mean == list(view.mean)
        if name == "mae":
            continue
        (jitter,) = steps["RandomApply"].transforms
        assert steps["RandomApply"].p == view.jitter_p and steps["RandomGrayscale"].p == view.grayscale_p
        assert steps["GaussianBlur"].prob == view.blur_p
        ranges = [jitter.brightness, jitter.contrast, jitter.saturation]
        assert ranges == [pytest.approx((1 - s, 1 + s)) for s in view.jitter[:3]]
        assert jitter.hue == pytest.approx((-view.jitter[3], view.jitter[3]))


def test_momentum_networks_follow_and_dinos_gradients_are_clipped():
    _, _, peer = both("dino")
    with torch.no_grad():
        peer.backbone.cls_token.add_(1)
    before = peer.teacher_backbone.cls_token.clone()
    peer.before_step(0, 100)
    moved = (peer.teacher_backbone.cls_token - before).mean().item()
    assert moved == pytest.approx(0.02, rel=1e-4)
    for p in peer.parameters():
        p.grad = torch.full_like(p, 10.0) if p.requires_grad else None
    peer.after_backward(0.0)
    norms = [p.grad.norm().item() for p in peer.parameters() if p.grad is not None]
    assert max(norms) == pytest.approx(3.0, rel=1e-4)
    assert peer.head.last_layer.weight_v.grad is None


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"POINTS": 2, "HELD_OUT": 20, "keep_freed_memory": lambda: None}.items():
        monkeypatch.setattr(peers_runs, name, value)


def test_both_libraries_start_from_one_encoder_and_learn(quick):
    rows = [measure(Cell("shapes", "simsiam", library, 3, 66, 2)) for library in peers_runs.LIBRARIES]
    for row in rows:
        assert (row["epochs"], row["training_images"], row["images_seen"]) == (2, 66, 128)
        assert [point[0] for point in row["curve"]] == [0, 1, 2]
        assert 0 < row["curve"][1][1] < row["curve"][2][1] == row["core_seconds"]
        assert row["images_per_second"] == pytest.approx(128 / row["core_seconds"], rel=0.05)
        json.dumps(row)
    assert rows[0]["curve"][0] == rows[1]["curve"][0] and rows[0]["knn_raw"] == rows[1]["knn_raw"]
    assert learning_peers.key(rows[0]) == Cell("shapes", "simsiam", "fastssl", 3, 66, 2).key


@pytest.mark.parametrize("name", ["simsiam", "mae"])
def test_lightlys_optimizer_has_our_numbers_in_every_step(name, quick):
    """Learning rates and weight decays of all groups, by size of the group, as in our trainer."""
    cell, source = Cell("shapes", name, "lightly", 0, 64), peers_runs.in_memory("shapes", "train", 64)
    config = peers_runs.config_of(cell)
    ours, theirs = (learner(cell, config, source) for learner in (peers_runs.Ours, peers_runs.Lightly))
    length = 64 // config.training.batch_size
    for step in (0, 3):
        ours.trainer.steps = step
        ours.trainer._set_schedules()
        theirs._set_schedules(step / length, length, step / length / config.training.epochs)
        groups = [
            [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            for optimizer in (ours.trainer.optimizer, theirs.optimizer)
        ]
        assert groups[0] == groups[1]


def row_of(**changes):
    row = dict.fromkeys(("epochs", "training_images", "held_out_images"), 10) | {"data": "shapes", "seed": 0}
    row |= {"method": "moco_v2", "library": "fastssl", "images": 64, "settings": "a", "images_per_second": 600.0}
    row |= {"knn_raw": 0.2, "knn_untrained": 0.3, "others": 0.0, "busy": False, "knn": 0.7}
    row["curve"] = [[0, 0.0, 0.3], [1, 60.0, 0.5], [2, 120.0, 0.7]]
    return row | changes


LIGHTLY = {"library": "lightly", "images_per_second": 300.0}
SLOW = LIGHTLY | {"knn": 0.6, "curve": [[0, 0.0, 0.3], [1, 120.0, 0.5], [2, 240.0, 0.6]]}


def cells(rows):
    (line,) = lines_of(rows)
    return peers_table._cells(line)


def test_a_line_compares_accuracy_speed_and_time_to_the_same_accuracy():
    rows = [row_of(), row_of(seed=1, knn=0.72), row_of(**SLOW), row_of(**SLOW, seed=1)]
    assert cells(rows) == [
        *("shapes", "`moco_v2`", "20.0, 30.0", "71.0 ± 1.4", "60.0 ± 0.0", "+11.0 ± 1.0", "600", "300", "2.0×"),
        *("2.0 / 4.0", "–", "1.5 / 4.0", "2.7×"),
    ]
    better = row_of(**LIGHTLY | {"knn": 0.8, "curve": [[0, 0.0, 0.3], [2, 240.0, 0.8]]})
    assert cells([row_of(), better])[-3:] == ["3.2", "2.0 / 3.2", "1.6×"]


def test_the_summary_names_what_differs():
    same = [row_of(seed=seed, knn=knn, method="mae") for seed, knn in enumerate((0.6, 0.7))]
    same += [row_of(**{**LIGHTLY, "seed": seed, "knn": knn}, method="mae") for seed, knn in enumerate((0.62, 0.7))]
    rows = [row_of(), row_of(seed=1, knn=0.72), row_of(**SLOW), row_of(**SLOW, seed=1)]
    (text,) = peers_table._summary(lines_of([*rows, *same]))
    assert text == (
        "fastssl trains on 2.0 times as many images per second as lightly. In 1 of 2 rows the accuracies differ by at "
        "most 2 standard errors, by more in `moco_v2` on shapes (+11.0 ± 1.0); fastssl's is the smaller in 1. The "
        "standard errors reach 6.4 points. To the same accuracy lightly takes 1.0 to 2.7 times as long as fastssl; it "
        "is there first in 0 of the 2 rows that rise above the untrained encoder."
    )
    assert peers_table._summary(lines_of([row_of(others=0.4), row_of(**SLOW)])) == []  # busy, and of one seed


def test_without_a_gain_there_is_no_time_to_it():
    lost = {"knn": 0.28, "curve": [[0, 0.0, 0.3], [2, 120.0, 0.28]]}
    assert cells([row_of(**lost), row_of(**SLOW)])[-3:] == ["–", "– / –", "–"]
    assert cells([row_of(), row_of(**LIGHTLY | lost)])[-3:] == ["–", "– / –", "–"]


def test_sources_have_the_order_in_which_they_were_measured():
    every = itertools.product(("z", "a"), ("mae", "moco_v2"), ("fastssl", "lightly"))
    rows = [row_of(data=data, method=method, library=library) for data, method, library in every]
    assert [line[:2] for line in lines_of(rows)] == [("z", "moco_v2"), ("z", "mae"), ("a", "moco_v2"), ("a", "mae")]


def test_a_disturbed_line_has_no_ratios():
    line = cells([row_of(others=0.4), row_of(**SLOW)])
    assert line[0] == "shapes (busy: 40%)" and line[8] == line[12] == "–"


def test_runs_of_other_settings_or_of_one_library_make_no_line():
    assert lines_of([row_of(), row_of(**SLOW, settings="b")]) == []


def test_the_picture_shows_each_line(tmp_path):
    rows = [row_of(), row_of(**SLOW), row_of(data="others", method="mae"), row_of(**SLOW, data="others", method="mae")]
    path = store.add(tmp_path, {"slug": "peers-x", "name": "X"}, SOFTWARE, rows, replaces=lambda row: False)
    assert peers_table.draw([path], tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 400
    assert not peers_table.draw([], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_minutes_to_an_accuracy():
    curve = [(0.0, 0.3), (1.0, 0.5), (2.0, 0.4), (3.0, 0.7)]
    assert [minutes_to(curve, target) for target in (0.2, 0.4, 0.5, 0.6, 0.8)] == [
        0.0,
        pytest.approx(0.5),
        1.0,
        pytest.approx(2 + 2 / 3),
        None,
    ]


SOFTWARE = {"level": "x", "torch": "2", "torchvision": "0", "timm": "1", "lightly": "1.6", "commit": "abc"}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """main with results and page in a folder, and runs that take no time; the cells that were run."""
    ran = []

    def run(measure, cells, jobs):
        for cell in cells:
            ran.append(cell)
            names = ("data", "method", "library", "seed", "images", "settings")
            yield cell, row_of(**dict(zip(names, cell.key)), core_seconds=1.0)

    monkeypatch.setattr(learning_peers, "run_pinned", run)
    monkeypatch.setattr(learning_peers, "environment", lambda: SOFTWARE)
    monkeypatch.setattr(learning_peers, "draw", lambda paths, target: bool(target.write_bytes(b"picture")))
    page = tmp_path / "page.md"
    page.write_text("\n".join(peers_table.MARKERS))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "sweep.json").write_text("[]")  # results of another kind
    return lambda *arguments: learning_peers.main(list(arguments), tmp_path / "kept", page), ran, page


def test_the_command_continues_where_it_stopped(command, monkeypatch):
    pytest.importorskip("cpuinfo")
    main, ran, page = command
    few = ("--methods", "moco_v2", "mae")
    assert main(*few, "--seeds", "0") == 0
    assert [(cell.method, cell.library) for cell in ran] == [
        (method, library) for method in ("moco_v2", "mae") for library in peers_runs.LIBRARIES
    ]
    assert main(*few, "--seeds", "0", "1") == 0 and [cell.seed for cell in ran[4:]] == [1] * 4
    assert main(*few, "--seeds", "0") == 0 and len(ran) == 8
    assert main("--methods", "mae", "--seeds", "0", "--again") == 0 and len(ran) == 10
    assert main("--check") == 0 and (page.parent / peers_table.PICTURE).is_file()
    assert page.read_text().count("| `mae` |") == 1 and r"seeds: moco\_v2 2, mae 2;" in page.read_text()
    (path,) = peers_table.files(page.parent / "kept")
    assert len(store.rows_of(path)) == 8
    monkeypatch.setattr(peers_runs, "settings", lambda cell: "changed")
    assert main("--methods", "mae", "--seeds", "0") == 0 and len(ran) == 12  # another preset: measured again
    assert len(store.rows_of(path)) == 8
    page.write_text(page.read_text().replace("| `moco_v2` |", "| `moco` |"))
    assert main("--check") == 1


def test_what_can_not_be_measured_is_refused_first(command, monkeypatch, capsys):
    main, ran, _ = command
    assert main("--data", "nothing") == 1 and "unknown source 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(learning_peers, "find_spec", lambda name: None)
    assert main() == 1 and "lightly is not installed" in capsys.readouterr().err
    assert ran == []


def test_sources_by_name_and_images_in_memory():
    assert peers_runs.short_name("idx:/usr/share/datasets/fashion-mnist/") == "fashion-mnist"
    assert peers_runs.short_name("shapes:count=5") == "shapes:count=5"
    source = peers_runs.in_memory("shapes", "train", 12)
    assert len(source) == 12 and source.label(11) == 1
    assert np.array_equal(source.read(3), peers_runs.open_source("shapes").read(3))


@pytest.mark.exhaustive
def test_runs_in_processes_of_their_own(quick):
    cells = [Cell("shapes", "simsiam", library, 0, 64, 1) for library in peers_runs.LIBRARIES]
    rows = [row for _, row in run_pinned(peers_runs.measure, cells, 2)]
    assert sorted(map(learning_peers.key, rows)) == sorted(cell.key for cell in cells)
