"""Scores against values worked out by hand, and F1 of spans against seqeval's."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

import hyperscale as hs
from hyperscale.compare.intervals import draw, resampled_scores
from hyperscale.data.examples import Example
from hyperscale.data.metric_table import METRICS
from hyperscale.data.metrics import compute, f1_counts, majority_score, score
from hyperscale.data.tasks import Task, load_task
from hyperscale.data.text_metrics import check_available
from hyperscale.errors import DataError, PluginError


def task(**fields: object) -> Task:
    return Task.model_validate({"name": "t", "source": "rows.jsonl", "input": "{text}"} | fields)


def test_every_name_a_task_may_use_is_computed():
    rows = {"pearson": ["1", "2"], "spearman": ["1", "2"], "span_f1": ["B-x", "O"]}
    for name in METRICS:
        texts = rows.get(name, ["the old mill is blue today", "two small moons and one planet"])
        assert compute([name], texts, texts, positive=texts[0])[name] == pytest.approx(100), name


def test_free_text_scores_are_those_of_the_libraries():
    random = np.random.default_rng(0)
    words = [
        "The",
        "a",
        "old",
        "mill",
        "is",
        "was",
        "blue.",
        "running",
        "runs",
        "42",
        "well-known",
        "Größe",
        "film,",
        "–",
    ]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for _ in range(250):
        references = [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(random.integers(1, 6))]
        predictions = [_disturbed(text, words, random) for text in references]
        scores = compute(["rouge1", "rouge2", "rougeL", "bleu", "chrf"], predictions, references)
        pairs = zip(references, [text.strip() for text in predictions], strict=True)
        rows = [scorer.score(reference, prediction) for reference, prediction in pairs]
        for name in ("rouge1", "rouge2", "rougeL"):
            assert scores[name] == pytest.approx(100 * np.mean([row[name].fmeasure for row in rows]), abs=1e-9)
        stripped = [text.strip() for text in predictions]
        assert scores["bleu"] == pytest.approx(BLEU().corpus_score(stripped, [references]).score, abs=1e-9)
        assert scores["chrf"] == pytest.approx(CHRF().corpus_score(stripped, [references]).score, abs=1e-9)


def _disturbed(text: str, words: list[str], random: np.random.Generator) -> str:
    kept = [
        word if random.random() < 0.7 else str(random.choice(words)) for word in text.split() if random.random() < 0.9
    ]
    return " " + " ".join(kept)


def test_token_f1_is_that_of_squad():
    """250 random sets of rows, scored by torchmetrics 1.9.0 (functional.text.squad)."""
    cases = json.loads(Path(__file__).with_name("token_f1_of_torchmetrics.json").read_text())
    assert len(cases) == 250
    for predictions, references, expected in cases:
        assert compute(["token_f1"], predictions, references)["token_f1"] == pytest.approx(expected, abs=1e-4)
    assert len({expected for *_, expected in cases}) > 100


def test_resampled_means_of_rows_are_the_metric_of_those_rows():
    references, runs = ["the old mill", "a blue moon", "two"], [["old mill", "a moon", "2"], ["", "blue", "two"]]
    rows = draw(np.random.default_rng(0), 5, 3)
    for name in ("token_f1", "rougeL"):
        scores = resampled_scores(name, references, runs, rows)
        for run, of_run in zip(runs, scores, strict=True):
            for drawn, value in zip(rows, of_run, strict=True):
                chosen = [run[row] for row in drawn], [references[row] for row in drawn]
                assert compute([name], *chosen)[name] == pytest.approx(value)


def test_a_metric_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    file = tmp_path / "length.yaml"
    file.write_text('source: a.csv\ninput: "{q}"\ntarget: "{a}"\nmetrics: [length_ratio, exact_match]\n')
    with pytest.raises(
        DataError, match=r"length\.yaml:4: metrics\[0\]: 'length_ratio' is not allowed: must be one of acc"
    ):
        load_task(str(file))

    def length_ratio(predictions: Sequence[str], references: Sequence[str]) -> float:
        return 100 * sum(map(len, predictions)) / sum(map(len, references))

    hs.register_metric("length_ratio", length_ratio)
    loaded = load_task(str(file))
    assert score(loaded, ["ab ", "a"], ["abcd", "a"]) == {"length_ratio": 60, "exact_match": 50}
    hs.register_metric("by_path", "tests.test_metrics:_all_right")
    assert compute(["by_path"], ["a"], ["b"]) == {"by_path": 100}
    with pytest.raises(PluginError, match="metric 'bleu' is registered already; choose another name"):
        hs.register_metric("bleu", length_ratio)
    with pytest.raises(ValueError, match="metric name 'a/b' may hold only letters, digits and _"):
        hs.register_metric("a/b", length_ratio)
    monkeypatch.setattr(METRICS, "_entries", {})  # a bundle elsewhere: it can be read, not scored
    stored = Task.model_validate(loaded.model_dump(mode="json"))
    with pytest.raises(DataError, match="metric length_ratio is in no installed package; install the one that the run"):
        score(stored, ["a"], ["a"])


def _all_right(predictions: Sequence[str], references: Sequence[str]) -> float:
    return 100.0


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    for metric, module, package in (("rougeL", "rouge_score", "rouge-score"), ("bleu", "sacrebleu", "sacrebleu")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            DataError, match=rf"metric {metric} needs the package {package}: pip install 'hypernet-scale"
        ):
            check_available(metric)
    check_available("token_f1")


def test_classification_scores():
    references, predictions = ["a", "a", "b", "b", "b"], ["a", "b", " b", "b", "c"]
    scores = compute(["accuracy", "exact_match", "macro_f1", "f1"], predictions, references, positive="b")
    assert scores["accuracy"] == scores["exact_match"] == pytest.approx(60)
    assert scores["f1"] == pytest.approx(100 * 2 / 3)
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    # tp 2, tn 1, fp 1, fn 0 of class b
    binary = compute(["mcc"], ["b", "b", "b", "a"], ["b", "b", "a", "a"])
    assert binary["mcc"] == pytest.approx(100 * (2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5)
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        compute(["accuracy"], ["a", "b"], ["a"])


def test_correlations_take_numbers_and_survive_what_is_none():
    perfect = compute(["pearson", "spearman"], ["1", "2.0", "3"], ["10", "20", "30"])
    assert perfect == {"pearson": pytest.approx(100), "spearman": pytest.approx(100)}
    assert compute(["spearman"], ["1", "8", "9"], ["1", "2", "100"])["spearman"] == pytest.approx(100)
    assert compute(["pearson", "spearman"], ["x", "x", "nan"], ["1", "2", "3"]) == {"pearson": 0.0, "spearman": 0.0}
    with pytest.raises(DataError, match="a row's answer is 'good'"):
        compute(["pearson"], ["1", "2"], ["good", "2"])
    assert compute(["pearson"], ["1", "two", "3"], ["1", "2", "3"])["pearson"] == pytest.approx(100)


def test_span_f1_counts_whole_spans_and_any_text_as_an_answer():
    references = ["O B-actor I-actor O", "B-year O"]
    assert compute(["span_f1"], references, references)["span_f1"] == 100
    # one span right, one cut short (wrong), one missing: precision 1/2, recall 1/2
    assert compute(["span_f1"], ["O B-actor O O", "B-year O"], references)["span_f1"] == pytest.approx(50)
    # too few, too many, and words that are no tags
    answers = ["O B-actor I-actor", "B-year O nonsense B-year"]
    assert compute(["span_f1"], answers, references)["span_f1"] == 100
    assert compute(["span_f1"], ["", "no tags at all"], references)["span_f1"] == 0


def test_span_f1_is_seqevals():
    """300 random sets of sentences, scored by seqeval 1.2.2 with mode="strict", scheme=IOB2, zero_division=0."""
    cases = json.loads(Path(__file__).with_name("span_f1_of_seqeval.json").read_text())
    assert len(cases) == 300
    for predictions, references, expected in cases:
        assert compute(["span_f1"], predictions, references)["span_f1"] == pytest.approx(expected, abs=1e-12)
        right, predicted, true = f1_counts("span_f1", predictions, references).sum(0).tolist()
        assert 100 * 2 * right / max(predicted + true, 1) == pytest.approx(expected, abs=1e-12)
    assert len({expected for *_, expected in cases}) > 30
    assert any(not expected for *_, expected in cases)


def test_a_task_names_its_positive_answer_and_its_majority():
    pairs = task(labels={0: "different", 1: "same"}, metrics=["f1", "accuracy"], target="Answer: {label}")
    assert pairs.positive_label == "same"
    evaluation = [Example("x", f"Answer: {word}", ()) for word in ("same", "different", "different", "same")]
    assert majority_score(pairs, "Answer: same", evaluation) == {"f1": pytest.approx(200 / 3), "accuracy": 50}
    references = [example.target for example in evaluation]
    assert score(pairs, references, references) == {"f1": 100, "accuracy": 100}
    assert majority_score(task(target="{y}"), "a", [Example("x", "b", ())]) == {"exact_match": 0}
