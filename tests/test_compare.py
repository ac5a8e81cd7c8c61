"""Methods, learning rates and seeds with equal budgets: what runs, what runs only once, how sure a difference is."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from hyperscale.config.comparison import load_comparison
from hyperscale.data.bootstrap import draw, interval, resampled_scores
from hyperscale.data.metrics import score
from hyperscale.data.tasks import Task
from hyperscale.launch.compare import check_comparison, make_trial
from hyperscale.launch.predictions import read_predictions
from tests.command import run

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

COMPARISON = {
    "name": "two",
    "output": "results",
    "recipe": "recipe.yaml",
    "settings": {"training.steps": 4},
    "methods": {
        "hypernetwork": {},
        "shared": {"settings": {"adaptation.generator.kind": "shared"}},
        "alone": {"settings": {"adaptation.generator.kind": "independent"}, "single_task": True},
    },
    "baseline": "shared",
    "learning_rates": [0.001, 0.01],
    "seeds": [1, 2],
    "resamples": 200,
}
RUNS = 2 * (2 + 2) + 2 * (2 + 2)
"""Two methods of one run a trial and one of two, each with two rates and two seeds."""


def write_task(folder: Path, name: str, words: dict[str, str]) -> None:
    (folder / name).mkdir()
    for split, count in (("train", 24), ("validation", 6), ("test", 8)):
        rows = [
            {"text": f"{word} {split} thing number {number}", "label": label}
            for number in range(count // 2)
            for word, label in words.items()
        ]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"source": name, "input": "{text}\nIs:", "target": "{label}", "metrics": ["accuracy"]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"labels": {word: word for word in words.values()}}))


@pytest.fixture
def place(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_task(tmp_path, "mood", {"good": "positive", "bad": "negative"})
    write_task(tmp_path, "size", {"huge": "large", "tiny": "small"})
    recipe = {
        "name": "any",
        "output": "any",
        "backbone": {"name": str(tiny_llama_folder), "dtype": "float32"},
        "adaptation": {"adapters": [{"kind": "lora", "rank": 2, "alpha": 2}]},
        "data": {"tasks": ["mood.yaml", "size.yaml"]},
        "training": {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "optimizer": {"warmup_steps": 1}},
        "engine": {"kind": "local"},
        "tracking": {"mlflow": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(COMPARISON, sort_keys=False))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_comparison_runs_once_and_says_who_is_better(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "comparison.yaml"
    dry = run(capsys, "compare", file, "--launcher", "local", "--dry-run")
    assert dry.out == f"valid: 3 methods, {RUNS} runs in {place}/results\n"
    assert not (place / "results").exists()

    part = run(capsys, "compare", file, "--launcher", "local", "--only", "alone")
    assert part.code == 0, part.err
    assert part.out == "trained: alone; the same command without --only writes the table\n"
    assert {folder.name.split("_")[0] for folder in (place / "results/runs").iterdir()} == {"alone"}
    assert not (place / "results/comparison.md").exists()
    of_part = {folder: (folder / "result.json").stat().st_mtime_ns for folder in (place / "results/runs").iterdir()}

    compared = run(capsys, "compare", file, "--launcher", "local")
    assert compared.code == 0, compared.err
    assert {folder: (folder / "result.json").stat().st_mtime_ns for folder in of_part} == of_part
    assert compared.out == (place / "results/comparison.md").read_text()
    folders = sorted((place / "results/runs").iterdir())
    assert len(folders) == RUNS
    report = json.loads((place / "results/comparison.json").read_text())
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == ["hypernetwork", "shared", "alone"]
    for method, row in rows.items():
        assert row["search"][str(row["learning_rate"])] == max(row["search"].values())
        assert len(row["means"]) == 2
        assert f"| {method} |" in compared.out
    assert rows["shared"]["interval"] == [0.0, 0.0]
    single = json.loads(
        (place / "results/runs").joinpath(f"alone_lr{rate_of(rows['alone'])}_seed1_mood", "result.json").read_text()
    )
    assert single["steps"] == 2, "a single-task run has its share of the steps"
    assert rows["alone"]["parameters_per_task"] == single["trained_parameters"]
    assert rows["shared"]["parameters_per_task"] == single["trained_parameters"] / 2

    # A score of the table, from the rows on disk.
    folder = place / "results/runs" / f"hypernetwork_lr{rate_of(rows['hypernetwork'])}_seed2"
    found = read_predictions(str(folder), "test")["mood"]
    assert len(found.references) == 8
    hits = sum(a.strip() == b.strip() for a, b in zip(found.references, found.predictions, strict=True))
    assert rows["hypernetwork"]["task_scores"]["mood"][1] == pytest.approx(100 * hits / 8)

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (recorded,) = [
        one
        for one in client.search_runs([client.get_experiment_by_name("hyperscale").experiment_id])
        if one.info.run_name == "two"
    ]
    assert recorded.data.metrics["compare/shared/mean"] == pytest.approx(np.mean(rows["shared"]["means"]))
    assert {file.path for file in client.list_artifacts(recorded.info.run_id)} == {"comparison.md", "comparison.json"}

    # Again: nothing is trained twice, and the table is the same; a run that is gone is trained again, to the same bits.
    before = {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}
    gone = place / "results/runs" / f"shared_lr{rate_of(rows['shared'])}_seed1"
    kept = (gone / "predictions/test.jsonl").read_bytes()
    for path in sorted(gone.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    again = run(capsys, "compare", file, "--launcher", "local")
    assert again.code == 0, again.err
    after = {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}
    assert [folder for folder in folders if before[folder] != after[folder]] == [gone]
    assert (gone / "predictions/test.jsonl").read_bytes() == kept
    scores = [line.split("|")[1:8] for line in again.out.splitlines() if line.startswith("| ")]
    assert scores == [line.split("|")[1:8] for line in compared.out.splitlines() if line.startswith("| ")]

    # Other settings under the same names are not taken for these.
    file.write_text(yaml.safe_dump(COMPARISON | {"settings": {"training.steps": 6}}, sort_keys=False))
    refused = run(capsys, "compare", file, "--launcher", "local")
    assert refused.code != 0
    assert "holds a run of other settings (training.steps was 4, is 6)" in refused.errors[0]


def rate_of(row: dict[str, float]) -> str:
    return f"{row['learning_rate']:g}"


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"baseline": "share"},
            "baseline 'share' is none of the methods hypernetwork, shared, alone. Did you mean 'shared'?",
        ),
        ({"seeds": [0, 1]}, "search_seed 0 is among seeds; the final seeds must be fresh"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates lists a value more than once"),
        ({"learning_rate": 1}, "learning_rate: unknown key (value 1). Did you mean 'learning_rates'?"),
        ({"settings": {"training.stpes": 4}}, "training.stpes: unknown key (value 4). Did you mean 'steps'?"),
        ({"settings": {"training.steps": 3}}, "single_task divides training.steps 3 among 2 tasks"),
        ({"recipe": "reciep.yaml"}, "recipe file 'reciep.yaml' does not exist"),
    ],
)
def test_a_wrong_comparison(
    changes: dict[str, object], fragment: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "comparison.yaml").write_text(yaml.safe_dump(COMPARISON | changes, sort_keys=False))
    refused = run(capsys, "compare", place / "comparison.yaml", "--launcher", "local")
    assert refused.code == 2
    assert any(fragment in line for line in refused.errors), refused.err
    assert not (place / "results").exists()


def test_only_a_method_that_there_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = run(capsys, "compare", place / "comparison.yaml", "--only", "shard")
    assert refused.code == 2
    assert "--only shard is none of the methods hypernetwork, shared, alone. Did you mean 'shared'?" in refused.err


def test_rates_and_seeds_are_all_that_differs(place: Path) -> None:
    comparison = load_comparison(place / "comparison.yaml")
    searched = make_trial(comparison, "shared", 0.01, comparison.search_seed).recipes[0]
    assert not searched.training.evaluate_test, "nothing is chosen by the test rows"
    one, other = (make_trial(comparison, "shared", 0.01, seed).recipes[0] for seed in (1, 2))
    assert one.model_copy(update={"seed": 2, "name": other.name, "output": other.output}) == other
    assert one.training.evaluate_test
    assert one.data.tasks == (str(place / "mood.yaml"), str(place / "size.yaml"))


def test_resampling_against_scoring_row_by_row() -> None:
    generator = np.random.default_rng(0)
    words = ["yes", "no"]
    references = [words[number] for number in generator.integers(0, 2, 50)]
    runs = [[words[number] for number in generator.integers(0, 2, 50)] for _ in range(2)]
    rows = draw(generator, 20, 50)
    assert rows.shape == (20, 50)
    assert rows.min() >= 0
    assert rows.max() == 49
    for metric in ("accuracy", "macro_f1", "mcc"):
        task = Task(
            name="x",
            source="x",
            input="{a}",
            target="{b}",
            labels={"yes": "yes", "no": "no"},
            label_column="b",
            metrics=[metric],
        )
        found = resampled_scores(task, references, runs, rows)
        plain = [
            [score(task, [run[row] for row in drawn], [references[row] for row in drawn])[metric] for drawn in rows]
            for run in runs
        ]
        assert found == pytest.approx(np.array(plain))
    low, high = interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25.0, 975.0))


COMPARISONS = sorted(
    file
    for file in Path(__file__).parents[1].joinpath("benchmarks/comparisons").glob("*.yaml")
    if "methods:" in file.read_text()
)


@pytest.mark.parametrize("file", COMPARISONS, ids=[file.stem for file in COMPARISONS])
def test_the_comparisons_of_the_benchmarks_are_valid_and_fair(file: Path):
    comparison = load_comparison(file)
    check_comparison(comparison)
    trials = [make_trial(comparison, method, 0.001, 1).recipes for method in comparison.methods]
    samples = {sum(one.training.steps * one.training.batch_size for one in recipes) for recipes in trials}
    tasks = {tuple(task for one in recipes for task in one.data.tasks) for recipes in trials}
    assert len(samples) == len(tasks) == 1
    assert len(comparison.learning_rates) == 3
    assert len(comparison.seeds) >= 3
