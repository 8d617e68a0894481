"""benchmarks/learning: sweeps, measurements, the check and the sabotages, on a few images."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import few_labels
from benchmarks.learning import __main__ as command
from benchmarks.learning import check, measure, results, sabotage, sweep, table, trial
from benchmarks.learning.grids import GRIDS
from fastssl.bounds import check_ranges
from fastssl.eval.few_labels_table import PRETRAINED, ROWS, Measured
from fastssl.method_modules import method_names
from fastssl.settings import update

ROW = {
    "length": "preset",
    "seed": 0,
    "data": trial.DATA,
    "command": "fastssl pretrain simclr_v1",
    "recipe": trial.recipe("simclr_v1"),
    "epochs": 14,
    "images_seen": 57344,
    "seconds": 90.0,
    "score": "knn",
    "raw": 0.2,
    "untrained": 0.15,
    "trained": 0.55,
    "rankme": 30.0,
    "curve": {"loss": [[1.0, 5.0]], "knn": [[0.0, 0.15], [14.0, 0.55]]},
    "warnings": [],
}


@pytest.fixture
def about(monkeypatch):
    facts = {"machine": "M", "date": "2026-11-28", "commit": "c", "torch": "2", "python": "3", "level": "avx2"}
    monkeypatch.setattr(results, "about", lambda: facts)


@pytest.fixture
def in_this_process(monkeypatch):
    """Trials run here, one after the other, on a core that is not chosen."""
    for module in (measure, check, sabotage, sweep):
        monkeypatch.setattr(module, "run_all", lambda trials, _: ((one, trial.run_trial(one)) for one in trials))


def add(folder, **changes):
    row = {**ROW, **changes}
    results.add("simclr_v1", row, lambda old: (old["length"], old["seed"]) == (row["length"], row["seed"]), key, folder)


def key(row):
    return (row["length"], row["seed"])


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_a_grid_of_settings_in_range(method):
    preset = trial.preset(method)
    for settings in sweep.configurations(sweep.grids_of(method, [])):
        (changed,) = update((preset,), settings, "sweep")
        check_ranges(changed, "sweep")
    assert set(GRIDS) == set(method_names())
    assert len(sweep.configurations(sweep.grids_of(method, []))) >= 4


def test_a_grid_from_words():
    words = ["lr=0.4,0.8", "--batch-size=32", "jitter=(0.4,0.4,0.2,0.5),(0,0,0,0)", "optimizer=sgd,adamw"]
    grid = sweep.parse_grid(words, "simclr_v1")
    assert grid == {
        "lr": (0.4, 0.8),
        "batch_size": (32,),
        "jitter": ((0.4, 0.4, 0.2, 0.5), (0, 0, 0, 0)),
        "optimizer": ("sgd", "adamw"),
    }
    assert sweep.grids_of("mae", []) == [GRIDS["mae"]]
    both = sweep.grids_of("mae", [["lr=1,2", "optimizer=sgd"], ["lr=0.1", "optimizer=adamw"]])
    assert [config["lr"] for config in sweep.configurations(both)] == [1, 2, 0.1]
    with pytest.raises(ValueError, match="takes settings of simclr_v1 as NAME=VALUE,VALUE, got 'rate=3'"):
        sweep.parse_grid(["rate=3"], "simclr_v1")
    assert sweep.parse_changes([], ["mae", "byol"]) == {}
    assert sweep.parse_changes(["lr=0.1", "betas=(0.9,0.95)"], ["mae", "byol"]) == {"lr": 0.1, "betas": [0.9, 0.95]}
    with pytest.raises(ValueError, match="measure: --set takes settings of byol as"):
        sweep.parse_changes(["mask_ratio=0.5"], ["mae", "byol"])
    with pytest.raises(ValueError, match="measure: --set takes one value of each setting, got 'lr=1,2'"):
        sweep.parse_changes(["lr=1,2"], ["mae"])


def test_a_plan_sees_so_many_images():
    assert sweep.plan("simclr_v1", 100_000) == (f"{trial.DATA}:count=4096,seed=1", 24)
    assert sweep.plan("simclr_v1", 8_000) == (f"{trial.DATA}:count=2000,seed=1", 4)
    assert sweep.plan("clip", 8_000) == ("captions:count=2000,seed=1", 4)
    assert sweep.plan("instdisc", 8_000) == (f"{trial.DATA}:count=800,seed=1", 10)


def test_a_measurement_is_written_once_and_is_the_commands(tmp_path, about, in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(measure, "QUICK_IMAGES", 64)
    measure.measure(["simclr_v1"], [3], 1, "quick", folder=tmp_path)
    (row,) = results.read("simclr_v1", tmp_path)
    assert row["command"] == f"fastssl pretrain simclr_v1 --data {trial.DATA}:count=64 --seed 3"
    assert (row["seed"], row["images_seen"], row["score"], row["machine"]) == (3, 640, "knn", "M")
    assert all(0 <= row[name] <= 1 for name in ("raw", "untrained", "trained", "deviation", "rank_entropy"))
    assert [epoch for epoch, _ in row["curve"]["knn"]] == [0, 10]
    assert row["seconds"] > 0 and row["evaluation_seconds"] > 0
    assert capsys.readouterr().out.startswith("simclr_v1, seed 3: kNN raw ")

    changes = {"batch_size": 16}
    measure.measure(["simclr_v1"], [3], 1, "quick", changes=changes, folder=tmp_path)
    rows = results.read("simclr_v1", tmp_path)
    assert [row.get("changes") for row in rows] == [None, changes]  # beside the preset
    assert rows[1]["command"].endswith("--seed 3 --batch-size 16") and rows[0]["recipe"]["batch_size"] != 16
    assert measure.stated("simclr_v1", "quick", tmp_path, changes) == rows[1:]

    monkeypatch.setattr(measure, "run_all", lambda trials, _: iter([pytest.fail("again")] if trials else []))
    measure.measure(["simclr_v1"], [3], 1, "quick", folder=tmp_path)  # nothing is missing
    measure.measure(["simclr_v1"], [3], 1, "quick", changes=changes, folder=tmp_path)
    assert measure.stated("simclr_v1", "quick", tmp_path) == rows[:1]
    monkeypatch.setattr(measure, "recipe", lambda *_: {"another": "recipe"})
    assert measure.stated("simclr_v1", "quick", tmp_path) == []


def test_a_run_that_fails_is_a_row_with_its_reason():
    row = trial.run_trial(trial.Trial("simclr_v1", "nowhere:x"))
    assert "nowhere" in row["failed"] and measure.line("simclr_v1", row).startswith("simclr_v1, seed 0: ")
    assert check.judge("simclr_v1", row, 0.2, set()).startswith("simclr_v1: the run failed: ")


def test_halving_keeps_the_best_third(tmp_path, about, monkeypatch):
    def ran(trials, _):
        for one in trials:
            images = int(one.data.partition("count=")[2].partition(",")[0]) * one.settings["epochs"]
            row = {"seed": 0, "recipe": trial.recipe(one.method, one.settings), "score": "knn", "images_seen": images}
            yield one, {**row, "seconds": images / 100, "trained": one.settings.get("lr", 0)}

    monkeypatch.setattr(sweep, "run_all", ran)
    grid = [{"lr": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), "jitter": ((0.4, 0.4, 0.2, 0.5),)}]
    rows = sweep.sweep("simclr_v1", grid, 90, 1, folder=tmp_path)
    assert [(row["budget"], row["settings"]["lr"]) for row in rows[:4]] == [(90, 0.7), (30, 0.7), (30, 0.6), (30, 0.5)]
    assert len(rows) == 7 + 3 + 1
    assert results.read("sweep-simclr_v1", tmp_path)[0]["settings"]["lr"] == 0.7
    monkeypatch.setattr(sweep, "run_all", lambda trials, _: pytest.fail("again") if len(trials) > 1 else ran(trials, 1))
    again = sweep.sweep("simclr_v1", grid, 90, 1, folder=tmp_path)  # all is stored but the speed
    assert again == [{**row, **results.about()} for row in rows]


def test_the_check_wants_two_thirds_of_the_least_stated_lift(tmp_path, about, monkeypatch, capsys):
    quick = measure.trial_of("simclr_v1", "quick", 0)
    facts = {"length": "quick", "data": quick.source, "recipe": trial.recipe("simclr_v1", quick.settings)}
    for seed, trained in enumerate((0.55, 0.45)):
        add(tmp_path, seed=seed, trained=trained, **facts)
    assert check.stated_lift("simclr_v1", "quick", tmp_path) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no lift is stated for the present recipe of mae: run `python -m"):
        check.check(["mae"], 1, folder=tmp_path)
    for trained, lost in ((0.36, 0), (0.34, 1)):
        monkeypatch.setattr(check, "run_all", lambda trials, _, t=trained: [(x, {**ROW, "trained": t}) for x in trials])
        assert len(check.check(["simclr_v1"], 1, "quick", folder=tmp_path)) == lost
    assert "training added 19.0 points, less than two thirds of the stated 30.0." in capsys.readouterr().out


def test_the_check_wants_no_new_warning(tmp_path, about, monkeypatch, capsys):
    quick = measure.trial_of("simclr_v1", "quick", 0)
    facts = {"length": "quick", "data": quick.source, "recipe": trial.recipe("simclr_v1", quick.settings)}
    add(tmp_path, **facts, warnings=["the contrast looks lost: 1.0% in epoch 2."])
    for warnings, lost in (
        (["the contrast looks lost: 3.0% in epoch 9."], 0),
        (["the embeddings look redundant: 0.9."], 1),
    ):
        row = {**ROW, "warnings": warnings}
        monkeypatch.setattr(check, "run_all", lambda trials, _, row=row: [(one, row) for one in trials])
        assert len(check.check(["simclr_v1"], 1, "quick", folder=tmp_path)) == lost
    said = "simclr_v1: training added 40.0 points, with a warning that the measured runs lack: the embeddings look"
    assert said in capsys.readouterr().out


def test_every_sabotage_replaces_what_exists_and_ends(monkeypatch):
    for name, made in sabotage.SABOTAGES.items():
        before = [(target, attribute, getattr(target, attribute)) for target, attribute, _ in made.patches()]
        with sabotage.sabotaged(name):
            assert all(getattr(target, attribute) is not value for target, attribute, value in before)
        assert all(getattr(target, attribute) is value for target, attribute, value in before)
        assert set(made.methods) <= set(method_names())
        for method in made.methods:
            update((trial.preset(method),), made.settings, "sabotage")


def test_a_sabotage_is_run_and_written(tmp_path, about, in_this_process, monkeypatch):
    monkeypatch.setattr(measure, "QUICK_IMAGES", 64)
    one = measure.trial_of("simclr_v1", "quick", 0)
    add(tmp_path, length="quick", data=one.source, recipe=trial.recipe("simclr_v1", one.settings))
    (row,) = sabotage.sabotage(["lr-0"], ["simclr_v1"], 1, "quick", folder=tmp_path)
    assert row["sabotage"] == "lr-0" and row["recipe"]["lr"] == 0.0 and "lift" in sabotage.caught_by(row, tmp_path)
    assert results.read("sabotage", tmp_path) == [{**row, **results.about()}]
    assert "| learning rate 0 | `simclr_v1`, quick | +40.0 |" in table.render_sabotage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sabotage, "run_all", lambda trials, processes: [pytest.fail("measured again")] if trials else [])
        assert sabotage.sabotage(["lr-0"], ["simclr_v1"], 1, "quick", folder=tmp_path)[0]["lift"] == row["lift"]
    add(tmp_path, length="quick", data=one.source, recipe=trial.recipe("simclr_v1", one.settings), seed=1, trained=0.2)
    assert "| learning rate 0 | `simclr_v1`, quick | +5.0 |" in table.render_sabotage(
        tmp_path
    )  # the least of the seeds
    results.add("sabotage", {**row, "recipe": {}}, lambda old: True, lambda row: (), tmp_path)
    assert table.render_sabotage(tmp_path).startswith("No measurements yet")  # of another recipe


def test_the_table_has_means_and_spread_and_is_checked(tmp_path, about, capsys):
    page = tmp_path / "page.md"
    page.write_text("\n".join([*table.MARKERS, *table.FEW_MARKERS, *table.TEXT_MARKERS, *table.SABOTAGE_MARKERS, ""]))
    recipe = trial.recipe("simclr_v1")
    for seed, trained in enumerate((0.5, 0.6, 0.55)):
        draws = (seed + 1) / 10, (seed + 2) / 10  # two seeds share a draw
        few = [Measured(*row, 100, (0.25, trained) if row[0] == PRETRAINED else draws)._asdict() for row in ROWS]
        add(tmp_path, seed=seed, trained=trained, recipe=recipe, few_labels=few)
    add(tmp_path, seed=3, trained=0.9, recipe={**recipe, "lr": 9.0})  # of a former preset
    add(tmp_path, seed=4, trained=0.35, recipe=trial.recipe("simclr_v1", {"lr": 0.1}), changes={"lr": 0.1})
    figure = tmp_path / "curves.png"
    assert table.write(False, tmp_path, page, figure) == 0 and figure.stat().st_size > 1000
    line, changed, few = (line for line in page.read_text().splitlines() if line.startswith("| `simclr_v1"))
    known, pretrained = "25.0% ± 12.9%", "40.0% ± 16.7%"  # of four draws, and of two of each seed
    assert few == f"| `simclr_v1` | 3 | 100 | {known} | {known} | {pretrained} | {pretrained} | {pretrained} |"
    cells = f"| `simclr_v1` | {trial.DATA} | 57,344 | 1.5 | 20.0 % | 15.0 % | **55.0 ± 5.0 %** | +40.0 | – | 30.0 |"
    assert line == cells
    assert changed.startswith("| `simclr_v1 --lr 0.1` | ") and "**35.0 %** (1 seed)" in changed
    assert table.write(True, tmp_path, page, figure) == 0
    page.write_text(page.read_text().replace("55.0 ±", "65.0 ±"))
    assert table.write(True, tmp_path, page, figure) == 1
    assert "is out of date: run `python -m benchmarks.learning table`" in capsys.readouterr().err


def test_the_table_of_images_and_text_has_recalls(tmp_path, about):
    for seed, share in enumerate((0.2, 0.4)):
        recall = {"image_to_text": [share, 0.5, 0.7], "text_to_image": [0.1, 0.5, 0.8]}
        facts = {"score": "retrieval", "recall": recall, "zeroshot": 0.25, "knn": [0.5, share]}
        row = {**ROW, "seed": seed, "data": trial.CAPTIONS, "recipe": trial.recipe("clip"), **facts}
        results.add("clip", row, lambda old, seed=seed: old["seed"] == seed, key, tmp_path)
    (line,) = [line for line in table.render_text(tmp_path).splitlines() if line.startswith("| `clip`")]
    recalls = "30.0 ± 14.1, 50.0 ± 0.0, 70.0 ± 0.0 | 10.0 ± 0.0, 50.0 ± 0.0, 80.0 ± 0.0"
    assert line == f"| `clip` | 25.0 ± 0.0 | {recalls} | 50.0 ± 0.0 | 30.0 ± 14.1 |"


def test_unknown_names_are_refused(capsys):
    assert command.main(["measure", "nobody"]) == 1
    assert "benchmarks.learning: unknown method 'nobody', there are albef" in capsys.readouterr().err
    assert command.main(["sabotage", "nothing"]) == 1
    assert "unknown sabotage 'nothing', there are lr-0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", measure.IN_TESTS)
def test_a_method_still_learns(method, in_this_process):
    assert check.check([method], 1, "quick") == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", measure.IN_TESTS)
def test_the_quick_check_notices_a_learning_rate_of_0(method, in_this_process):
    one = dataclasses.replace(measure.trial_of(method, "quick", 0), sabotage="lr-0")
    row = trial.run_trial(dataclasses.replace(one, settings={**one.settings, "lr": 0.0}))
    assert "less than two thirds" in check.judge(method, row, check.stated_lift(method, "quick"), set())


@pytest.mark.exhaustive
def test_trials_have_processes_of_their_own(tmp_path):
    """Two processes of the command, as a user starts it."""
    script = f"""
import json
from benchmarks.learning.trial import Trial, run_all
if __name__ == "__main__":
    trials = [Trial("simclr_v1", "{trial.DATA}:count=64", {{"epochs": 1}}, bank="{trial.DATA}:count=64") for _ in "ab"]
    print(json.dumps([row for _, row in run_all(trials, 2)]))
"""
    (tmp_path / "two.py").write_text(script)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, tmp_path / "two.py"], capture_output=True, text=True, cwd=root, env=environment
    )
    first, second = json.loads(done.stdout)
    assert first["trained"] == second["trained"] and first["curve"] == second["curve"]


def test_a_sweep_with_few_labels_keeps_the_results_of_other_options(tmp_path, monkeypatch, capsys):
    run = SimpleNamespace(short_name="mae", method_name="mae", options=SimpleNamespace(data="patterns"))
    monkeypatch.setattr(few_labels, "open_run", lambda folder: run)
    monkeypatch.setattr(few_labels, "sweep", lambda run, options: [{"lr": options.lrs[0]}])
    words = ["runs/mae", "--out", str(tmp_path / "sweep.json"), "--lrs"]
    few_labels.main([*words, "0.1"])
    few_labels.main([*words, "0.1"])  # the same sweep again
    with pytest.raises(SystemExit):
        few_labels.main([*words, "0.2"])
    assert "holds a sweep with other options" in capsys.readouterr().err
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == [{"lr": 0.1}]
