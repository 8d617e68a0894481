"""benchmarks/store.py: what is written is read, and a new measurement replaces what it repeats."""

import pytest

from benchmarks import store

MACHINE = {"slug": "m", "name": "M", "cores": 2}


def replaces(op):
    return lambda row: row["op"] == op


def test_a_new_measurement_replaces_the_old_one_and_leaves_the_others(tmp_path):
    folder = tmp_path / "results"
    path = store.add(folder, MACHINE, {"date": "1"}, [{"op": "a", "ms": 1}, {"op": "b", "ms": 2}], replaces("a"))
    assert path == folder / "m.json"
    store.add(folder, MACHINE, {"date": "2"}, [{"op": "a", "ms": 3}], replaces("a"))
    assert store.read(path) == {
        "machine": MACHINE,
        "runs": [
            {"environment": {"date": "1"}, "rows": [{"op": "b", "ms": 2}]},
            {"environment": {"date": "2"}, "rows": [{"op": "a", "ms": 3}]},
        ],
    }
    store.add(folder, MACHINE, {"date": "2"}, [{"op": "b", "ms": 4}], replaces("b"))  # a run without rows goes
    assert store.read(path)["runs"] == [
        {"environment": {"date": "2"}, "rows": [{"op": "a", "ms": 3}, {"op": "b", "ms": 4}]}
    ]
    assert [row["ms"] for row in store.rows_of(path)] == [3, 4]


def test_facts_of_a_run_are_kept(tmp_path):
    path = store.add(tmp_path, MACHINE, {}, [{"op": "a"}], replaces("a"), start_up={"first": 1.5})
    store.add(tmp_path, MACHINE, {}, [{"op": "b"}], replaces("b"), start_up={"first": 2.5})
    assert [run["start_up"]["first"] for run in store.read(path)["runs"]] == [1.5, 2.5]


def test_files_of_the_machines_that_a_text_names(tmp_path):
    for slug, name in (("b", "Two"), ("a", "One")):
        store.add(tmp_path, {"slug": slug, "name": name}, {}, [{"op": "é"}], replaces("x"))
    assert [path.name for path in store.machine_files(tmp_path)] == ["a.json", "b.json"]
    assert [path.name for path in store.machine_files(tmp_path, "**Two** · 1 thread")] == ["b.json"]
    assert store.read(tmp_path / "c.json")["runs"] == []


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(store.RESULTS.rglob("*.json"))
        if path.parent.name != "learning" or path.stem.startswith("peers-")  # others there have formats of their own
    ],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_the_kept_results_are_as_the_store_writes_them(path):
    """So that the next measurement changes the lines of its rows alone."""
    document = store.read(path)
    assert store.as_text(document["machine"], document["runs"]) == path.read_text()
