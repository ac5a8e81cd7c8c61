"""All tasks of a run, read, encoded and described."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.collate import Layout
from hyperscale.data.sources import TaskData, load_task_data
from hyperscale.data.tasks import Split, Task, load_task
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
    """None unless asked for."""

    def scored(self, split: Split) -> EncodedSplit:
        """Return a split to be scored; `test` must have been asked for when the corpus was loaded."""
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
        """Return per task where its rows are from, their digest, and how many are used."""
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
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool, with_test: bool = False
) -> Corpus:
    """Read and encode all tasks of a recipe, their test splits only `with_test`.

    Raises:
        DataError: an unknown task, two tasks of one name, two that must not be in one run, a test split that is asked
            for and missing, or rows that are wrong; located by file and line.
    """
    tasks = [load_task(name, settings.task_folders) for name in settings.tasks]
    _refuse_equal_names(tasks)
    _refuse_forbidden_pairs(tasks)
    layout = Layout(pad_token_id(tokenizer), is_encoder_decoder)
    return Corpus(tuple(_load(task, settings, tokenizer, is_encoder_decoder, with_test) for task in tasks), layout)


def _load(
    task: Task, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool, with_test: bool
) -> LoadedTask:
    data = load_task_data(task, settings.train_limit, settings.validation_limit, settings.test_limit)
    if with_test and "test" not in data.splits:
        raise DataError(
            f"task '{task.name}' has no test rows ({data.source}); score the validation rows, or add a test split"
        )
    task_tokenizer = TaskTokenizer(tokenizer, data.task, is_encoder_decoder)
    return LoadedTask(
        data.task,
        data,
        task_tokenizer,
        train=task_tokenizer.encode_split(data.splits["train"], settings),
        validation=task_tokenizer.encode_split(data.splits["validation"], settings),
        test=task_tokenizer.encode_split(data.splits["test"], settings) if with_test else None,
    )


def _refuse_equal_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"data.tasks: several task files are named {', '.join(repeated)}; a task's name must be unique in a run"
        )


def _refuse_forbidden_pairs(tasks: Sequence[Task]) -> None:
    names = {task.name for task in tasks}
    for task in tasks:
        for other in task.not_with:
            if other in names:
                raise DataError(
                    f"data.tasks: '{task.name}' must not be in one run with '{other}' (not_with in its task file): "
                    f"{task.description.rstrip('. ') or 'it gives no reason'}. Leave one of the two out"
                )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills short rows; it is masked everywhere, so the end token serves where there is no other."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(pad, int):
        raise DataError(f"the tokenizer of {tokenizer.name_or_path} has neither a padding nor an end token")
    return pad
