"""Scores of every task on its validation split."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hyperscale.data.corpus import Corpus
from hyperscale.data.metrics import majority_score, score
from hyperscale.engine.base import Engine
from hyperscale.train.answers import Answerer, Question
from hyperscale.train.callbacks import EvaluationRecord

UNTOUCHED = "untouched"
MAJORITY = "majority"
VALIDATION = "validation"


@dataclass(frozen=True)
class Evaluator:
    """Scores the validation splits; every rank must call it, and every rank gets the same record."""

    engine: Engine
    corpus: Corpus
    batch_size: int
    """Rows that one rank runs at once."""
    say: Callable[[str, int, int], None]
    """Tells a person what is happening, and how much of it is done."""

    def __call__(self, step: int, stage: str = VALIDATION) -> EvaluationRecord:
        """Score all tasks with their adapters, or the backbone alone where `stage` is `untouched`."""
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
        questions = [
            Question(index, encoded, example.candidates)
            for index, loaded in enumerate(self.corpus.tasks)
            for example, encoded in zip(loaded.validation.examples, loaded.validation.encoded, strict=True)
        ]
        with self.engine.evaluating():
            answers = iter(answerer(questions, adapted=stage != UNTOUCHED))
        scores = {}
        for loaded in self.corpus.tasks:
            references = [example.target for example in loaded.validation.examples]
            predictions = [next(answers) for _ in references]
            scores[loaded.task.name] = score(loaded.task, predictions, references)
        return EvaluationRecord(step, stage, scores, _samples(self.corpus), time.monotonic() - start)


def majority_record(corpus: Corpus) -> EvaluationRecord:
    """Return what always giving the most common training answer of each task would score."""
    scores = {
        loaded.task.name: majority_score(loaded.task, loaded.train.examples, loaded.validation.examples)
        for loaded in corpus.tasks
    }
    return EvaluationRecord(0, MAJORITY, scores, _samples(corpus), 0.0)


def _samples(corpus: Corpus) -> dict[str, int]:
    return {loaded.task.name: len(loaded.validation.encoded) for loaded in corpus.tasks}
