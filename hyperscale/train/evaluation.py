"""Scores of every task on its validation split, or on its test split."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyperscale.data.corpus import Corpus
from hyperscale.data.metrics import majority_score, score
from hyperscale.data.tokenization import EncodedSplit
from hyperscale.engine.base import Engine
from hyperscale.errors import DataError
from hyperscale.train.answers import Answerer, Question
from hyperscale.train.callbacks import EvaluationRecord

UNTOUCHED = "untouched"
MAJORITY = "majority"
VALIDATION = "validation"
TEST = "test"


@dataclass(frozen=True)
class Evaluator:
    """Scores one split of every task; every rank must call it, and every rank gets the same record."""

    engine: Engine
    corpus: Corpus
    batch_size: int
    """Rows that one rank runs at once."""
    say: Callable[[str, int, int], None]
    """Tells a person what is happening, and how much of it is done."""

    def __call__(self, step: int, stage: str = VALIDATION) -> EvaluationRecord:
        """Score all tasks with their adapters, or the backbone alone where `stage` is `untouched`.

        Where `stage` is `test` the tasks that have a test split are scored on it, else all on their validation split.
        """
        start = time.monotonic()
        answerer = Answerer(
            self.engine.model,
            self.engine.collective,
            self.engine.device,
            [loaded.tokenizer for loaded in self.corpus.tasks],
            self.corpus.layout,
            self.batch_size,
            lambda text, done, total: self.say(f"{stage} scores: {text}", done, total),
        )
        rows = _rows(self.corpus, stage)
        questions = [
            Question(index, encoded, example.candidates)
            for index, split in rows.items()
            for example, encoded in zip(split.examples, split.encoded, strict=True)
        ]
        with self.engine.evaluating():
            answers = iter(answerer(questions, adapted=stage != UNTOUCHED))
        scores = {}
        for index, split in rows.items():
            task = self.corpus.tasks[index].task
            references = [example.target for example in split.examples]
            predictions = [next(answers) for _ in references]
            scores[task.name] = score(task, predictions, references)
        return EvaluationRecord(step, stage, scores, _samples(self.corpus, rows), time.monotonic() - start)


def majority_record(corpus: Corpus, split: str = VALIDATION) -> EvaluationRecord:
    """Return what always giving the most common training answer of each task would score on a split."""
    rows = _rows(corpus, split)
    scores = {
        corpus.tasks[index].task.name: majority_score(
            corpus.tasks[index].task, corpus.tasks[index].train.examples, found.examples
        )
        for index, found in rows.items()
    }
    return EvaluationRecord(0, MAJORITY, scores, _samples(corpus, rows), 0.0)


def _rows(corpus: Corpus, stage: str) -> Mapping[int, EncodedSplit]:
    """Return task index -> the rows that a stage scores."""
    if stage != TEST:
        return dict(enumerate(loaded.validation for loaded in corpus.tasks))
    found = {index: split for index, split in enumerate(corpus.tests) if split is not None}
    if not found:
        raise DataError(f"none of the tasks has test rows: {', '.join(corpus.names)}; score their validation split")
    return found


def _samples(corpus: Corpus, rows: Mapping[int, EncodedSplit]) -> dict[str, int]:
    return {corpus.tasks[index].task.name: len(split.encoded) for index, split in rows.items()}
