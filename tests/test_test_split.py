"""The test split: kept apart until it is asked for, then scored like any other, its answers on disk."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from hyperscale.checkpoint.store import CheckpointStore, load_checkpoint
from hyperscale.run.context import read_result
from hyperscale.run.predictions import read_predictions
from tests.command import run

TASK = {"input": "{text}\nIs:", "labels": {"good": "positive", "bad": "negative"}, "label_column": "label"}


@pytest.fixture
def place(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    (tmp_path / "mood").mkdir()
    for split, count in (("train", 20), ("validation", 6), ("test", 10)):
        rows = [
            json.dumps({"text": f"a {label} {split} thing\u2028number {number}", "label": label}, ensure_ascii=False)
            for number in range(count // 2)
            for label in ("good", "bad")
        ]
        (tmp_path / "mood" / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump(TASK | {"source": "mood"}))
    (tmp_path / "untested.yaml").write_text(yaml.safe_dump(TASK | {"source": "mood/train.jsonl"}))
    recipe = {
        "name": "any",
        "output": str(tmp_path / "run"),
        "backbone": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "data": {"tasks": ["mood.yaml"], "test_limit": 8},
        "training": {
            "steps": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "evaluate_test": True,
            "optimizer": {"warmup_steps": 1},
        },
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"enabled": False}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_scored_at_the_end_and_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run(capsys, "train", place / "recipe.yaml", "--launcher", "local")
    assert trained.code == 0, trained.err
    records = {record["stage"]: record for record in read_result(str(place / "run")).evaluations}
    assert list(records) == ["majority", "untouched", "validation", "test"]
    assert records["test"]["samples"] == {"mood": 8}
    assert records["validation"]["samples"] == {"mood": 6}

    for stage in ("untouched", "validation", "test"):
        answers = read_predictions(str(place / "run"), stage)["mood"]
        hits = [a.strip() == b.strip() for a, b in zip(answers.references, answers.predictions, strict=True)]
        assert records[stage]["scores"]["mood"]["accuracy"] == pytest.approx(100 * sum(hits) / len(hits))
    lines = (place / "run/predictions/test.jsonl").read_text().split("\n")[:-1]
    assert all("test thing" in json.loads(line)["input"] for line in lines)

    again = run(capsys, "evaluate", place / "run", "--split", "test")
    assert again.code == 0, again.err
    (line,) = (line for line in again.out.splitlines() if line.startswith("mood"))
    assert line.split()[2] == "8"
    assert line.split()[-1] == f"{records['test']['scores']['mood']['accuracy']:.1f}"


def test_a_task_without_test_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = f"data.tasks=[{place / 'untested.yaml'}]"
    outcome = run(capsys, "train", place / "recipe.yaml", "--launcher", "local", tasks)
    assert outcome.code != 0
    (message,) = outcome.errors
    assert message.startswith(
        f"task 'untested' has no test rows (file:{place / 'mood/train.jsonl'}); score the validation"
    )
    assert not (place / "run").exists()
    assert (
        run(capsys, "train", place / "recipe.yaml", "--launcher", "local", tasks, "training.evaluate_test=false").code
        == 0
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_checkpoint_of_a_gpu_run_is_evaluated_on_a_cpu(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run(capsys, "train", place / "recipe.yaml", "--launcher", "local")
    assert trained.code == 0, trained.err
    checkpoint = load_checkpoint(read_result(str(place / "run")).checkpoint)
    cluster = {**checkpoint.recipe["cluster"], "gpus_per_worker": 1.0}
    of_gpu = dataclasses.replace(checkpoint, recipe={**checkpoint.recipe, "cluster": cluster})
    CheckpointStore(str(place / "gpu"), keep=1).save(of_gpu)

    scored = run(capsys, "evaluate", place / "run")
    on_cpu = run(capsys, "evaluate", place / "gpu")
    assert on_cpu.code == 0, on_cpu.err
    assert on_cpu.out == scored.out
    assert "the run used GPUs, but this machine has no CUDA device: evaluating on the CPU" in on_cpu.err
    assert "evaluating on the CPU" not in scored.err
    chosen = run(capsys, "evaluate", place / "gpu", "--device", "cpu", "data.validation_limit=2")
    assert chosen.code == 0, chosen.err
    assert "evaluating on the CPU" not in chosen.err
    outcome = run(capsys, "evaluate", place / "gpu", "--device", "cuda")
    assert outcome.code == 1
    assert "sees no CUDA device" in outcome.errors[0]
