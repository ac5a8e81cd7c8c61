"""Scores of every task on its validation or test split."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hyperscale.data.corpus import Corpus
from hyperscale.data.metrics import majority_score, score
from hyperscale.data.origins import Split
from hyperscale.engine.base import Engine
from hyperscale.inference.answers import Answerer, Question
from hyperscale.training.callbacks import EvaluationRecord

UNTOUCHED = "untouched"
MAJORITY = "majority"
VALIDATION = "validation"
TEST = "test"


@dataclass(frozen=True)
class Evaluation:
    """The scores of one evaluation, and the scored answers."""

    record: EvaluationRecord
    answers: Mapping[str, Sequence[str]]
    """task -> the answer to each row of the split, in the split's order."""


@dataclass(frozen=True)
class Evaluator:
    """Scores all tasks; every rank must call it, and every rank gets the same evaluation."""

    engine: Engine
    corpus: Corpus
    batch_size: int
    """Rows that one rank runs at once."""
    say: Callable[[str, int, int], None]
    """Reports progress to the user: what is running, how much is done, and how much there is."""
    check_stop: Callable[[], None] | None = None
    """Called on every rank before every batch. It may end the evaluation by raising, on all ranks alike."""

    def __call__(self, step: int, stage: str = VALIDATION) -> Evaluation:
        """Score all tasks with their adapters, or the backbone alone where `stage` is `untouched`.

        `test` scores the test splits, every other stage the validation splits. A task without rows has no score.
        """
        start = time.monotonic()
        split = split_of(stage)
        answerer = Answerer(
            self.engine.model,
            self.engine.collective,
            self.engine.device,
            [loaded.tokenizer for loaded in self.corpus.tasks],
            self.corpus.layout,
            self.batch_size,
            lambda text, done, total: self.say(f"{stage} scores: {text}", done, total),
            self.check_stop,
        )
        questions = [
            Question(index, encoded, example.candidates)
            for index, loaded in enumerate(self.corpus.tasks)
            for example, encoded in zip(loaded.scored(split).examples, loaded.scored(split).encoded, strict=True)
        ]
        with self.engine.evaluating():
            predictions = iter(answerer(questions, adapted=stage != UNTOUCHED))
        answers: dict[str, list[str]] = {}
        scores = {}
        for loaded in self.corpus.tasks:
            references = [example.target for example in loaded.scored(split).examples]
            answers[loaded.task.name] = [next(predictions) for _ in references]
            if references:
                scores[loaded.task.name] = score(loaded.task, answers[loaded.task.name], references)
        samples = _samples(self.corpus, split)
        return Evaluation(EvaluationRecord(step, stage, scores, samples, time.monotonic() - start), answers)


def split_of(stage: str) -> Split:
    """Return the split whose rows a stage scores."""
    return "test" if stage == TEST else "validation"


def majority_record(corpus: Corpus, split: Split = "validation") -> EvaluationRecord:
    """Return the scores of always giving each task's most common training answer."""
    scores = {
        loaded.task.name: majority_score(loaded.task, loaded.most_common_answer, loaded.scored(split).examples)
        for loaded in corpus.tasks
        if loaded.scored(split).examples
    }
    return EvaluationRecord(0, MAJORITY, scores, _samples(corpus, split), 0.0)


def _samples(corpus: Corpus, split: Split) -> dict[str, int]:
    sizes = {loaded.task.name: len(loaded.scored(split).encoded) for loaded in corpus.tasks}
    return {task: size for task, size in sizes.items() if size}
