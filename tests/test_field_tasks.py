"""The field's tasks: every file on rows of its exact columns, for both families, and on real rows where they are."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from scipy import stats
from transformers import AutoTokenizer

from hyperscale.config.data import DataSettings
from hyperscale.data.corpus import Corpus, check_same_rows, load_corpus
from hyperscale.data.hub import open_hub, printable
from hyperscale.data.metrics import score
from hyperscale.data.origins import HubSource
from hyperscale.data.sources import load_task_data
from hyperscale.data.tasks import list_tasks, load_task
from hyperscale.errors import DataError
from hyperscale.run.evaluate import evaluate_checkpoint
from tests.command import run
from tests.runs import make_recipe

Values = dict[str, Any]


def texts(*columns: str, label: str = "label", classes: int = 2) -> Callable[[int], Values]:
    """Return what makes row number n: a text of its own in every column, and one class after the other."""
    return lambda number: {column: f"{column} {number} said" for column in columns} | {label: number % classes}


def tagged(number: int) -> Values:
    return {"tokens": ["from", "new", "york", str(number)], "tags": ["O", "B-city.name", "I-city.name", "B-day"]}


TAGGED = ("atis", "snips", "mit_movie", "mit_restaurant", "conll2003")
PAIR, NLI = ("sentence1", "sentence2"), ("premise", "hypothesis")
ROWS: dict[str, Callable[[int], Values]] = {
    "glue_cola": texts("sentence"),
    "glue_sst2": texts("sentence"),
    "glue_mrpc": texts(*PAIR),
    "glue_qqp": texts("question1", "question2"),
    "glue_stsb": lambda number: texts(*PAIR)(number) | {"label": number % 26 / 5 + 0.07},
    "glue_mnli": texts(*NLI, classes=3),
    "glue_qnli": texts("question", "sentence"),
    "glue_rte": texts(*PAIR),
    "glue_wnli": texts(*PAIR),
    "superglue_boolq": texts("question", "passage"),
    "superglue_cb": texts(*NLI, classes=3),
    "superglue_copa": lambda number: texts("premise", "choice1", "choice2")(number) | {"question": "cause"},
    "superglue_wic": texts("word", *PAIR),
    "trec": texts("text", label="coarse_label", classes=6),
    "snli": texts(*NLI, classes=3),
    "sick": texts("sentence_A", "sentence_B", classes=3),
    "sms_spam": texts("sms"),
    **dict.fromkeys(TAGGED, tagged),
}
"""Task -> what makes its row number n, in the columns that its data set has."""
METRICS = {
    # as GLUE and SuperGLUE report them
    "glue_cola": ["mcc"],
    "glue_mrpc": ["f1", "accuracy"],
    "glue_qqp": ["f1", "accuracy"],
    "glue_stsb": ["pearson", "spearman"],
    "superglue_cb": ["macro_f1", "accuracy"],
    "sms_spam": ["f1", "accuracy"],
    **{name: ["span_f1"] for name in TAGGED},
}
GLUE = [name for name in ROWS if name.startswith("glue_") and name != "glue_wnli"]


def folder_of(name: str) -> str:
    return name.removeprefix("glue_").removeprefix("superglue_")


def write(path: Path, rows: list[Values]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rows_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as HYPERSCALE_TASK_DATA names one, with 60 training and 12 validation rows of every task."""
    for name, row in ROWS.items():
        write(tmp_path / folder_of(name) / "train.jsonl", [row(number) for number in range(60)])
        write(tmp_path / folder_of(name) / "validation.jsonl", [row(number) for number in range(100, 112)])
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(tmp_path))
    return tmp_path


def test_every_task_of_the_field_is_tested_here():
    tasks = {task.name: task for task in list_tasks() if task.source.kind != "asset"}
    assert tasks.keys() == ROWS.keys()
    for name, task in tasks.items():
        assert list(task.metrics) == METRICS.get(name, ["accuracy"])
    folder = Path(str(load_task.__code__.co_filename)).parent / "tasks"
    untried = [name for name in tasks if "NOT TRIED" in (folder / f"{name}.yaml").read_text()]
    assert set(untried) == {name for name, task in tasks.items() if isinstance(task.source, HubSource)}


def test_every_task_runs_on_both_families(
    rows_folder: Path, tmp_path: Path, tiny_llama_folder: Path, tiny_t5_folder: Path, caplog: pytest.LogCaptureFixture
):
    for folder, is_encoder_decoder in ((tiny_llama_folder, False), (tiny_t5_folder, True)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in ROWS:
            settings = DataSettings(tasks=(name,), max_target_tokens=128)
            (loaded,) = load_corpus(settings, tokenizer, is_encoder_decoder).tasks
            assert loaded.source == f"file:{rows_folder / folder_of(name)}"
            assert (len(loaded.train.encoded), len(loaded.validation.examples)) == (60, 12)
            references = [example.target for example in loaded.validation.examples]
            answers = [loaded.tokenizer.decode(encoded.target_ids) for encoded in loaded.validation.encoded]
            assert score(loaded.task, answers, references) == dict.fromkeys(loaded.task.metrics, pytest.approx(100))
            assert score(loaded.task, ["?"] * 12, references) == dict.fromkeys(loaded.task.metrics, 0.0)
            limit = loaded.task.max_new_tokens
            assert all(len(encoded.target_ids) <= max(limit, 30) for encoded in loaded.train.encoded)


def test_a_mixed_run_is_trained_scored_exported_and_predicts(
    rows_folder: Path, tmp_path: Path, tiny_t5_folder: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
):
    names = ["glue_mrpc", "glue_stsb", "atis"]
    write(tmp_path / "questions.jsonl", [{"task": name, **ROWS[name](7)} for name in names])
    for family, backbone in (("t5", tiny_t5_folder), ("llama", tiny_llama_folder)):
        recipe = make_recipe(backbone, names, tmp_path / family, data={"max_target_tokens": 64, "validation_limit": 4})
        (tmp_path / f"{family}.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        trained = run(capsys, "train", tmp_path / f"{family}.yaml", "--launcher", "local")
        assert trained.code == 0, trained.err
        result = json.loads((tmp_path / family / "result.json").read_text())
        assert {task: list(scores) for task, scores in result["evaluations"][-1]["scores"].items()} == {
            "glue_mrpc": ["f1", "accuracy"],
            "glue_stsb": ["pearson", "spearman"],
            "atis": ["span_f1"],
        }
        bundles, answers = [result["bundles"][name] for name in names], tmp_path / f"{family}.jsonl"
        outcome = run(capsys, "predict", *bundles, "--input", tmp_path / "questions.jsonl", "--output", answers)
        assert outcome.code == 0, outcome.err
        predictions = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
        assert predictions[0] in ("yes", "no")
        assert len(predictions[2].split()) == 4  # a BIO tag for each word, whatever a model with random weights says

    # The test split is scored when it is asked for, where there is one.
    failure = run(capsys, "evaluate", tmp_path / "llama", "--split", "test")
    assert [line.partition(" (")[0] for line in failure.errors] == [f"task '{name}' has no test rows" for name in names]
    write(rows_folder / "mrpc" / "test.jsonl", [ROWS["glue_mrpc"](number) | {"label": 1} for number in range(200, 207)])
    write(rows_folder / "atis" / "test.jsonl", [tagged(number) for number in range(200, 205)])
    majority, scored = evaluate_checkpoint(str(tmp_path / "llama"), "test")
    assert (majority.stage, scored.stage) == ("majority", "test")
    assert majority.samples == scored.samples == {"glue_mrpc": 7, "atis": 5}
    assert majority.scores["glue_mrpc"] == {"f1": 0, "accuracy": 0}  # all of them are paraphrases, in training half
    shown = run(capsys, "evaluate", tmp_path / "llama", "--split", "test")
    assert shown.code == 0, shown.err
    numbers = [value for scores in scored.scores.values() for value in scores.values()]
    assert re.search(rf"mean of 3 +{sum(numbers) / 3:.1f}", shown.out)
    assert "mean of 5" in run(capsys, "evaluate", tmp_path / "llama").out

    write(tmp_path / "long.jsonl", [{"tokens": ["a"] * 100}])
    t5, llama = (tmp_path / family / "bundles" / "atis" for family in ("t5", "llama"))
    failure = run(capsys, "predict", t5, "--input", tmp_path / "long.jsonl", "--output", answers)
    assert failure.errors == [
        f"{tmp_path}/long.jsonl:1: more words than the backbone has sentinels for (T5: 99); split the sentence"
    ]
    outcome = run(capsys, "predict", llama, "--input", tmp_path / "long.jsonl", "--output", answers)
    assert outcome.code == 0, outcome.err
    assert len(json.loads(answers.read_text())["prediction"].split()) == 100  # lines need no sentinels


def test_a_rating_is_rounded_as_t5_does(rows_folder: Path):
    ratings = [0, 0.1, 0.3, 2.5, 3.8, 4.92, 5]
    write(
        rows_folder / "stsb" / "validation.jsonl",
        [{"sentence1": f"a {rating}", "sentence2": "b", "label": rating} for rating in ratings],
    )
    task = load_task("glue_stsb")
    written = [example.target for example in load_task_data(task).splits["validation"]]
    assert written == ["0.0", "0.0", "0.4", "2.4", "3.8", "5.0", "5.0"]
    # an answer that is not a number counts as the mean of the references: it neither earns nor loses correlation
    assert score(task, ["3.8 points", "1", "5"], ["2.0", "1.0", "3.0"])["pearson"] == pytest.approx(
        100 * stats.pearsonr([2, 1, 5], [2, 1, 3])[0]
    )
    write(rows_folder / "stsb" / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "much"}])
    with pytest.raises(DataError, match=r"train\.jsonl:1: column 'label' holds 'much', which is not a number to round"):
        load_task_data(task)


def test_rows_without_a_label_are_left_out(rows_folder: Path):
    for name, hidden in (("snli", -1), ("glue_stsb", -1.0), ("glue_rte", -1)):
        folder = rows_folder / folder_of(name)
        write(folder / "test.jsonl", [ROWS[name](number) | {"label": hidden} for number in range(200, 205)])
        assert load_task_data(load_task(name)).splits.keys() == {"train", "validation"}
    open_rows = [ROWS["snli"](number) for number in range(200, 205)]
    write(rows_folder / "snli" / "test.jsonl", [*open_rows, ROWS["snli"](300) | {"label": -1}])
    assert len(load_task_data(load_task("snli")).splits["test"]) == 5
    # a file of the user's own has no such convention
    (rows_folder / "own.yaml").write_text('source: snli\ninput: "{premise}"\nlabels: {0: a, 1: b, 2: c}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:6: unknown label '-1'"):
        load_task_data(load_task(str(rows_folder / "own.yaml")))


def test_mnli_has_both_its_validation_sets(rows_folder: Path, monkeypatch: pytest.MonkeyPatch):
    source = load_task("glue_mnli").source
    assert isinstance(source, HubSource)
    assert source.splits == {"train": "train", "validation": "validation_matched", "test": "validation_mismatched"}
    write(rows_folder / "mnli" / "test.jsonl", [ROWS["glue_mnli"](number) for number in range(200, 209)])
    assert {split: len(rows) for split, rows in load_task_data(load_task("glue_mnli")).splits.items()} == {
        "train": 60,
        "validation": 12,
        "test": 9,
    }


def test_a_hub_data_set_in_its_own_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["Ann", "Lee", f"slept {n}"] for n in range(30)], "ner_tags": [[1, 2, 0]] * 30}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    shown = load_task("conll2003").source
    assert isinstance(shown, HubSource)
    source = shown.model_copy(update={"path": str(tmp_path / "set"), "revision": None, "folder": None})
    task = load_task("conll2003").model_copy(update={"source": source})
    example = load_task_data(task.written_for(False)).splits["train"][0]
    assert example.target.startswith("Ann PER\nLee I\nslept_")
    wrong = source.model_copy(update={"columns": {"tags": "ner_tag"}})
    with pytest.raises(DataError, match=r"no column 'ner_tag'\. Did you mean 'ner_tags'\? There are: tokens, ner_tags"):
        open_hub(wrong, ("tags",))
    unset = HubSource(path="no-such/data", folder="${NO_SUCH_FOLDER}/x")
    with pytest.raises(
        DataError, match=r"can also be read from \$\{NO_SUCH_FOLDER\}/x \(the variable NO_SUCH_FOLDER is not set"
    ):
        open_hub(unset, ())


def corpus(names: list[str], tokenizer_folder: Path, with_test: bool = False, **data: object) -> Corpus:
    settings = DataSettings.model_validate({"tasks": names, "max_target_tokens": 256, **data})
    return load_corpus(
        settings,
        AutoTokenizer.from_pretrained(tokenizer_folder),
        is_encoder_decoder=False,
        with_test=with_test,
        may_lack_test=True,
    )


def contents(loaded_corpus: Corpus, name: str, split: str) -> set[bytes]:
    """Return the digests of a split's texts. Training rows keep none, so their prompts are looked up by their ids."""
    (loaded,) = (loaded for loaded in loaded_corpus.tasks if loaded.task.name == name)
    if split != "train":
        return {example.content for example in loaded.scored(split).examples}
    examples = load_task_data(loaded.task).splits["train"]
    prompts = loaded.tokenizer.encode_prompts([example.source for example in examples])
    known = dict(zip(prompts, (example.content for example in examples), strict=True))
    return {known[tuple(encoded.source_ids)] for encoded in loaded.train.encoded}


def test_tasks_of_the_same_texts_share_a_run_without_a_leak(rows_folder: Path, tiny_llama_folder: Path):
    pair = {"sentence1": "Ann slept.", "sentence2": "Ann was asleep ."}
    turned = {"sentence1": "ANN was asleep.", "sentence2": "Ann  slept", "label": 4.2}
    mrpc, stsb = [ROWS["glue_mrpc"](number) for number in range(500, 560)], load_task("glue_stsb")
    write(rows_folder / "mrpc" / "train.jsonl", mrpc)
    write(rows_folder / "mrpc" / "validation.jsonl", [pair | {"label": 1}])
    kept = [ROWS["glue_stsb"](number) for number in range(600, 640)]
    write(rows_folder / "stsb" / "train.jsonl", [*kept, turned])
    write(rows_folder / "stsb" / "validation.jsonl", [ROWS["glue_stsb"](900)])
    alone = corpus(["glue_stsb"], tiny_llama_folder)
    together = corpus(["glue_mrpc", "glue_stsb"], tiny_llama_folder)
    assert len(contents(alone, "glue_stsb", "train")) == 41
    assert contents(alone, "glue_stsb", "train") - contents(together, "glue_stsb", "train") == contents(
        together, "glue_mrpc", "validation"
    )
    assert len(contents(together, "glue_mrpc", "train")) == 60
    assert alone.describe()["glue_stsb"]["digest"] != together.describe()["glue_stsb"]["digest"]
    write(rows_folder / "stsb" / "train.jsonl", [turned])
    with pytest.raises(DataError, match="task 'glue_stsb': no training rows are left; other tasks score all"):
        corpus(["glue_mrpc", "glue_stsb"], tiny_llama_folder)
    assert stsb.shares_texts_with == ("glue_mrpc",)


def test_workers_that_read_different_rows_are_an_error(
    rows_folder: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    here = corpus(["snips", "trec"], tiny_llama_folder).describe()
    check_same_rows([here, here])
    write(tmp_path / "there" / "snips" / "train.jsonl", [tagged(number) for number in range(50)])
    shutil.copytree(rows_folder / "trec", tmp_path / "there" / "trec")
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(tmp_path / "there"))
    there = corpus(["snips", "trec"], tiny_llama_folder).describe()
    with pytest.raises(DataError, match=r"task 'snips': worker 0 \(from .*/snips\) and worker 1 \(from"):
        check_same_rows([here, there])


def test_the_page_lists_them_all():
    page = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    listed = {name: cells for name, cells in rows.items() if cells.count(" | ") == 3}  # not those of metrics
    assert listed.keys() == ROWS.keys()
    for name, cells in listed.items():
        folder, columns, hub, metrics = cells.split(" | ")
        task = load_task(name)
        assert folder == f"`{folder_of(name)}`"
        assert set(columns.split(", ")) == ROWS[name](0).keys()
        assert hub == (
            f"`{printable(task.source).removeprefix('hub:')}`" if isinstance(task.source, HubSource) else "–"
        )
        assert metrics == ", ".join(task.metrics)


def test_sst2_is_never_with_movies(rows_folder: Path, tiny_llama_folder: Path):
    for names in (["movies", "glue_sst2"], ["glue_sst2", "movies"]):
        with pytest.raises(DataError, match="must not be in one run with"):
            corpus(names, tiny_llama_folder)


REAL = {
    # task: rows of train, validation and test, no text in two of them
    "glue_cola": (8535, 1043, 0),
    "glue_sst2": (67348, 872, 1821),
    "glue_mrpc": (3668, 408, 1725),
    "glue_stsb": (5734, 1498, 1379),
    "glue_rte": (2490, 277, 0),
    "glue_wnli": (635, 71, 0),
    "trec": (4895, 546, 500),
    "sms_spam": (4131, 517, 518),
    "atis": (4395, 497, 893),
    "snips": (13003, 699, 700),
    "mit_movie": (8771, 973, 2443),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows(name: str, task_data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(task_data))
    task = load_task(name).written_for(is_encoder_decoder=True)
    data = load_task_data(task)
    assert tuple(len(data.splits.get(split, ())) for split in ("train", "validation", "test")) == REAL[name]
    references = [example.target for example in data.splits["validation"]]
    assert score(data.task, references, references) == dict.fromkeys(task.metrics, pytest.approx(100))
    if task.kind == "classification":
        assert set(Counter(references)) == set(data.splits["validation"][0].candidates)


def test_real_glue_has_no_text_that_one_task_trains_on_and_another_scores(
    task_data: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HYPERSCALE_TASK_DATA", str(task_data))
    together = corpus(GLUE, tiny_llama_folder, with_test=True, max_source_tokens=2000)
    assert sum(len(loaded.task.metrics) for loaded in together.tasks) == 11
    for name in GLUE:
        scored = contents(together, name, "validation") | contents(together, name, "test")
        for other in GLUE:
            if other != name:
                assert not scored & contents(together, other, "train"), (name, other)
    alone = corpus(["glue_stsb"], tiny_llama_folder, max_source_tokens=2000)
    left_out = contents(alone, "glue_stsb", "train") - contents(together, "glue_stsb", "train")
    in_test = left_out & contents(together, "glue_mrpc", "test")
    assert (len(left_out), len(in_test)) == (546, 498)
