"""Scores against values worked out by hand, and F1 of spans against seqeval's."""

import json
from pathlib import Path

import pytest

from hyperscale.data.examples import Example
from hyperscale.data.metric_table import METRICS
from hyperscale.data.metrics import compute, f1_counts, majority_score, score
from hyperscale.data.tasks import Task
from hyperscale.errors import DataError


def task(**fields: object) -> Task:
    return Task.model_validate({"name": "t", "source": "rows.jsonl", "input": "{text}"} | fields)


def test_every_name_a_task_may_use_is_computed():
    rows = {"pearson": ["1", "2"], "spearman": ["1", "2"], "span_f1": ["B-x", "O"]}
    for name in METRICS:
        texts = rows.get(name, ["the old mill is blue today", "two small moons and one planet"])
        assert compute([name], texts, texts, positive=texts[0])[name] == pytest.approx(100), name


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
    train = [Example("x", f"Answer: {word}", ()) for word in ("same", "different", "same")]
    evaluation = [Example("x", f"Answer: {word}", ()) for word in ("same", "different", "different", "same")]
    assert majority_score(pairs, train, evaluation) == {"f1": pytest.approx(200 / 3), "accuracy": 50}
    references = [example.target for example in evaluation]
    assert score(pairs, references, references) == {"f1": 100, "accuracy": 100}
    tie = [Example("x", word, ()) for word in ("b", "a")]
    assert majority_score(task(target="{y}"), tie, tie[:1]) == {"exact_match": 0}
