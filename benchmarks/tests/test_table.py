"""Tables of measurements in the documentation are written by the scripts, from the results in the repository."""

import json
import shutil

import pytest

from benchmarks import demo, learning_peers, loader, long_run, memory, step, table
from benchmarks.learning import __main__ as learning


def test_tables_are_those_of_the_results():
    assert table.main(["--check"]) == 0
    assert loader.main(["--check"]) == 0
    assert step.main(["--check"]) == 0
    assert memory.main(["--check"]) == 0
    assert learning.main(["table", "--check"]) == 0
    assert learning_peers.main(["--check"]) == 0
    assert long_run.main(["--check"]) == 0
    assert demo.main(["--check"]) == 0


@pytest.fixture
def pages(tmp_path):
    """Copies of README, the page of measurements and the results."""
    results = tmp_path / "results"
    shutil.copytree(table.RESULTS, results)
    summary, page = (tmp_path / path.name for path in (table.SUMMARY, table.PAGE))
    shutil.copy(table.SUMMARY, summary)
    shutil.copy(table.PAGE, page)
    return results, (summary, page)


def check(pages) -> int:
    results, (summary, page) = pages
    return table.main(["--check"], results, (summary, page))


def test_results_of_a_new_machine_do_not_make_the_tables_stale(pages):
    results, _ = pages
    document = json.loads((results / "nvidia-h200.json").read_text())
    document["machine"] |= {"slug": "new", "name": "A new machine"}
    (results / "new.json").write_text(json.dumps(document))
    assert check(pages) == 0


def test_a_changed_row_makes_a_table_stale(pages, capsys):
    results, (_, page) = pages
    path = results / "nvidia-h200.json"
    document = json.loads(path.read_text())
    document["runs"][0]["rows"][0]["ms"]["ours"] = [1, 2, 3]
    path.write_text(json.dumps(document))
    assert check(pages) == 1
    assert f"{page} is out of date" in capsys.readouterr().err


def test_a_number_changed_by_hand_makes_readme_stale(pages, capsys):
    _, (summary, _) = pages
    row = next(line for line in summary.read_text().splitlines() if line.startswith("| training step"))
    summary.write_text(summary.read_text().replace(row, row.replace("3", "4")))
    assert check(pages) == 1
    assert f"{summary} is out of date" in capsys.readouterr().err


def test_a_missing_headline_row_is_named(pages, capsys):
    results, _ = pages
    (results / "step" / "nvidia-h200.json").unlink()
    assert check(pages) == 1
    assert "nvidia-h200.json must hold an undisturbed row with" in capsys.readouterr().err


def test_times_with_default_allocation_are_a_column_where_they_were_measured(pages, tmp_path):
    results, _ = pages
    document = json.loads((results / "amd-epyc-2-cores.json").read_text())
    rows = [row for run in document["runs"] for row in run["rows"] if row["family"] == "masking"][:2]
    rows = [{key: value for key, value in row.items() if key != "default_allocation"} for row in rows]
    machine = {"machine": document["machine"], "environment": document["runs"][0]["environment"]}

    def raw(name, rows, machine=machine):
        entries = [{"fullname": "benchmarks/test_masking.py::test", "extra_info": row} for row in rows]
        path = tmp_path / name
        path.write_text(json.dumps({"machine_info": {"fastssl": machine}, "benchmarks": entries}))
        return path

    slow = {**rows[0], "ms": {**rows[0]["ms"], "ours": [6, 7, 8]}, "ratio": dict.fromkeys(rows[0]["ratio"], 2.1)}
    path = table.add_run(raw("kept.json", rows), results, raw("default.json", [slow]))
    lines = [line for line in table.render([path]).splitlines() if f"| {rows[0]['size']} |" in line]
    assert [line for line in lines if line.endswith("| 7.00 · 2.1× · 2.1× |")]
    others = [line for line in table.render([path]).splitlines() if f"| {rows[1]['size']} |" in line]
    assert others and all(line.endswith("| – |") for line in others)
    elsewhere = raw("elsewhere.json", [slow], {**machine, "machine": {**document["machine"], "slug": "new"}})
    with pytest.raises(table.Problem, match="must be of the same machine and software"):
        table.add_run(raw("kept.json", rows), results, elsewhere)


def test_times_with_default_allocation_alone_are_refused(capsys):
    with pytest.raises(SystemExit):
        table.main(["--default-allocation", "default.json"])
    assert "--default-allocation must come with the run whose rows it completes" in capsys.readouterr().err
