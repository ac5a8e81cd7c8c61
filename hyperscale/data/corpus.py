"""The tasks of a run: their rows, read and encoded, and a description of where the rows come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.collate import Layout
from hyperscale.data.origins import Split
from hyperscale.data.sources import TaskData, load_task_data, without_training_texts
from hyperscale.data.tasks import Task, load_task
from hyperscale.data.text_metrics import check_available
from hyperscale.data.tokenization import EncodedSplit, TaskTokenizer
from hyperscale.errors import DataError


@dataclass(frozen=True)
class LoadedTask:
    """One task as a run uses it; its place in the corpus is its task index."""

    task: Task
    data: TaskData
    tokenizer: TaskTokenizer
    train: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit | None
    """None if the test splits were not loaded; empty if the task has no test rows."""

    def scored(self, split: Split) -> EncodedSplit:
        """Return the split to score; `test` needs a corpus that was loaded `with_test`."""
        encoded = self.test if split == "test" else self.validation
        assert encoded is not None, f"the test split of {self.task.name} was not loaded"
        return encoded


@dataclass(frozen=True)
class Corpus:
    """The tasks of a run, in the order of their indices."""

    tasks: tuple[LoadedTask, ...]
    layout: Layout

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(loaded.task.name for loaded in self.tasks)

    def describe(self) -> Mapping[str, Mapping[str, Any]]:
        """Return, for each task, the source and digest of its rows and how many of them are used."""
        return {
            loaded.task.name: {
                "source": loaded.data.source,
                "digest": loaded.data.digest,
                "train": len(loaded.train.encoded),
                "validation": len(loaded.validation.encoded),
            }
            for loaded in self.tasks
        }


def load_corpus(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    with_test: bool = False,
    may_lack_test: bool = False,
) -> Corpus:
    """Read and encode all tasks of a recipe; test splits only `with_test`.

    With `may_lack_test`, one task with a test split is enough. Without it, every task must have one.

    Raises:
        DataError: a task is unknown, two tasks have the same name or exclude each other, a requested test split is
            missing, or a row is wrong (with file and line).
    """
    tasks = [load_task(name, settings.task_folders).written_for(is_encoder_decoder) for name in settings.tasks]
    _check_unique_names(tasks)
    _check_allowed_pairs(tasks)
    for name in dict.fromkeys(name for task in tasks for name in task.metrics):
        check_available(name)
    loaded = _without_shared_texts(
        [load_task_data(task, settings.train_limit, settings.validation_limit, settings.test_limit) for task in tasks]
    )
    if with_test:
        _check_test_splits(loaded, may_lack_test)
    layout = Layout(pad_token_id(tokenizer), is_encoder_decoder)
    return Corpus(tuple(_encode(data, settings, tokenizer, is_encoder_decoder, with_test) for data in loaded), layout)


def _check_test_splits(loaded: Sequence[TaskData], may_lack_test: bool) -> None:
    untested = [data for data in loaded if "test" not in data.splits]
    if untested and not (may_lack_test and len(untested) < len(loaded)):
        raise DataError(
            "\n".join(
                f"task '{data.task.name}' has no test rows ({data.source}); "
                "score the validation rows, or add a test split"
                for data in untested
            )
        )


def _without_shared_texts(loaded: Sequence[TaskData]) -> list[TaskData]:
    """Leave out training rows whose texts are scored by a task that `shares_texts_with` names."""
    scored = {
        data.task.name: {example.content for split in ("validation", "test") for example in data.splits.get(split, ())}
        for data in loaded
    }
    nothing: set[bytes] = set()
    return [
        without_training_texts(data, nothing.union(*(scored.get(name, ()) for name in data.task.shares_texts_with)))
        for data in loaded
    ]


def _encode(
    data: TaskData,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    with_test: bool,
) -> LoadedTask:
    task_tokenizer = TaskTokenizer(tokenizer, data.task, is_encoder_decoder)
    return LoadedTask(
        data.task,
        data,
        task_tokenizer,
        train=task_tokenizer.encode_split(data.splits["train"], settings),
        validation=task_tokenizer.encode_split(data.splits["validation"], settings),
        test=task_tokenizer.encode_split(data.splits.get("test", ()), settings) if with_test else None,
    )


def check_same_rows(descriptions: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Check that all workers read the same rows: these depend on each node's variables, folders and caches.

    Args:
        descriptions: each rank's `Corpus.describe()`.

    Raises:
        DataError: the rows of a task differ.
    """
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for task, description in first.items():
            if other[task]["digest"] != description["digest"]:
                raise DataError(
                    f"task '{task}': worker 0 (from {description['source']}) and worker {rank} (from "
                    f"{other[task]['source']}) read different rows. Give all nodes the same files and variables"
                )


def _check_unique_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"data.tasks: several task files are named {', '.join(repeated)}; a task's name must be unique in a run"
        )


def _check_allowed_pairs(tasks: Sequence[Task]) -> None:
    names = {task.name for task in tasks}
    for task in tasks:
        for other in task.not_with:
            if other in names:
                raise DataError(
                    f"data.tasks: '{task.name}' must not be in one run with '{other}' (not_with in its task file): "
                    f"{task.description.rstrip('. ') or 'it gives no reason'}. Leave one of the two out"
                )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills short rows: the padding token, else the end token, since padding is always masked."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(pad, int):
        raise DataError(f"the tokenizer of {tokenizer.name_or_path} has neither a padding token nor an end token")
    return pad
