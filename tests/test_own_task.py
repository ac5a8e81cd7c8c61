"""A task of the user's own: a file of rows and ten lines of YAML, nothing else, train, export and predict."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.command import run

ROWS = [
    {"text": f"{word} thing number {number}", "label": label}
    for number in range(20)
    for word, label in (("good", "positive"), ("bad", "negative"))
]
TASK = """\
description: Is a short text positive or negative?
source: {source}
input: |-
  {{text}}
  Sentiment:
target: "{{label}}"
labels:
  positive: positive
  negative: negative
metrics: [accuracy, macro_f1]
"""
UPPER = """\
description: The first word, in capitals; free text, so it is generated and not chosen.
source: upper.jsonl
input: "Capitals: {word}"
target: "{capitals}"
max_new_tokens: 4
"""


def write_recipe(folder: Path, backbone: Path, tasks: Sequence[str], **data: object) -> None:
    recipe: Mapping[str, object] = {
        "name": "mine",
        "output": str(folder / "run"),
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "adaptation": {"adapters": [{"kind": "lora", "rank": 2, "alpha": 2}]},
        "data": {"tasks": list(tasks), "max_source_tokens": 128, "max_target_tokens": 16, **data},
        "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 4, "optimizer": {"warmup_steps": 1}},
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"enabled": False}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown_scores(page: str, tasks: Sequence[str]) -> dict[str, str]:
    """Return task -> the score in the column `trained` of the first table of a page."""
    lines = page.partition("\nmean ")[0].splitlines()
    (head,) = (line for line in lines if line.startswith("task") and "trained" in line)
    end = head.index("trained") + len("trained")
    return {line.split()[0]: line[:end].split()[-1] for line in lines if line.split()[:1] and line.split()[0] in tasks}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_jsonl_csv_and_parquet(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "lines.jsonl", ROWS)
    with (tmp_path / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "columns.parquet")
    sources = {"lines": "lines.jsonl", "table": "table.csv", "columns": "columns.parquet"}
    for name, source in sources.items():
        text = TASK.format(source=source)
        assert len(text.splitlines()) <= 10
        (tmp_path / f"{name}.yaml").write_text(text)
    write_rows(tmp_path / "upper.jsonl", [{"word": f"word{n}", "capitals": f"WORD{n}"} for n in range(20)])
    (tmp_path / "upper.yaml").write_text(UPPER)
    names = [*sources, "upper"]
    write_recipe(tmp_path, request.getfixturevalue(f"tiny_{family}_folder"), [f"{name}.yaml" for name in names])

    listed = run(capsys, "tasks", "--folder", tmp_path)
    files = [line.split()[0] for line in listed.out.splitlines() if " file " in line]
    assert [name for name in files if name in names] == sorted(names)
    valid = run(capsys, "validate", tmp_path / "recipe.yaml")
    assert valid.code == 0, valid.err
    assert valid.out.startswith("lines         36 training rows       4 validation rows\n")

    trained = run(capsys, "train", tmp_path / "recipe.yaml", "--launcher", "local")
    assert trained.code == 0, trained.err
    scores = shown_scores(trained.out, names)
    assert list(scores) == names
    evaluated = run(capsys, "evaluate", tmp_path / "run")
    assert evaluated.code == 0, evaluated.err
    assert shown_scores(evaluated.out, names) == scores

    exported = run(capsys, "export", tmp_path / "run", "--output", tmp_path / "elsewhere", "--task", "table")
    assert exported.out == f"table\t{tmp_path / 'elsewhere' / 'table'}\n"
    weights = "table/adapter_model.safetensors"
    assert (tmp_path / "elsewhere" / weights).read_bytes() == (tmp_path / "run" / "bundles" / weights).read_bytes()

    bundles = [tmp_path / "run" / "bundles" / name for name in names]
    questions = [{"task": name, **row, "word": "word"} for row in ROWS[:3] for name in names]
    write_rows(tmp_path / "questions.jsonl", questions)
    answers = tmp_path / "answers.jsonl"
    predicted = run(capsys, "predict", *bundles, "--input", tmp_path / "questions.jsonl", "--output", answers)
    assert predicted.code == 0, predicted.err
    answered = read_rows(answers)
    assert [{**row, "prediction": ""} for row in answered] == [{**row, "prediction": ""} for row in questions]
    chosen = {row["prediction"] for row in answered if row["task"] != "upper"}
    assert chosen <= {"positive", "negative"}
    single = run(capsys, "predict", bundles[1], "--input", tmp_path / "table.csv", "--output", tmp_path / "one.jsonl")
    assert single.out == f"40 rows answered in {tmp_path / 'one.jsonl'}\n"


TREC = """\
description: What kind of answer does a question ask for?
source: ${HYPERSCALE_TASK_DATA}/trec
input: "Question: {text}\\nKind of answer:"
target: "{label}"
labels: {0: abbreviation, 1: entity, 2: description, 3: person, 4: place, 5: number}
"""
SST2 = """\
description: Is a sentence of a movie review positive or negative?
source: ${HYPERSCALE_TASK_DATA}/sst2
input: "Review: {sentence}\\nSentiment:"
target: "{label}"
labels: {0: negative, 1: positive}
not_with: [movies]
"""


@pytest.mark.usefixtures("task_data")
def test_trec_and_sst2(tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trec.yaml").write_text(TREC)
    (tmp_path / "sst2.yaml").write_text(SST2)
    write_recipe(tmp_path, tiny_llama_folder, ["trec.yaml", "sst2.yaml"], train_limit=200, validation_limit=40)
    trained = run(capsys, "train", tmp_path / "recipe.yaml", "--launcher", "local")
    assert trained.code == 0, trained.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    last = result["evaluations"][-1]
    assert last["samples"]["trec"] == 40
    assert 30 <= last["samples"]["sst2"] <= 40  # a long sentence is left out
    assert set(result["bundles"]) == {"trec", "sst2"}
    write_rows(tmp_path / "questions.jsonl", [{"text": "Who wrote Hamlet ?"}])
    answers = tmp_path / "answers.jsonl"
    bundle = result["bundles"]["trec"]
    predicted = run(capsys, "predict", bundle, "--input", tmp_path / "questions.jsonl", "--output", answers)
    assert predicted.code == 0, predicted.err
    words = yaml.safe_load(TREC)["labels"].values()
    assert read_rows(answers)[0]["prediction"] in words
