"""Methods, learning rates and seeds with equal budgets: what runs, what runs only once, how sure a difference is."""

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from hyperscale.cli import main
from hyperscale.compare.intervals import draw, interval, resampled_scores, seed_interval
from hyperscale.compare.schedule import check_comparison, make_trial, run_comparison
from hyperscale.compare.table import MethodSummary
from hyperscale.config.comparison import Comparison, load_comparison
from hyperscale.config.loading import dump_recipe, render_recipe
from hyperscale.config.run import Recipe
from hyperscale.data.metric_table import METRICS
from hyperscale.data.metrics import compute
from hyperscale.errors import ConfigError, ResourceError
from hyperscale.launch.local import train_in_child
from hyperscale.run.context import RunResult
from hyperscale.run.predictions import read_predictions
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
    write_place(tmp_path, tiny_llama_folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write_place(tmp_path: Path, tiny_llama_folder: Path) -> None:
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


@dataclass(frozen=True)
class Compared:
    """One comparison: a dry run, one method of it, a dry run, all of it. Its folder is not to be written to."""

    place: Path
    outputs: tuple[str, str, str, str]
    of_part: dict[Path, int]
    """Run folder of the one method -> when its result was written."""
    rows: dict[str, dict[str, Any]]

    @property
    def folders(self) -> list[Path]:
        return sorted((self.place / "results/runs").iterdir())

    @property
    def example(self) -> Path:
        return self.place / "results/runs" / f"hypernetwork_lr{rate_of(self.rows['hypernetwork'])}_seed2"

    def continued(self, name: str, **changes: object) -> Path:
        """Return the file of the same comparison with a copy of its records and another output."""
        shutil.copytree(self.place / "results/records", self.place / f"{name}_records")
        file = self.place / f"{name}.yaml"
        values = COMPARISON | {"records": f"{name}_records", "output": f"{name}_results"} | changes
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file


@pytest.fixture(scope="module")
def compared(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    place = tmp_path_factory.mktemp("compared")
    write_place(place, tiny_llama_folder)

    def compare(*options: str) -> str:
        output = StringIO()
        with redirect_stdout(output):
            assert main(["compare", str(place / "comparison.yaml"), "--launcher", "local", *options]) == 0
        return output.getvalue()

    first = compare("--dry-run")
    assert not (place / "results").exists()
    part = compare("--only", "alone")
    assert not (place / "results/comparison.md").exists()
    of_part = {folder: (folder / "result.json").stat().st_mtime_ns for folder in (place / "results/runs").iterdir()}
    outputs = (first, part, compare("--dry-run"), compare())
    report = json.loads((place / "results/comparison.json").read_text())
    return Compared(place, outputs, of_part, {row["method"]: row for row in report["methods"]})


def test_a_dry_run_counts_runs_and_records(compared: Compared) -> None:
    first, _, second, _ = compared.outputs
    valid = f"valid: 3 methods, {RUNS} runs in {compared.place}/results\n"
    records = f"with records in {compared.place}/results/records\n"
    assert first == f"{valid}finished: 0, {records}"
    assert 0 < len(compared.of_part) < RUNS
    assert second == f"{valid}finished: {len(compared.of_part)}, {records}"


def test_one_method_is_trained_alone_and_not_again(compared: Compared) -> None:
    assert compared.outputs[1] == "trained: alone; the same command without --only writes the table\n"
    assert {folder.name.split("_")[0] for folder in compared.of_part} == {"alone"}
    again = {folder: (folder / "result.json").stat().st_mtime_ns for folder in compared.of_part}
    assert again == compared.of_part
    assert len(compared.folders) == RUNS


def test_the_table_has_a_row_a_method_with_its_best_rate(compared: Compared) -> None:
    assert compared.outputs[3] == (compared.place / "results/comparison.md").read_text()
    assert list(compared.rows) == ["hypernetwork", "shared", "alone"]
    for method, row in compared.rows.items():
        assert row["search"][str(row["learning_rate"])] == max(row["search"].values())
        assert len(row["means"]) == 2
        assert f"| {method} |" in compared.outputs[3]


def test_intervals_are_of_the_difference_to_the_baseline(compared: Compared) -> None:
    rows = compared.rows
    assert rows["shared"]["interval"] == rows["shared"]["seed_interval"] == [0.0, 0.0]
    between = np.subtract(rows["alone"]["means"], rows["shared"]["means"])
    assert rows["alone"]["seed_interval"] == pytest.approx(seed_interval(between.tolist()))


def test_a_single_task_run_has_its_share_of_the_steps(compared: Compared) -> None:
    name = f"alone_lr{rate_of(compared.rows['alone'])}_seed1_mood"
    single = json.loads((compared.place / "results/runs" / name / "result.json").read_text())
    assert single["steps"] == 2
    assert compared.rows["alone"]["parameters_per_task"] == single["trained_parameters"]
    assert compared.rows["shared"]["parameters_per_task"] == single["trained_parameters"] / 2


def test_a_score_of_the_table_is_that_of_the_rows_on_disk(compared: Compared) -> None:
    answers = read_predictions(str(compared.example), "test")["mood"]
    assert len(answers.references) == 8
    hits = sum(a.strip() == b.strip() for a, b in zip(answers.references, answers.predictions, strict=True))
    assert compared.rows["hypernetwork"]["task_scores"]["mood"][1] == pytest.approx(100 * hits / 8)


def test_mlflow_has_the_comparison_and_its_files(compared: Compared) -> None:
    client = MlflowClient(f"sqlite:///{compared.place}/mlflow.db")
    (recorded,) = [
        one
        for one in client.search_runs([client.get_experiment_by_name("hyperscale").experiment_id])
        if one.info.run_name == "two"
    ]
    mean = np.mean(compared.rows["shared"]["means"])
    assert recorded.data.metrics["compare/shared/mean"] == pytest.approx(mean)
    assert {file.path for file in client.list_artifacts(recorded.info.run_id)} == {"comparison.md", "comparison.json"}


def test_records_alone_give_the_same_table(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    again = run(capsys, "compare", compared.continued("kept"), "--launcher", "local")
    assert again.code == 0, again.err
    assert again.out == compared.outputs[3]
    assert not (compared.place / "kept_results/runs").exists()
    records = sorted((compared.place / "kept_records").iterdir())
    assert [record.name for record in records] == [f"{one.name}.json.gz" for one in compared.folders]
    output = str(compared.place / "results").encode()
    assert not [record for record in records if output in gzip.decompress(record.read_bytes())]


def test_a_run_without_a_record_is_trained_again(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = compared.continued("lost"), compared.example
    record = compared.place / "lost_records" / f"{folder.name}.json.gz"
    before = without_times(record)
    record.unlink()
    dry = run(capsys, "compare", file, "--launcher", "local", "--dry-run")
    assert f"finished: {RUNS - 1}, with" in dry.out
    repaired = run(capsys, "compare", file, "--launcher", "local")
    assert repaired.code == 0, repaired.err
    (trained,) = (compared.place / "lost_results/runs").iterdir()
    assert trained.name == folder.name
    assert (trained / "predictions/test.jsonl").read_bytes() == (folder / "predictions/test.jsonl").read_bytes()
    assert without_times(record) == before


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_record_of_different_settings_is_an_error(
    options: list[str], compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    file = compared.continued(f"other{len(options)}", settings={"training.steps": 6})
    outcome = run(capsys, "compare", file, "--launcher", "local", *options)
    assert outcome.code == 1
    of_other_settings = "a record of hypernetwork_lr0.001_seed0 with different settings (training.steps was 4, is 6)"
    assert f"contains {of_other_settings}" in outcome.err


def test_a_run_of_different_settings_is_an_error(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    file = compared.continued("run", settings={"training.steps": 6}, records="none")
    folder = compared.place / "run_results/runs/hypernetwork_lr0.001_seed0"
    folder.mkdir(parents=True)
    shutil.copy(compared.example / "recipe.yaml", folder)
    outcome = run(capsys, "compare", file, "--launcher", "local", "--only", "hypernetwork")
    assert outcome.code == 1
    assert "hypernetwork_lr0.001_seed0 contains a run with different settings (" in outcome.err


def test_a_damaged_record_is_named(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    file = compared.continued("damaged")
    record = compared.place / "damaged_records" / f"{compared.example.name}.json.gz"
    record.write_bytes(record.read_bytes()[:100])
    outcome = run(capsys, "compare", file, "--launcher", "local")
    assert outcome.code == 1
    assert f"{record} is damaged or of another version; restore it, or delete it" in outcome.err


def test_runs_at_one_time_make_the_same_records(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "comparison.yaml"
    methods = {name: COMPARISON["methods"][name] for name in ("alone", "shared")}
    file.write_text(yaml.safe_dump(COMPARISON | {"methods": methods, "learning_rates": [0.001], "seeds": [1]}))
    one = run(capsys, "compare", file, "--launcher", "local")
    assert one.code == 0, one.err
    assert "1 seed a method, 4 steps × 4 samples" in one.out, "single-task runs share the steps"
    assert "All methods use the same learning rate." in one.out
    (place / "results").rename(place / "one")
    together = run(capsys, "compare", file, "--launcher", "local", "--jobs", 2)
    assert together.code == 0, together.err
    assert "finished shared_lr0.001_seed1 in" in together.err
    assert "finished at step 2" in (place / "results/logs/alone_lr0.001_seed1_mood.log").read_text()
    actual, expected = (
        {record.name: without_times(record) for record in sorted((place / folder / "records").iterdir())}
        for folder in ("results", "one")
    )
    assert len(actual) == 3
    assert actual == expected


def test_seeds_of_a_method_begin_when_its_own_search_is_done(place: Path) -> None:
    file = place / "comparison.yaml"
    methods = {name: COMPARISON["methods"][name] for name in ("hypernetwork", "shared")}
    file.write_text(yaml.safe_dump(COMPARISON | {"methods": methods, "seeds": [1]}, sort_keys=False))
    comparison, seed_began = load_comparison(file), Event()

    def waiting(recipe: Recipe, child: Path) -> RunResult:
        if recipe.name.startswith("hypernetwork") and recipe.name.endswith("seed1"):
            seed_began.set()
        if recipe.name == "shared_lr0.01_seed0":
            assert seed_began.wait(300), "the first method's seed waited for the search of the second"
        return train_in_child(recipe, child, place / f"{recipe.name}.log")

    outcome = run_comparison(comparison, waiting, jobs=2)
    assert {name: len(trials) for name, trials in outcome.search.items()} == {"hypernetwork": 2, "shared": 2}
    for name, (trial,) in outcome.final.items():
        best = max(outcome.search[name], key=lambda searched: searched.validation)
        assert (trial.trial.method, trial.trial.learning_rate) == (name, best.trial.learning_rate)


def test_a_killed_run_reports_what_to_do(place: Path) -> None:
    file = place / "comparison.yaml"
    (recipe,) = make_trial(load_comparison(file), "shared", 0.001, 1).recipes
    child, log = place / "child.yaml", place / "child.log"
    child.write_text(render_recipe(dump_recipe(recipe)))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train_in_child, recipe, child, log)
        while not (processes := [one for one in psutil.Process().children() if str(child) in one.cmdline()]):
            assert not running.done(), running.exception()
        processes[0].kill()
        with pytest.raises(
            ResourceError, match=r"was killed, .* fewer --jobs leave more memory for each run"
        ) as killed:
            running.result()
    assert f"(exit code -9; its whole output is in {log})" in str(killed.value)


def without_times(record: Path) -> dict[str, object]:
    values = json.loads(gzip.decompress(record.read_bytes()))
    assert values.pop("step_seconds") > 0
    return values


def test_one_of_several_runs_fails(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "comparison.yaml"
    file.write_text(yaml.safe_dump(COMPARISON | {"learning_rates": [0.001], "seeds": [1, 2]}, sort_keys=False))
    with (place / "mood/train.jsonl").open("a") as rows:
        rows.write("{broken\n")
    failed = run(capsys, "compare", file, "--launcher", "local", "--jobs", 2)
    assert failed.code == 1
    name = "hypernetwork_lr0.001_seed1"
    assert failed.errors[0].startswith(f"run {name} failed: {place}/mood/train.jsonl:25: not valid JSON")
    assert f"(exit code 1; its whole output is in {place}/results/logs/{name}.log)" in failed.errors
    assert failed.errors[-1] == "Finished runs are kept; the same command continues from here"
    assert len(list((place / "results/logs").iterdir())) == 2, "no run began after the first had failed"
    assert not (place / "results/records").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--jobs", 0, "--launcher", "local"), "--jobs 0: at least one run must be trained at a time"),
        (("--jobs", 2), "--jobs 2 starts one process with one worker per run; add --launcher local"),
    ],
)
def test_an_impossible_number_of_jobs_is_an_error(
    options: tuple[object, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(capsys, "compare", place / "comparison.yaml", *options)
    assert outcome.code == 2
    assert outcome.errors == [message]


def rate_of(row: dict[str, float]) -> str:
    return f"{row['learning_rate']:g}"


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"baseline": "share"},
            "baseline 'share' is not one of the methods hypernetwork, shared, alone. Did you mean 'shared'?",
        ),
        ({"seeds": [0, 1]}, "search_seed 0 is among seeds; the final seeds must be fresh"),
        ({"learning_rates": [0.1, 0]}, "learning_rates[1]: 0 is not allowed: must be greater than 0"),
        ({"seeds": [1, -1]}, "seeds[1]: -1 is not allowed: must be greater than or equal to 0"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates lists a value more than once"),
        (
            {"learning_rate": 1},
            "comparison.yaml:23: learning_rate: unknown key (value 1). Did you mean 'learning_rates'?",
        ),
        (
            {"settings": {"training.stpes": 4}},
            "comparison.yaml:5: method hypernetwork: training.stpes: unknown key (value 4). Did you mean 'steps'?",
        ),
        (
            {"methods": COMPARISON["methods"] | {"shared": {"settings": {"training.loss": "sqare_mean"}}}},
            "comparison.yaml:10: method shared: training.loss: 'sqare_mean' is not allowed: must be one of ",
        ),
        ({"settings": {"training.steps": 3}}, "single_task divides training.steps 3 among 2 tasks"),
        ({"recipe": "reciep.yaml"}, "recipe file 'reciep.yaml' does not exist"),
    ],
)
def test_a_wrong_comparison(
    changes: dict[str, object], fragment: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "comparison.yaml").write_text(yaml.safe_dump(COMPARISON | changes, sort_keys=False))
    outcome = run(capsys, "compare", place / "comparison.yaml", "--launcher", "local")
    assert outcome.code == 2
    assert any(fragment in line for line in outcome.errors), outcome.err
    assert not (place / "results").exists()


def test_an_unknown_method_for_only_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "compare", place / "comparison.yaml", "--only", "shard")
    assert outcome.code == 2
    assert "--only shard is not one of the methods hypernetwork, shared, alone. Did you mean 'shared'?" in outcome.err


def test_rates_and_seeds_are_all_that_differs(place: Path) -> None:
    comparison = load_comparison(place / "comparison.yaml")
    searched = make_trial(comparison, "shared", 0.01, comparison.search_seed).recipes[0]
    assert not searched.training.evaluate_test, "nothing is chosen by the test rows"
    one, other = (make_trial(comparison, "shared", 0.01, seed).recipes[0] for seed in (1, 2))
    assert one.model_copy(update={"seed": 2, "name": other.name, "output": other.output}) == other
    assert one.training.evaluate_test
    assert one.data.tasks == (str(place / "mood.yaml"), str(place / "size.yaml"))


@pytest.mark.parametrize("metric", list(METRICS))
def test_resampling_against_scoring_row_by_row(metric: str) -> None:
    generator = np.random.default_rng(0)
    words = {"pearson": ["1", "2.5", "none"], "spearman": ["1", "2.5", "none"]}.get(metric, ["yes", "no", "maybe"])
    if metric == "span_f1":
        words = ["O B-city I-city", "B-city O I-city", "B-day B-day", "O", "I-city"]
    if metric in ("rouge2", "bleu"):  # they count pairs and more
        words = ["the old mill is blue", "the old moon is blue and small", "two moons are small"]
    allowed = [word for word in words if word != "none"]
    references = [f" {allowed[number]}" for number in generator.integers(0, len(allowed), 50)]
    runs = [[words[number] for number in generator.integers(0, len(words), 50)] for _ in range(2)]
    runs.append(references)
    rows = draw(generator, 20, 50)
    assert rows.shape == (20, 50)
    assert rows.min() >= 0
    assert rows.max() == 49
    scores = resampled_scores(metric, references, runs, rows, "yes")
    plain = [
        [
            compute([metric], [run[row] for row in drawn], [references[row] for row in drawn], "yes")[metric]
            for drawn in rows
        ]
        for run in runs
    ]
    assert scores == pytest.approx(np.array(plain), abs=1e-9)
    assert scores[2] == pytest.approx(100)
    assert np.ptp(scores[:2]) > 0


def test_the_f1_of_nothing_is_0() -> None:
    rows = np.zeros((1, 1), dtype=np.int64)
    assert resampled_scores("span_f1", ["O O"], [["O O"]], rows).tolist() == [[0.0]]
    assert resampled_scores("f1", ["no"], [["no"]], rows, "yes").tolist() == [[0.0]]


def test_an_interval_over_seeds_is_students() -> None:
    # mean 2, standard error 1 / √3, and 4.3027 from the tables for two degrees of freedom
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert seed_interval([1.0]) is None


def test_an_interval_is_the_middle_95_percent() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((-0.1, 2.0), "not shown"), ((0.0, 0.0), "not shown"), ((0.1, 2.0), "above"), ((-2.0, -0.1), "below")],
)
def test_the_interval_over_rows_and_seeds_decides_the_verdict(ends: tuple[float, float], verdict: str) -> None:
    summary = MethodSummary("any", 0.1, {}, {}, [1.0], 1.0, ends, (-9.0, 9.0), 1.0, 1.0, 1.0)
    assert summary.verdict == verdict


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
    assert len(comparison.seeds) >= 3
    if len(comparison.learning_rates) == 1:  # then each method's must be what a search of three chose for it
        comparison = as_searched(comparison)
    assert len(comparison.learning_rates) == 3


def as_searched(comparison: Comparison) -> Comparison:
    """Return the rates that were searched where methods of the same settings were, if these all chose the given one."""
    searched = load_comparison(COMPARISONS[0].with_name("methods.yaml"))
    (report,) = (Path(__file__).parents[1] / "benchmarks/results").glob("smollm2-135m-methods_*.json")
    rows = {row["method"]: row for row in json.loads(report.read_text())["methods"]}
    for method in comparison.methods.values():
        (same,) = (name for name, other in searched.methods.items() if other == method)
        assert (rows[same]["learning_rate"],) == comparison.learning_rates
        assert {float(rate) for rate in rows[same]["search"]} == set(searched.learning_rates)
    return searched


def test_paths_in_settings_begin_at_the_comparison_however_deep_its_output(place: Path) -> None:
    for output in ("results", "a/b", "a/b/c"):
        values = COMPARISON | {"output": output, "settings": {"data.tasks": ["mood.yaml", "size.yaml"]}}
        (place / "deep.yaml").write_text(yaml.safe_dump(values))
        trial = make_trial(load_comparison(place / "deep.yaml"), "shared", 0.01, 1)
        assert trial.recipes[0].data.tasks == (str(place / "mood.yaml"), str(place / "size.yaml"))
        assert trial.recipes[0].output.startswith(f"{place}/{output}/runs/")


def test_a_comparison_on_an_object_store_is_an_error(tmp_path: Path):
    file = tmp_path / "comparison.yaml"
    content = {
        "name": "remote",
        "output": "s3://bucket/results",
        "recipe": "demo",
        "methods": {"one": {}, "two": {}},
        "baseline": "one",
        "learning_rates": [0.001],
        "seeds": [1],
    }
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="output: s3://bucket/results is a URI; a comparison needs a folder"):
        load_comparison(file)
    assert not (tmp_path / "s3:").exists()
