"""Bundles answer rows as the trained model did, on a machine that has nothing of training."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hyperscale as hs
from hyperscale.checkpoint.store import load_checkpoint
from hyperscale.cli import main
from hyperscale.config.run import Recipe
from hyperscale.data.corpus import Corpus
from hyperscale.data.examples import renderer
from hyperscale.data.rows import read_rows
from hyperscale.engine.base import Engine
from hyperscale.errors import BundleError, DataError
from hyperscale.inference.answers import Answerer, Question
from hyperscale.launch.local import train_in_process
from hyperscale.run.context import RunResult
from tests import tiny
from tests.runs import CPU, TASKS, corpus_of, engine_of, make_recipe, write_tasks

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "llama": [  # leaves as native bundles
        {"kind": "lora"},
        {"kind": "ia3"},
        {"kind": "bottleneck", "reduction": 4, "layer_norm": True},
        {"kind": "norm_delta"},
        {"kind": "prefix", "length": 3},
    ],
    "t5": [{"kind": "lora", "alpha": 16, "targets": ["q", "cross_v"]}],  # leaves as PEFT folders
}


@dataclass(frozen=True)
class Finished:
    """A run, the rows of its validation splits as a user would have them, and what it answered to them."""

    recipe: Recipe
    result: RunResult
    rows: list[dict[str, Any]]
    answers: list[str]
    untouched: list[str]
    """What the backbone alone answers."""

    def bundles(self, *tasks: str) -> list[str]:
        return [self.result.bundles[task] for task in tasks or TASKS]


@pytest.fixture(scope="module", params=["llama-nf4", "t5", "t5-int8"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    family, _, quantization = request.param.partition("-")
    folder = tmp_path_factory.mktemp("run")
    backbone = request.getfixturevalue(f"tiny_{family}_folder")
    recipe = make_recipe(
        backbone,
        write_tasks(folder / "tasks"),
        folder / "run",
        backbone={"name": str(backbone), "dtype": "float32", "quantization": quantization or "none"},
        adaptation={"adapters": ADAPTERS[family]},
        training={
            "steps": 4,
            "batch_size": 8,
            "optimizer": {"learning_rate": 5e-4, "warmup_steps": 0},
        },
    )
    result = train_in_process(recipe, resume=False)
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    engine.load_state(load_checkpoint(result.checkpoint).tensors)
    return Finished(recipe, result, validation_rows(recipe, corpus), *evaluated(engine, corpus))


def validation_rows(recipe: Recipe, corpus: Corpus) -> list[dict[str, Any]]:
    rows_of_tasks = []
    for path, loaded in zip(recipe.data.tasks, corpus.tasks, strict=True):
        render = renderer(loaded.task)
        rows = {render.prompt(row): row.values for row in read_rows(Path(path).with_suffix(".jsonl"))}
        rows_of_tasks += [{"task": loaded.task.name, **rows[one.source]} for one in loaded.validation.examples]
    return rows_of_tasks


def evaluated(engine: Engine, corpus: Corpus) -> tuple[list[str], list[str]]:
    tokenizers = [loaded.tokenizer for loaded in corpus.tasks]
    answerer = Answerer(engine.model, engine.collective, CPU, tokenizers, corpus.layout, 5, lambda *_: None)
    questions = [
        Question(index, encoded, example.candidates)
        for index, loaded in enumerate(corpus.tasks)
        for example, encoded in zip(loaded.validation.examples, loaded.validation.encoded, strict=True)
    ]
    with engine.evaluating():
        return answerer(questions), answerer(questions, adapted=False)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_the_evaluations_answers(run: Finished, tmp_path: Path):
    assert len(set(run.answers)) > 2
    assert run.answers != run.untouched
    scores = run.result.evaluations[-1]["scores"]["feeling"]["accuracy"]
    words = {"good": "positive", "bad": "negative"}
    pairs = [(row, answer) for row, answer in zip(run.rows, run.answers, strict=True) if row["task"] == "feeling"]
    assert scores == pytest.approx(100 * sum(words[row["label"]] == answer for row, answer in pairs) / len(pairs))

    order = sorted(range(len(run.rows)), key=lambda number: number * 7 % len(run.rows))  # tasks in any order
    mixed = write_rows(tmp_path / "mixed.jsonl", [run.rows[number] for number in order])
    output = tmp_path / "answers.jsonl"
    arguments = ["--input", mixed, "--output", str(output), "--batch-size", "5"]
    assert main(["predict", *run.bundles(), *arguments]) == 0
    assert read(output) == [{**run.rows[number], "prediction": run.answers[number]} for number in order]

    alone = [(row, answer) for row, answer in zip(run.rows, run.answers, strict=True) if row["task"] == "plural"]
    single = write_rows(tmp_path / "plural.jsonl", [{"word": row["word"]} for row, _ in alone])
    assert main(["predict", *run.bundles("plural"), "--input", single, "--output", str(output)]) == 0
    assert [row["prediction"] for row in read(output)] == [answer for _, answer in alone]


def test_wrong_rows_and_bundles_of_predict_are_errors(
    run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = {"task": "past", "word": "walk"}
    output = tmp_path / "answers.jsonl"
    output.write_text("the answers of yesterday\n")
    file = tmp_path / "rows.jsonl"
    another = tiny.tiny_llama(tmp_path / "another", hidden_size=16)
    one, several = run.bundles("past"), run.bundles()
    long = {"word": "walk " * 500}
    for bundles, rows, options, message in [
        (one, [good, {"text": "walk"}], [], f"{file}:2: "),
        (several, [good, good, {"word": "walk"}], [], f"{file}:3: several bundles are loaded, so each row's 'task'"),
        (several, [{"task": "pasd", "word": "walk"}], [], f"{file}:1: several bundles are loaded"),
        (one, [good, long], [], f"{file}:2: the prompt has"),
        (one, [], [], f"{file} has no rows"),
        (one, [good], ["--backbone", str(another)], f"{another} is another model"),
        (one, [good], ["--batch-size", "0"], "--batch-size 0"),
        ([str(tmp_path)], [good], [], "is not a bundle: it has no hyperscale.json"),
        (one, [good], ["--output", str(tmp_path / "none" / "x.jsonl")], "none does not exist"),
    ]:
        write_rows(file, rows)
        assert main(["predict", *bundles, "--input", str(file), "--output", str(output), *options]) != 0
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert message in error[0]
    assert output.read_text() == "the answers of yesterday\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "answers.jsonl", "rows.jsonl"]


SERVE = """
import sys
from hyperscale.cli import main
assert main(sys.argv[1:]) == 0
loaded = {name.partition(".")[0] for name in sys.modules}
print("LOADED", *sorted(loaded & {"torch", "deepspeed", "ray", "mlflow", "peft"}))
"""


@pytest.mark.parametrize("run", ["t5"], indirect=True)
def test_a_serving_machine_needs_nothing_of_training(run: Finished, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"word": "walk"}])
    arguments = ["predict", *run.bundles("past"), "--input", rows, "--output", str(tmp_path / "answers.jsonl")]
    done = subprocess.run([sys.executable, "-c", SERVE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED", "torch"]
    assert len(read(tmp_path / "answers.jsonl")) == 1


def test_python_gives_the_same_answers(run: Finished):
    bundles = hs.load_bundles(run.bundles())
    assert bundles.predict(run.rows, batch_size=5) == run.answers
    plural = [(row, answer) for row, answer in zip(run.rows, run.answers, strict=True) if row["task"] == "plural"]
    words = [{"word": row["word"]} for row, _ in plural]
    assert bundles.predict(words, task="plural") == [answer for _, answer in plural]
    prompts = [f"Plural of {row['word']}:" for row in words]
    assert bundles.generate(prompts, "plural", max_new_tokens=1) != bundles.generate(prompts, "plural")


def test_bundles_are_added_and_removed_while_loaded(run: Finished):
    bundles = hs.load_bundles(run.bundles("past"))
    with pytest.raises(BundleError, match=r"no bundle of task 'plural' is loaded\. Loaded: past"):
        bundles.predict([{"word": "city"}], task="plural")
    assert [bundles.add(folder) for folder in run.bundles("plural", "feeling")] == ["plural", "feeling"]
    assert bundles.predict(run.rows) == run.answers
    with pytest.raises(BundleError, match="a bundle of task 'plural' is loaded already"):
        bundles.add(run.bundles("plural")[0])
    bundles.remove("past")
    assert bundles.tasks == ("plural", "feeling")
    left = [(row, answer) for row, answer in zip(run.rows, run.answers, strict=True) if row["task"] != "past"]
    assert bundles.predict([row for row, _ in left]) == [answer for _, answer in left]
    with pytest.raises(DataError, match=r"row 0: several bundles are loaded"):
        bundles.predict([{"task": "past", "word": "walk"}])


def test_bundles_of_other_sites_are_not_mixed(run: Finished, tmp_path: Path):
    bundles = hs.load_bundles(run.bundles("past"))
    copy = tmp_path / "other"
    shutil.copytree(run.bundles("plural")[0], copy)
    manifest = json.loads((copy / "hyperscale.json").read_text())
    manifest["backbone"]["digest"] = "0" * 64
    (copy / "hyperscale.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"other has another backbone than the bundle of task 'past'"):
        bundles.add(copy)
    with pytest.raises(BundleError, match="give at least one bundle folder"):
        hs.load_bundles([])
    with pytest.raises(ValueError, match="2 tasks for 1 prompts"):
        bundles.generate(["x"], ["past", "past"])
