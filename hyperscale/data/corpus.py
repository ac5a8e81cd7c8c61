"""The tasks of a run: their rows, opened in the cache, and a description of where the rows come from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.config.sizes import format_size
from hyperscale.data.cache import Entry, cached, data_cache
from hyperscale.data.collate import Layout
from hyperscale.data.encoded import EncodedRows, EncodedSplit, ExampleRows, ScoredSplit, open_table
from hyperscale.data.encoding import EntryInfo, SplitInfo, write_entry
from hyperscale.data.examples import renderer
from hyperscale.data.fingerprint import fingerprint, tokenizer_digest
from hyperscale.data.origins import Split
from hyperscale.data.sources import OpenSource, open_source, with_labels
from hyperscale.data.tasks import Task, load_task
from hyperscale.data.text_metrics import check_available
from hyperscale.data.tokenization import TaskTokenizer
from hyperscale.errors import DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)


@dataclass(frozen=True)
class LoadedTask:
    """One task as a run uses it; its place in the corpus is its task index."""

    task: Task
    """The task. Its `labels` are filled in if they come from the data."""
    source: str
    """Printable origin of its rows: `file:…`, `asset:…` or `hub:…`."""
    digest: str
    """sha256 (hex) of all examples of all splits."""
    most_common_answer: str
    """Of the training rows; of equally common answers the first in alphabetical order."""
    tokenizer: TaskTokenizer
    train: EncodedSplit
    validation: ScoredSplit
    test: ScoredSplit | None
    """None if the test splits were not loaded; empty if the task has no test rows."""

    def scored(self, split: Split) -> ScoredSplit:
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
                "source": loaded.source,
                "digest": loaded.digest,
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
    """Open the encoded rows of all tasks of a recipe; test splits only `with_test`.

    Rows that are not in the cache of this machine are read and encoded first, by one of the processes that ask.
    With `may_lack_test`, one task with a test split is enough. Without it, every task must have one.

    Raises:
        DataError: a task is unknown, two tasks have the same name or exclude each other, a requested test split is
            missing, or a row is wrong (with file and line).
        AssetError: the cache cannot be written.
    """
    tasks = [load_task(name, settings.task_folders).written_for(is_encoder_decoder) for name in settings.tasks]
    _check_unique_names(tasks)
    _check_allowed_pairs(tasks)
    for name in dict.fromkeys(name for task in tasks for name in task.metrics):
        check_available(name)
    cache = _TaskCache(settings, tokenizer, is_encoder_decoder)
    cached_tasks = _without_shared_texts([cache.open(task) for task in tasks], cache)
    if with_test:
        _check_test_splits(cached_tasks, may_lack_test)
    corpus = Corpus(
        tuple(_load(one, settings, with_test) for one in cached_tasks),
        Layout(pad_token_id(tokenizer), is_encoder_decoder),
    )
    _report_cache(cached_tasks, cache.folder)
    return corpus


@dataclass(frozen=True)
class _CachedTask:
    tokenizer: TaskTokenizer
    """Its task has its labels."""
    source: OpenSource
    entry: Entry

    @property
    def task(self) -> Task:
        return self.tokenizer.task

    def table(self, split: Split) -> pa.Table:
        return open_table(self.entry.folder / f"{split}.arrow")

    def examples(self, split: Split) -> ExampleRows:
        return ExampleRows(self.table(split), renderer(self.task).candidates)

    def scored_texts(self) -> set[bytes]:
        """Return the digests of the texts in validation and test."""
        return {text for split in self.entry.info.splits if split != "train" for text in self.examples(split).contents}


class _TaskCache:
    """Opens tasks with one tokenizer and one set of limits."""

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> None:
        self.folder = data_cache(settings.cache_folder)
        self._settings = settings
        self._tokenizer = tokenizer
        self._digest = tokenizer_digest(tokenizer)
        self._is_encoder_decoder = is_encoder_decoder

    def open(self, task: Task, excluded: Collection[bytes] = ()) -> _CachedTask:
        """Open a task's encoded rows, or encode them. `excluded`: texts that must not be among the training rows."""
        source = open_source(task, self.folder / ".digests")
        key = fingerprint(task, source.content, self._digest, self._is_encoder_decoder, self._settings, excluded)

        def write(folder: Path, scratch: Path) -> EntryInfo:
            rows = source.read()
            tokenizer = TaskTokenizer(self._tokenizer, with_labels(task, rows), self._is_encoder_decoder)
            return write_entry(tokenizer, self._settings, source.printed, rows, excluded, folder, scratch)

        entry = cached(self.folder, task.name, key, write)
        labelled = task.model_copy(update={"labels": entry.info.labels})
        return _CachedTask(TaskTokenizer(self._tokenizer, labelled, self._is_encoder_decoder), source, entry)


def _check_test_splits(tasks: Sequence[_CachedTask], may_lack_test: bool) -> None:
    untested = [one for one in tasks if "test" not in one.entry.info.splits]
    if untested and not (may_lack_test and len(untested) < len(tasks)):
        raise DataError(
            "\n".join(
                f"task '{one.task.name}' has no test rows ({one.source.printed}); "
                "score the validation rows, or add a test split"
                for one in untested
            )
        )


def _without_shared_texts(tasks: Sequence[_CachedTask], cache: _TaskCache) -> list[_CachedTask]:
    """Leave out training rows whose texts are scored by a task that `shares_texts_with` names."""
    by_name = {one.task.name: one for one in tasks}
    kept = []
    for one in tasks:
        others = [by_name[name] for name in one.task.shares_texts_with if name in by_name]
        excluded = {text for other in others for text in other.scored_texts()}
        kept.append(cache.open(one.task, excluded) if excluded else one)
    return kept


def _load(cached_task: _CachedTask, settings: DataSettings, with_test: bool) -> LoadedTask:
    task, info = cached_task.task, cached_task.entry.info
    candidate_ids = tuple(tuple(ids) for ids in info.candidate_ids)

    def encoded(split: Split) -> EncodedSplit:
        rows = EncodedRows(cached_task.table(split), candidate_ids)
        of_split = info.splits[split]
        report_split(cached_task.tokenizer, rows, of_split, settings)
        return EncodedSplit(rows, of_split.dropped, of_split.shortened)

    def scored(split: Split) -> ScoredSplit:
        one = encoded(split)
        return ScoredSplit(one.encoded, one.dropped, one.shortened, cached_task.examples(split))

    def test() -> ScoredSplit | None:
        if not with_test:
            return None
        return scored("test") if "test" in info.splits else ScoredSplit(EncodedRows.of([]), 0)

    return LoadedTask(
        task,
        cached_task.source.printed,
        info.digest,
        info.most_common_answer,
        cached_task.tokenizer,
        encoded("train"),
        scored("validation"),
        test(),
    )


def report_split(tokenizer: TaskTokenizer, rows: EncodedRows, info: SplitInfo, settings: DataSettings) -> None:
    """Warn of rows that were left out or shortened, and of answers that cannot be generated whole.

    Raises:
        DataError: no row is left, or the split could not be encoded.
    """
    task = tokenizer.task
    if info.problem is not None:
        raise DataError(info.problem)
    total = info.rows + info.dropped
    limits = f"{settings.max_source_tokens} source and {settings.max_target_tokens} target tokens"
    if task.tagging is not None and tokenizer.is_encoder_decoder:
        limits += ", or without a sentinel for every word"
    if info.dropped and not info.rows:
        raise DataError(
            f"task '{task.name}': all {info.dropped} rows of a split are empty or beyond {limits}; "
            "raise data.max_source_tokens or data.max_target_tokens"
        )
    if info.dropped:
        _logger.warning("task %s: %d of %d rows left out, beyond %s", task.name, info.dropped, total, limits)
    if info.shortened:
        _logger.warning(
            "task %s: %d of %d prompts shortened to %d tokens",
            *(task.name, info.shortened, total, settings.max_source_tokens),
        )
    answers = rows.target_tokens - 1
    longer = answers[answers > task.max_new_tokens] if task.label_column is None else ()
    if len(longer):
        _logger.warning(
            "task %s: %d of %d answers have more than max_new_tokens %d, up to %d: they cannot be generated whole",
            *(task.name, len(longer), len(rows), task.max_new_tokens, max(longer)),
        )


def _report_cache(tasks: Sequence[_CachedTask], folder: Path) -> None:
    new, old = ([one for one in tasks if one.entry.is_new is is_new] for is_new in (True, False))
    for verb, some in (("encoded into", new), ("reused from", old)):
        if some:
            rows = sum(split.rows for one in some for split in one.entry.info.splits.values())
            size = format_size(sum(one.entry.num_bytes for one in some))
            names = f"{len(some)} tasks" if len(some) > 1 else f"task {some[0].task.name}"
            _logger.info("%s rows of %s %s %s (%s)", f"{rows:,}", names, verb, folder, size)


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
