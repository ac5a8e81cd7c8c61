"""Rows become examples; every error in them names its file and line; no text is in two splits."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hyperscale.data.division import text_key
from hyperscale.data.examples import Example
from hyperscale.data.rows import Row, read_rows
from hyperscale.data.sources import TaskData, load_task_data
from hyperscale.data.tasks import Task, load_task
from hyperscale.errors import DataError


def task(source: Any, **fields: Any) -> Task:
    values = {"name": "t", "source": source, "input": "{text}?"} | fields
    return Task.model_validate(
        values if {"target", "labels", "label_column"} & values.keys() else values | {"target": "{y}"}
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "y": number % 2} for number in range(start, start + count)]


def assert_no_text_twice(data: TaskData) -> None:
    keys = [{text_key(example.source) for example in examples} for examples in data.splits.values()]
    assert len(set().union(*keys)) == sum(map(len, keys))


def test_jsonl_csv_tsv_and_parquet_give_the_same_examples(tmp_path: Path):
    rows = [{"text": f'a "quoted",\n text {number}', "y": number % 3} for number in range(30)]
    write_rows(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        lines = [separator.join(('"' + row["text"].replace('"', '""') + '"', str(row["y"]))) for row in rows]
        (tmp_path / f"a.{suffix}").write_text(f"\ufefftext{separator}y\r\n" + "\r\n".join(lines), encoding="utf-8")
    digests = set()
    for suffix in ("jsonl", "csv", "tsv", "parquet"):
        data = load_task_data(
            task(str(tmp_path / f"a.{suffix}"), labels={0: "zero", 1: "one", 2: "two"}, label_column="y")
        )
        assert data.source == f"file:{tmp_path / 'a.'}{suffix}"
        assert {example.target for example in data.splits["train"]} == {"zero", "one", "two"}
        assert data.splits["train"][0].candidates == ("zero", "one", "two")
        digests.add(data.digest)
    assert len(digests) == 1
    # the rows of the quoted CSV span two lines each: errors must still point at the right one
    assert [row.where for row in read_rows(tmp_path / "a.csv")][:2] == [f"{tmp_path}/a.csv:3", f"{tmp_path}/a.csv:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x", "y": 1}\n\n{"text": "x", y: 1}\n', "a.jsonl:3: not valid JSON"),
        ("a.jsonl", b'[{"text": "x"},\n', "a.jsonl:1: not valid JSON.*write one object a line"),
        ("a.jsonl", b'{"text": "x", "y": 1}\n"word"\n', "a.jsonl:2: a row must be a JSON object, not str"),
        ("a.jsonl", b'{"text": "\xff", "y": 1}\n', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800", "y": 1}\n', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n\n", "has no rows for train"),
        (
            "a.jsonl",
            b'{"test": "x", "y": 1}\n',
            "a.jsonl:1: the input of task 't' needs column 'text'.*Did you mean 'test'",
        ),
        ("a.jsonl", b'{"text": "x"}\n', "a.jsonl:1: the target of task 't' needs column 'y'.*Columns: text"),
        ("a.jsonl", b'{"text": null, "y": 1}\n', "a.jsonl:1: column 'text', used by the input of task 't', is null"),
        ("a.jsonl", b'{"text": "x", "y": " "}\n', "a.jsonl:1: the answer of task 't' is empty"),
        ("a.jsonl", b'{"text": "x", "y": 1}\n' * 5, "no validation rows are left"),
        ("a.csv", b"text,y\nx,1\nx,1,2\n", "a.csv:3: 3 fields where the header has 2: text, y"),
        ("a.csv", b'text,y\n"x,1\n', "a.csv:2: malformed"),
        ("a.csv", b"text,y\nx,1\n\xff,1\n", "a.csv:.*: not UTF-8"),
        ("a.csv", b"", "has no rows for train"),
        ("a.parquet", b"no parquet", "a.parquet: not a readable Parquet file"),
        ("a.xlsx", b"", r"unknown kind of file '.xlsx'; rows are read from .jsonl"),
    ],
)
def test_wrong_rows_are_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_task_data(task(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_wrong_sources_and_labels_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        load_task_data(task(str(tmp_path / "none.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no train file"):
        load_task_data(task(str(tmp_path / "empty")))
    with pytest.raises(DataError, match=r"environment variable NO_SUCH_FOLDER, .* is not set"):
        load_task_data(task("${NO_SUCH_FOLDER}/x"))
    rows = write_rows(tmp_path / "a.jsonl", [*numbered(20), {"text": "x", "y": 7}])
    with pytest.raises(DataError, match=r"a\.jsonl:21: unknown label '7' in column 'y'; known: 0, 1"):
        load_task_data(task(str(rows), labels={0: "even", 1: "odd"}, label_column="y"))
    with pytest.raises(DataError, match="the label of task 't' needs column 'label'"):
        load_task_data(task(str(rows), labels={0: "even", 1: "odd"}))
    constant = write_rows(tmp_path / "b.jsonl", [{"text": f"{number}", "y": "same"} for number in range(9)])
    with pytest.raises(DataError, match="holds only one value, 'same'"):
        load_task_data(task(str(constant), label_column="y"))
    free = write_rows(tmp_path / "c.jsonl", [{"text": f"{number}", "y": f"answer {number}"} for number in range(300)])
    with pytest.raises(DataError, match=r"holds 300 different values; score it as text"):
        load_task_data(task(str(free), label_column="y"))
    with pytest.raises(DataError, match=r"There is no packaged data set"):
        load_task_data(task({"asset": "nothing", "subset": "x"}))


def test_labels_come_from_the_data_when_the_file_lists_none(tmp_path: Path):
    rows = write_rows(tmp_path / "a.jsonl", [{"text": f"{n}", "y": ["cat", "dog", 3.0][n % 3]} for n in range(30)])
    data = load_task_data(task(str(rows), label_column="y", target="It is a {label}."))
    assert data.task.labels == {"3": "3", "cat": "cat", "dog": "dog"}
    assert data.splits["train"][0].candidates == ("It is a 3.", "It is a cat.", "It is a dog.")


def test_validation_is_carved_by_text_whatever_the_order(tmp_path: Path):
    rows = [*numbered(200), {"text": "  TEXT   7", "y": 1}]  # the same text to a reader
    forward = load_task_data(task(str(write_rows(tmp_path / "a.jsonl", rows))))
    backward = load_task_data(task(str(write_rows(tmp_path / "b.jsonl", rows[::-1]))))
    assert_no_text_twice(forward)
    assert len({text_key(example.source) for example in forward.splits["validation"]}) == 20
    assert set(forward.splits["validation"]) == set(backward.splits["validation"])
    assert set(forward.splits["train"]) | set(forward.splits["validation"]) == {
        Example(f"{row['text']}?", str(row["y"]), ()) for row in rows
    }
    assert forward == load_task_data(forward.task)


def test_given_splits_share_no_text_and_limits_choose_by_hash(tmp_path: Path):
    write_rows(tmp_path / "train.jsonl", numbered(100))
    write_rows(tmp_path / "validation.jsonl", numbered(30, start=90))
    write_rows(tmp_path / "test.jsonl", numbered(10, start=115))
    data = load_task_data(task(str(tmp_path)))
    assert_no_text_twice(data)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 90, "validation": 25, "test": 10}
    few = load_task_data(task(str(tmp_path)), train_limit=20, validation_limit=5)
    assert {split: len(rows) for split, rows in few.splits.items()} == {"train": 20, "validation": 5, "test": 10}
    assert set(few.splits["train"]) < set(data.splits["train"])
    assert few.splits["train"] != data.splits["train"][:20]
    assert few.digest != data.digest
    write_rows(tmp_path / "train.jsonl", numbered(10, start=92))
    with pytest.raises(DataError, match="no train rows are left"):
        load_task_data(task(str(tmp_path)))


def test_a_hub_data_set_replaces_label_numbers_by_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    folder = tmp_path / "set"
    folder.mkdir()
    for split, labels in (("train", [0, 1] * 20), ("test", [-1] * 4)):
        rows = {"text": [f"{split} {number}" for number in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    source = {"kind": "hub", "path": str(folder)}
    data = load_task_data(task(source, label_column="label"))
    assert data.source == f"hub:{folder}"
    assert data.splits.keys() == {"train", "validation"}  # the hidden labels of test are none
    assert data.task.labels == {"bad": "bad", "good": "good"}
    numbers = load_task_data(task(source, labels={0: "awful", 1: "fine"}))
    assert {example.target for example in numbers.splits["train"]} == {"awful", "fine"}
    with pytest.raises(DataError, match=r"no split 'trian'\. Did you mean 'train'\?"):
        load_task_data(task(source | {"splits": {"train": "trian"}}, label_column="label"))
    with pytest.raises(DataError, match="hub:no-such/data: cannot be loaded") as caught:
        load_task_data(task({"kind": "hub", "path": "no-such/data"}))
    assert "\n" not in str(caught.value)


def test_real_tasks_of_a_few_lines(task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(task_data))
    names = "{0: abbreviation, 1: entity, 2: description, 3: person, 4: place, 5: number}"
    files = {
        "trec": f'input: "{{text}}\\nType:"\nlabels: {names}',
        "sst2": 'input: "{sentence}\\nSentiment:"\nlabels: {0: negative, 1: positive}',
        "mrpc": 'input: "{sentence1} / {sentence2}"\nlabels: {0: "no", 1: "yes"}\nmetrics: [f1, accuracy]',
        "stsb": 'input: "{sentence1} / {sentence2}"\ntarget: "{label}"\nmetrics: [pearson, spearman]',
        "atis": 'input: "{tokens}"\nlabel_column: intent',
        "mit_movie": 'input: "{tokens}"\ntarget: "{tags}"\nmetrics: span_f1',
    }
    data = {}
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(f'source: "${{HYPERSCALE_TASK_DATA}}/{name}"\n{text}\n')
        data[name] = load_task_data(load_task(str(path)), train_limit=2000)
        assert_no_text_twice(data[name])
    assert data["trec"].splits["train"][0].source.endswith("?\nType:")
    assert {example.target for example in data["trec"].splits["test"]} == set(data["trec"].splits["test"][0].candidates)
    assert len(data["trec"].splits["test"]) == 500
    assert len(data["sst2"].splits["validation"]) == 872
    assert len(data["sst2"].splits["train"]) == 2000
    assert data["mrpc"].task.positive_label == "yes"
    assert len(data["atis"].splits["train"][0].candidates) == 26
    assert float(data["stsb"].splits["test"][0].target) <= 5
    tagged = data["mit_movie"].splits["test"][0]
    assert len(tagged.source.split()) == len(tagged.target.split())


def test_rows_know_where_they_stand(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbered(3)), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet"))[2] == Row({"text": "text 2", "y": 0}, f"{tmp_path}/a.parquet:row 3")
    (tmp_path / "b.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 2}')
    assert [(row.where[-2:], row.values["a"]) for row in read_rows(tmp_path / "b.jsonl")] == [(":1", 1), (":3", 2)]
