"""The tasks that the package brings: what their rows are, and that nothing of a split is in another.

The numbers are those of the pinned packages; a change of any of them is a change of the data.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hyperscale.assets import sentiment, words
from hyperscale.assets.cache import cache_root, sha256_of
from hyperscale.assets.datasets import DATASETS, open_dataset
from hyperscale.assets.packages import fetch
from hyperscale.data.sources import load_task_data
from hyperscale.data.tasks import list_tasks, load_task

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")

SENTIMENT = {
    # task: (positive, negative) in each split
    "tweets": ((1818, 806), (211, 91), (237, 114)),
    "movies": ((4007, 4055), (459, 511), (529, 509)),
    "products": ((1403, 1025), (131, 64), (203, 142)),
    "news": ((970, 1402), (89, 154), (116, 200)),
}
WORDS = {
    "past_tense": (1544, 211, 200),
    "ing_form": (1553, 214, 200),
    "plural": (2217, 299, 269),
    "american_spelling": (1338, 201, 191),
}
ASSETS = [(asset, subset) for asset, dataset in DATASETS.items() for subset in dataset.subsets]


def rows_of(asset: str, subset: str) -> dict[str, list[dict[str, str]]]:
    """Read all splits of a packaged data set."""
    files = open_dataset(asset, subset)
    return {split: [json.loads(line) for line in files[split].read_text("utf-8").splitlines()] for split in SPLITS}


@pytest.mark.parametrize("task", SENTIMENT)
def test_sentiment_rows(task: str) -> None:
    splits = rows_of("vader_sentiment", task)
    for split, (positive, negative) in zip(SPLITS, SENTIMENT[task], strict=True):
        rows = splits[split]
        assert Counter(row["label"] for row in rows) == {"positive": positive, "negative": negative}
        assert min(positive, negative) >= 64  # enough of both for a score on 64 samples to mean something
        assert 0.5 <= max(positive, negative) / len(rows) <= 0.72
        # The first rows are as mixed as the whole.
        assert 0.3 < sum(row["label"] == "positive" for row in rows[:64]) / 64 < 0.85

    texts = [sentiment.normalised(row["text"]) for split in SPLITS for row in splits[split]]
    assert len(set(texts)) == len(texts)
    assert all(texts)
    documents = [{row["id"].partition("_")[0] for row in splits[split]} for split in SPLITS]
    if task in ("products", "news"):
        assert len(set.union(*documents)) == sum(map(len, documents)) > 290
    rated = {text.id: text for text in sentiment.read_ratings(task)}
    for row in (row for split in SPLITS for row in splits[split]):
        assert abs(rated[row["id"]].rating) >= 0.5
        assert row["label"] == ("positive" if rated[row["id"]].rating > 0 else "negative")
        assert row["text"] == rated[row["id"]].text
        assert not re.search(r"&(amp|quot|lt|gt|#\d+);", row["text"])


def test_the_rated_texts_are_those_of_the_paper() -> None:
    assert {subset: len(sentiment.read_ratings(subset)) for subset in sentiment.SUBSETS} == {
        "tweets": 4200,
        "movies": 10_605,
        "products": 3708,
        "news": 5190,
    }


def test_word_rows() -> None:
    forms: dict[str, dict[str, str]] = {}
    places: dict[str, set[str]] = {}
    for subset in words.INFLECTIONS:
        splits = rows_of("lemminflect_words", subset)
        assert tuple(len(splits[split]) for split in SPLITS) == WORDS[subset]
        forms[subset] = {row["word"]: row["form"] for rows in splits.values() for row in rows}
        assert len(forms[subset]) == sum(WORDS[subset])
        for split, rows in splits.items():
            for row in rows:
                places.setdefault(row["word"], set()).add(split)
    # A verb and a noun with the same spelling are in the same split, in all three tasks.
    assert {len(words_of_task) for words_of_task in places.values()} == {1}

    past, ing, plural = (forms[subset] for subset in ("past_tense", "ing_form", "plural"))
    assert (past["go"], past["put"], past["carry"], past["think"]) == ("went", "put", "carried", "thought")
    assert (ing["go"], ing["run"], ing["make"], ing["tie"]) == ("going", "running", "making", "tying")
    assert (plural["child"], plural["city"], plural["knife"]) == ("children", "cities", "knives")
    assert "quit" not in past  # the table prefers "quitted"
    assert "abandonment" not in plural
    assert all(form.endswith("ing") for form in ing.values())
    assert all(form != word for word, form in plural.items())
    irregular = [word for word, form in past.items() if not form.endswith("ed")]
    assert 0.05 < len(irregular) / len(past) < 0.15
    # The prompts of a word are the same in all tasks: only the task tells which form is wanted.
    assert len(past.keys() & ing.keys()) > 1900
    assert len(past.keys() & plural.keys()) > 500


def test_spelling_rows() -> None:
    splits = rows_of("breame_spelling", "american")
    assert tuple(len(splits[split]) for split in SPLITS) == WORDS["american_spelling"]
    families = [{row["word"][:5] for row in splits[split]} for split in SPLITS]
    assert len(set.union(*families)) == sum(map(len, families))
    american = {row["word"]: row["form"] for rows in splits.values() for row in rows}
    assert (american["colour"], american["organise"], american["theatre"]) == ("color", "organize", "theater")
    assert all(british != form for british, form in american.items())


@pytest.mark.parametrize("name", [*SENTIMENT, *WORDS])
def test_the_task_files_give_these_rows(name: str) -> None:
    data = load_task_data(load_task(name))
    assert {split: len(examples) for split, examples in data.splits.items()} == {
        split: len(rows) for split, rows in rows_of(data.task.source.asset, data.task.source.subset).items()
    }
    examples = [example for split in data.splits.values() for example in split]
    if name in SENTIMENT:
        assert {example.candidates for example in examples} == {("negative", "positive")}
        assert {example.target for example in examples} == {"negative", "positive"}
        assert all(example.source.endswith("\nSentiment:") for example in examples)
    else:
        assert {example.candidates for example in examples} == {()}
        assert all(example.source.startswith("Form of ") and example.source.endswith(":") for example in examples)
    assert len({example.source for example in examples}) == len(examples)


def test_every_packaged_task_is_tested_here() -> None:
    embedded = {task.name for task in list_tasks([]) if task.source.kind == "asset"}
    assert embedded == SENTIMENT.keys() | WORDS.keys()
    for task in map(load_task, embedded):
        assert task.description.endswith(".")
        assert task.max_new_tokens >= 4


def test_two_caches_get_the_same_bytes_and_a_damaged_split_is_made_again(tmp_path: Path) -> None:
    for package in (sentiment.PACKAGE, words.LEMMINFLECT, words.BREAME):
        fetch(package)
    (tmp_path / "packages").symlink_to(cache_root() / "packages")
    mine = [sha256_of(path) for asset, subset in ASSETS for path in open_dataset(asset, subset).values()]
    command = (
        "import sys, json; from hyperscale.assets.datasets import open_dataset; from hyperscale.assets.cache import *\n"
        "found = [p for a, s in json.loads(sys.argv[1]) for p in open_dataset(a, s).values()]\n"
        "print(json.dumps([sha256_of(path) for path in found]))"
    )
    # Another hash seed and another locale: neither may move a row.
    environment = {**os.environ, "HYPERSCALE_CACHE": str(tmp_path), "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    run = [sys.executable, "-c", command, json.dumps(ASSETS)]
    for damage in (None, b"", b'{"id": "1"}\n'):
        if damage is not None:
            (tmp_path / "datasets" / "vader_sentiment" / "tweets" / "validation.jsonl").write_bytes(damage)
            (tmp_path / "datasets" / "vader_sentiment" / "news" / "info.json").write_bytes(damage)
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == mine
    info = json.loads((tmp_path / "datasets" / "vader_sentiment" / "news" / "info.json").read_text())
    assert [package["licence"] for package in info["packages"]] == ["MIT"]
    assert info["splits"]["test"]["labels"] == {"negative": 200, "positive": 116}


def test_movies_hold_the_sentences_of_sst2(task_data: Path) -> None:
    """So nobody may train on one and evaluate on the other; the task file says it where its user looks."""
    movies = "|".join(letters(rated.text) for rated in sentiment.read_ratings("movies"))
    for split, num_found in {"validation": 872, "test": 1751}.items():
        lines = (task_data / "sst2" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert sum(letters(json.loads(line)["sentence"]) in movies for line in lines) == num_found
    assert "sst2" in load_task("movies").not_with


def letters(text: str) -> str:
    """Return letters and digits alone: SST-2 is tokenised, the rated texts are not."""
    return re.sub(r"[\W_]+", "", text.lower())
