"""Attacks on run folders: whatever has happened to a file, a run goes on and names what was lost, or one sentence says
why it cannot; nothing else is raised, nothing hangs, no line of metrics or evaluations vanishes without a word."""

import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch

import fastssl
from fastssl.train import checkpoint, records
from tests.attack import runs
from tests.attack.runs import ACTIONS, ANY_FILE, attempt, content
from tests.support.ranks import start_process

LINES = ("metrics.jsonl", "evaluations.jsonl")
METHOD = "tests.support.toy_method"
exhaustive = pytest.mark.exhaustive


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Folder of a finished run; tests copy it."""
    return runs.make_run(tmp_path_factory.mktemp("attacked") / "run").folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def files(folder):
    """The files of a run by short names: those of checkpoints without their digests."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.name.split(".")[0] if path.suffix == ".pt" else path.name: path for path in paths}


NAMES = ("config.json", *LINES, "data.npz", "held-out.npz", "step-00000003", "step-00000006")


def check(action, folder, what):
    """Attempts an action and checks its outcome; what was printed and the refusal."""
    records._named.clear()  # a file with a bad line is named once in a process
    before = content(folder)
    printed, refusal = attempt(action, folder)
    if refusal:
        assert content(folder) == before, f"{what}: refused and yet changed something: {refusal}"
    else:
        check_lines(before, content(folder), what)
    return printed, refusal


def check_lines(before, after, what):
    """Every line of metrics and evaluations is still there, whatever it holds; only the beginning of a record at the
    end of a file, and records of steps that were made again, may have gone."""
    for name in set(before) & set(LINES):
        kept = set(after[name].split(b"\n"))
        for line in before[name].split(b"\n"):
            record = records._record(line, records.STEPS)
            remade = record is not None and record["step"] > 0  # a resumed run writes the lines of its steps again
            assert line in kept or remade or records._is_torn(line), f"{what}: {name} lost {line[:80]}"


def steps(folder):
    """The steps of metrics.jsonl, of the lines that hold a record."""
    return [record["step"] for record in records.read_records(folder / "metrics.jsonl")]


# Files


def mutations(count, chance):
    """(file, mutation, action): `count` random ones, or all of them."""
    actions = ("resume", "repeat", "knn", "export", "report") if count is None else ("resume", "repeat", "knn")
    every = list(itertools.product(NAMES, ANY_FILE, actions))
    return every if count is None else chance.sample(every, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [25, pytest.param(None, marks=exhaustive)])
def test_a_file_that_was_changed(whole, tmp_path, seed, count):
    chance = random.Random(seed)
    for number, (name, mutate, action) in enumerate(mutations(count, chance)):
        what = f"{mutate.__name__} {name}, then {action}"
        copy = shutil.copytree(whole, tmp_path / str(number))
        path = files(copy)[name]
        mutate(path, chance)
        printed, refusal = check(action, copy, what)
        if not refusal and action in ("resume", "repeat"):
            assert steps(copy)[-1] == 9, what
            check_named(name, mutate, path, printed, what)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("metrics.jsonl", runs.empty),
        ("metrics.jsonl", runs.remove),
        ("data.npz", runs.remove),
        ("step-00000006", runs.become_folder),
    ],
)
def test_what_was_lost_is_named(folder, seed, name, mutate):
    path = files(folder)[name]
    mutate(path, random.Random(seed))
    printed, refusal = check("resume", folder, name)
    assert not refusal
    check_named(name, mutate, path, printed, name)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("mutate", [runs.become_folder, runs.become_pipe, runs.become_link_to_nothing])
@pytest.mark.parametrize("action", ["resume", "knn"])
def test_what_takes_the_place_of_a_file_of_lines_is_refused_before_the_work(folder, seed, name, mutate, action):
    mutate(folder / name, random.Random(seed))
    _, refusal = check(action, folder, name)
    assert refusal == f"{folder / name} is no regular file: put the run's own back, or move it away"


def test_a_folder_in_the_place_of_an_old_checkpoint_does_not_end_the_run(folder, seed):
    path = files(folder)["step-00000003"]
    runs.become_folder(path, random.Random(seed))
    printed, refusal = check("resume", folder, "folder")
    assert not refusal
    assert f"checkpoint: {path} could not be deleted (Is a directory)" in printed
    assert steps(folder)[-1] == 9


def check_named(name, mutate, path, printed, what):
    """A run that goes on without a file, or without its end, has said so."""
    if name == "step-00000006":
        assert "resuming after step 3" in printed, what
        assert mutate is runs.remove or path.name in printed, what
    elif name == "metrics.jsonl" and mutate in (runs.empty, runs.remove):
        assert f"{path} has no lines of the steps 1 to 6: they have been lost" in printed, what
    elif name == "data.npz" and mutate is runs.remove:
        assert "has no data.npz" in printed, what


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("action", ["resume", pytest.param("knn", marks=exhaustive)])
def test_a_line_that_holds_no_record_is_named_and_kept(folder, seed, name, action):
    chance, path = random.Random(seed), folder / name
    for _ in range(3):
        runs.insert_line(path, chance)
    bad = [line for line in path.read_bytes().splitlines() if records._record(line, records.STEPS) is None]
    printed, refusal = check(action, folder, f"{name}, {action}")
    assert not refusal
    assert f"{path}: line " in printed
    left = path.read_bytes().splitlines()
    assert [line for line in left if line in bad] == bad


# Contents


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=exhaustive)])
def test_an_edited_config(whole, tmp_path, seed, count):
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        copy = shutil.copytree(whole, tmp_path / str(number))
        what = runs.change_config(copy / "config.json", chance)
        check(chance.choice(list(ACTIONS)[:4]), copy, f"number {number}: {what}")
        shutil.rmtree(copy)


@pytest.mark.slow
@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=exhaustive)])
def test_a_checkpoint_with_other_content_and_the_right_digest(whole, tmp_path, seed, count):
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        copy = shutil.copytree(whole, tmp_path / str(number))
        what = runs.change_checkpoint(checkpoint.files(copy / "checkpoints")[-1], chance)
        check(chance.choice(("resume", "resume", "repeat", "knn", "export")), copy, f"number {number}: {what}")
        shutil.rmtree(copy)


@pytest.mark.parametrize("part", list(checkpoint.PARTS))
def test_a_part_of_a_checkpoint_that_is_something_else(folder, part):
    newest = checkpoint.files(folder / "checkpoints")[-1]
    state = runs.read_checkpoint(newest)
    changed = runs.write_checkpoint(newest, {**state, part: ["foreign"]})
    printed, refusal = check("resume", folder, part)
    assert not refusal
    assert f"{changed.name} is no checkpoint of a run: its {part} is something else" in printed
    assert "resuming after step 3" in printed


@pytest.mark.parametrize("action", ["resume", "knn"])
def test_a_checkpoint_of_another_run_or_step(folder, tmp_path, action):
    """A checkpoint under another step's name, one of another run, and one that is renamed to be the newest."""
    older, newest = checkpoint.files(folder / "checkpoints")
    renamed = older.with_name(older.name.replace("step-00000003", "step-00000009"))
    shutil.copy(older, renamed)
    state = {**runs.read_checkpoint(newest), "run": "0123456789abcdef", "step": 12}
    foreign = shutil.copy(newest, newest.with_name(newest.name.replace("step-00000006", "step-00000012")))
    foreign = runs.write_checkpoint(foreign, state)
    printed, refusal = check(action, folder, "foreign checkpoints")
    assert not refusal
    assert f"{renamed.name} is of step 3, not of the step in its name" in printed
    assert f"{foreign.name} is of the run 0123456789abcdef, not of this one" in printed


# Processes


def outcome(process):
    process.join(120)  # a limit for hangs, also on a busy machine
    assert process.exitcode is not None
    return process.exitcode


def _in_new_session(action, folder):
    os.setsid()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    ACTIONS[action](folder)


def start(action, folder):
    return start_process(_in_new_session, action, folder)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["resume", "repeat"])
def test_of_two_processes_one_trains(folder, action):
    if action == "repeat":
        shutil.rmtree(folder)
    codes = [outcome(process) for process in [start(action, folder), start(action, folder)]]
    assert sorted(codes) == [0, 1] or (codes == [0, 0] and action == "repeat")  # the second found the first one's end
    assert steps(folder) == list(range(1, 10))
    assert not attempt("knn", folder)[1]


def _note(folder, name):
    for number in range(40):
        fastssl.open_run(folder).note(name, 6, number / 40, number=number)


@pytest.mark.slow
def test_evaluations_that_end_together_are_all_noted(folder):
    before = len(fastssl.open_run(folder).evaluations())
    assert [outcome(process) for process in [start_process(_note, folder, name) for name in ("a", "b")]] == [0, 0]
    assert len(fastssl.open_run(folder).evaluations()) == before + 80


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=exhaustive)])
def test_kills_at_random_moments_end_in_one_run(tmp_path, seed, rounds):
    """The same command is killed at random moments, also before its first step and while it ends, then left alone."""
    chance, killed = random.Random(seed), 0
    for name in ("first", "whole"):  # the first start takes longer, since it imports the package
        began = time.monotonic()
        assert outcome(start("long_run", tmp_path / name)) == 0
        seconds = time.monotonic() - began
    expected = checkpoint.load(tmp_path / "whole" / "checkpoints", METHOD)["model"]
    for number in range(rounds):
        folder = tmp_path / str(number)
        for _ in range(3):
            process = start("long_run", folder)
            process.join(chance.random() * seconds)
            killed += process.is_alive()
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            outcome(process)
        assert outcome(start("long_run", folder)) == 0
        assert steps(folder) == steps(tmp_path / "whole")
        weights = checkpoint.load(folder / "checkpoints", METHOD)["model"]
        assert all(torch.equal(x, expected[name]) for name, x in weights.items())
        assert not list(folder.rglob("*.writing")), "partial files of killed processes"
    assert killed >= rounds
