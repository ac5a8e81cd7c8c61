"""Rows in, answers out: `hyperscale predict`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hyperscale.data.collate import Layout
from hyperscale.data.corpus import pad_token_id
from hyperscale.data.examples import Renderer, renderer
from hyperscale.data.rows import Row, read_rows
from hyperscale.data.shortening import shorten
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import Encoded, TaskTokenizer, TokenIds
from hyperscale.engine.collective import SingleProcess
from hyperscale.errors import DataError
from hyperscale.export.bundle import BundleManifest
from hyperscale.inference.answers import Answerer, Question
from hyperscale.logger import get_logger
from hyperscale.serving.load import LoadedBundles

_logger = get_logger(__name__)


def check_files(source: Path, target: Path) -> None:
    """Raise `DataError` for a file that cannot be read or written, before the backbone is loaded."""
    if not source.is_file():
        raise DataError(f"--input {source}: no such file")
    if target.is_dir():
        raise DataError(f"--output {target} is a folder; name a JSONL file")
    if not target.absolute().parent.is_dir():
        raise DataError(f"--output {target}: the folder {target.absolute().parent} does not exist; create it first")
    if not os.access(target.absolute().parent, os.W_OK):
        raise DataError(f"--output {target}: the folder {target.absolute().parent} is not writable; choose another")


def predict_file(bundles: LoadedBundles, input: Path, output: Path, batch_size: int) -> int:
    """Answer every row of a JSONL, CSV or Parquet file; the output is JSONL, each row with `prediction` added.

    The rows need the columns of the task's prompt; with several bundles also `task`, the bundle's task name.
    The output appears whole or not at all.

    Returns:
        The number of rows.

    Raises:
        DataError: a row lacks a column, names an unknown task, is too long, or there are no rows.
    """
    rows = list(read_rows(input))
    if not rows:
        raise DataError(f"{input} has no rows")
    answers = answer_rows(bundles, rows, batch_size)
    _write(output, [{**row.values, "prediction": answer} for row, answer in zip(rows, answers, strict=True)])
    return len(rows)


def answer_rows(bundles: LoadedBundles, rows: Sequence[Row], batch_size: int) -> list[str]:
    """Return the answer to each row, in order; tasks may be mixed. Tags are BIO with spaces between them."""
    tokenizers = _tokenizers(bundles, [manifest.task for manifest in bundles.manifests])
    renderers = [renderer(manifest.task) for manifest in bundles.manifests]
    candidate_ids = [
        tokenizer.encode_candidates(one.candidates) for tokenizer, one in zip(tokenizers, renderers, strict=True)
    ]
    questions = []
    for row in rows:
        task = _task_of(row, bundles.tasks)
        source = _encode_row(row, renderers[task], tokenizers[task], bundles.manifests[task])
        questions.append(Question(task, Encoded(source, (), candidate_ids[task]), renderers[task].candidates))
    return [
        renderers[question.task].read_answer(row, answer)
        for row, question, answer in zip(
            rows, questions, _answer(bundles, questions, tokenizers, batch_size), strict=True
        )
    ]


def continue_prompts(
    bundles: LoadedBundles, prompts: Sequence[str], tasks: Sequence[str], batch_size: int, max_new_tokens: int | None
) -> list[str]:
    """Return the greedy continuation of each prompt with the adapters of its task, in order; tasks may be mixed.

    Args:
        prompts: as the tasks' templates would write them; a chat task's prompt goes through the chat template.
        tasks: the name of each prompt's task.
        max_new_tokens: None = each task's own limit.

    Raises:
        BundleError: no bundle of such a task is loaded.
        DataError: a prompt is longer than its task was trained with.
    """
    changes = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    tokenizers = _tokenizers(bundles, [manifest.task.model_copy(update=changes) for manifest in bundles.manifests])
    questions = []
    for number, (prompt, name) in enumerate(zip(prompts, tasks, strict=True)):
        task = bundles.index_of(name)
        source = _encode(prompt, f"prompt {number}", tokenizers[task], bundles.manifests[task])
        questions.append(Question(task, Encoded(source, (), ()), ()))
    return _answer(bundles, questions, tokenizers, batch_size)


def _tokenizers(bundles: LoadedBundles, tasks: Sequence[Task]) -> list[TaskTokenizer]:
    is_encoder_decoder = bundles.model.architecture.is_encoder_decoder
    return [TaskTokenizer(bundles.tokenizer, task, is_encoder_decoder) for task in tasks]


def _answer(
    bundles: LoadedBundles, questions: Sequence[Question], tokenizers: Sequence[TaskTokenizer], batch_size: int
) -> list[str]:
    layout = Layout(pad_token_id(bundles.tokenizer), bundles.model.architecture.is_encoder_decoder)
    answerer = Answerer(bundles.model, SingleProcess(), bundles.device, tokenizers, layout, batch_size, _say)
    with torch.no_grad():
        return answerer(questions)


def _say(text: str, done: int, total: int) -> None:
    _logger.info("%s, batch %d of %d", text, done, total)


def _task_of(row: Row, names: Sequence[str]) -> int:
    if len(names) == 1:
        return 0
    if row.values.get("task") not in names:
        raise DataError(
            f"{row.where}: several bundles are loaded, so each row's 'task' must be one of {', '.join(names)}"
        )
    return names.index(row.values["task"])


def _encode_row(row: Row, render: Renderer, tokenizer: TaskTokenizer, manifest: BundleManifest) -> TokenIds:
    conversation = render.conversation(row)
    if conversation is None:
        return _encode(render.prompt(row), row.where, tokenizer, manifest)
    may_shorten = manifest.too_long == "truncate_source"
    source = tokenizer.encode_conversation(conversation, manifest.max_source_tokens, may_shorten)
    if source is None:
        raise DataError(
            f"{row.where}: the conversation has more than the {manifest.max_source_tokens} tokens that task "
            f"'{manifest.task.name}' was trained with; leave out its oldest turns"
        )
    return source


def _encode(prompt: str, where: str, tokenizer: TaskTokenizer, manifest: BundleManifest) -> TokenIds:
    if tokenizer.lacks_sentinels(prompt):
        raise DataError(f"{where}: more words than the backbone has sentinels for (T5: 99); split the sentence")
    (source,) = tokenizer.encode_prompts([prompt])
    limit = manifest.max_source_tokens
    if len(source) <= limit:
        return source
    if manifest.too_long == "truncate_source" and manifest.task.tagging is None:
        return shorten(source, limit)
    raise DataError(
        f"{where}: the prompt has {len(source)} tokens, more than the {limit} that task "
        f"'{manifest.task.name}' was trained with"
    )


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{output} cannot be written: {error.strerror}") from error
