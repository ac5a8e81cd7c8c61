"""`predictions/<stage>.jsonl` in the run folder: every scored row with its answer, to see what went wrong.

    {"task": "tweets", "input": "Tweet: …", "reference": " positive", "prediction": " negative"}

A new evaluation of a stage replaces the previous one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyperscale.data.corpus import Corpus
from hyperscale.errors import HyperscaleError
from hyperscale.places import Place, open_place
from hyperscale.training.evaluation import split_of


@dataclass(frozen=True)
class TaskAnswers:
    """One task's references and predictions, in the order of its split."""

    references: tuple[str, ...]
    predictions: tuple[str, ...]


def write_predictions(folder: str, corpus: Corpus, stage: str, answers: Mapping[str, Sequence[str]]) -> None:
    """Write the rows of one evaluation; on rank 0 only."""
    lines = [
        json.dumps(
            {"task": loaded.task.name, "input": example.source, "reference": example.target, "prediction": answer},
            ensure_ascii=False,
        )
        for loaded in corpus.tasks
        for example, answer in zip(loaded.scored(split_of(stage)).examples, answers[loaded.task.name], strict=True)
    ]
    place = _place(folder, stage)
    place.fs.makedirs(place.parent.path, exist_ok=True)
    place.fs.pipe_file(place.path, ("\n".join(lines) + "\n").encode())


def read_predictions(folder: str, stage: str) -> dict[str, TaskAnswers]:
    """Return task -> answers from a run's newest evaluation of a stage.

    Raises:
        HyperscaleError: the run has not scored that stage.
    """
    place = _place(folder, stage)
    try:
        text = place.fs.cat_file(place.path).decode()
    except FileNotFoundError as error:
        raise HyperscaleError(f"{folder} contains no {stage} predictions: {place} is missing") from error
    pairs: dict[str, list[tuple[str, str]]] = {}
    for line in text.strip().split("\n"):
        row = json.loads(line)
        pairs.setdefault(row["task"], []).append((row["reference"], row["prediction"]))
    return {
        task: TaskAnswers(tuple(reference for reference, _ in answers), tuple(prediction for _, prediction in answers))
        for task, answers in pairs.items()
    }


def _place(folder: str, stage: str) -> Place:
    return open_place(folder).child("predictions").child(f"{stage}.jsonl")
