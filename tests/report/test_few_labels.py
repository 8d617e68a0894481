"""Accuracy against the number of labels in the report: from the records alone."""

import json

import pytest

from fastssl.methods import mae
from fastssl.report import few_labels, tables
from fastssl.report.run_data import RunData
from tests.support.runs import make_run

ROWS = [
    ("raw pixels", "knn"),
    ("scratch", "finetune"),
    ("pretrained", "knn"),
    ("pretrained", "linear"),
    ("pretrained", "finetune"),
]


def opened(folder, records):
    run = make_run(folder, mae, "digits", trained=False)
    (run.folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return RunData(run, "run", "#123456")


def record(row, labels, *accuracies, **facts):
    line = {"evaluation": "few labels", "step": 30, "data": "digits", "draws": len(accuracies), "seed": 0}
    named = {"start": row[0], "classifier": row[1], "labels": labels}
    return {**line, **named, "accuracy": sum(accuracies) / len(accuracies), "accuracies": accuracies, **facts}


def test_picture_table_and_sentences(tmp_path):
    records = [record(row, n, 0.1 * i, 0.1 * i + 0.02) for i, row in enumerate(ROWS, 1) for n in (100, 10)]
    older = [record(row, 10, 0.9, 0.9, step=20) for row in ROWS] + [record(ROWS[0], 1000, 0.9, data="shapes")]
    run = opened(tmp_path / "run", older + records)
    picture, table, text = few_labels.parts(run)
    assert table.head == ["", "10 labels", "100 labels"]
    assert table.rows[0] == ["raw pixels, kNN", "11.0% ± 1.4%", "11.0% ± 1.4%"]
    assert table.rows[-1][0] == "mae, fine-tuned"
    assert text.text.startswith("With 100 labels, training from scratch reaches ")
    assert "by mae without labels, reaches 51% fine-tuned, 41% by a linear classifier and 31% by kNN;" in text.text
    assert picture.alt.startswith("accuracy by number of labels; with 100 labels: raw pixels, kNN 11.0%, trained from")
    assert [name for *_, name in picture.legend] == [row[0] for row in table.rows]
    assert picture.light.startswith("data:image/svg+xml;base64,") and picture.light != picture.dark
    assert tables.evaluations([run]) is None  # they have a table of their own


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"evaluation": "knn", "step": 1, "accuracy": 0.5}],
        [{"evaluation": "few labels", "step": 1, "accuracy": 0.5}],
        [record(("surprise", "of mine"), 10, 0.5)],
        [record((["raw pixels"], {"knn": 1}), 10, 0.5)],
        [record(ROWS[0], "<script>", 0.5), record(ROWS[0], -3, 0.5)],
        [record(ROWS[0], 10, 0.5, accuracies="0.5"), record(ROWS[0], 10, 0.5, accuracies=[None])],
    ],
)
def test_records_without_the_table_have_no_section(tmp_path, records):
    assert few_labels.parts(opened(tmp_path / "run", records)) == []


def test_a_part_of_the_rows_has_no_sentence(tmp_path):
    run = opened(tmp_path / "run", [record(ROWS[1], 10, 0.5)])
    _, table = few_labels.parts(run)
    assert table.rows == [["trained from scratch", "50.0%"]]
