"""Rows in, answers out: `hyperscale predict`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hyperscale.data.collate import Layout
from hyperscale.data.corpus import pad_token_id
from hyperscale.data.examples import renderer
from hyperscale.data.rows import Row, read_rows
from hyperscale.data.tokenization import Encoded, TaskTokenizer, TokenIds, shorten
from hyperscale.engine.collective import SingleProcess
from hyperscale.errors import DataError
from hyperscale.export.bundle import BundleManifest
from hyperscale.inference.answers import Answerer, Question
from hyperscale.logger import get_logger
from hyperscale.serving.load import LoadedBundles

_logger = get_logger(__name__)


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
    is_encoder_decoder = bundles.model.architecture.is_encoder_decoder
    tokenizers = [TaskTokenizer(bundles.tokenizer, manifest.task, is_encoder_decoder) for manifest in bundles.manifests]
    renderers = [renderer(manifest.task) for manifest in bundles.manifests]
    candidate_ids = [
        tokenizer.encode_candidates(one.candidates) for tokenizer, one in zip(tokenizers, renderers, strict=True)
    ]
    questions = []
    for row in rows:
        task = _task_of(row, [manifest.task.name for manifest in bundles.manifests])
        source = _encode(renderers[task].prompt(row), row, tokenizers[task], bundles.manifests[task])
        questions.append(Question(task, Encoded(source, (), candidate_ids[task]), renderers[task].candidates))
    layout = Layout(pad_token_id(bundles.tokenizer), is_encoder_decoder)
    answerer = Answerer(bundles.model, SingleProcess(), bundles.device, tokenizers, layout, batch_size, _say)
    with torch.no_grad():
        answers = answerer(questions)
    return [
        renderers[question.task].read_answer(row, answer)
        for row, question, answer in zip(rows, questions, answers, strict=True)
    ]


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


def _encode(prompt: str, row: Row, tokenizer: TaskTokenizer, manifest: BundleManifest) -> TokenIds:
    if tokenizer.lacks_sentinels(prompt):
        raise DataError(f"{row.where}: more words than the backbone has sentinels for (T5: 99); divide the sentence")
    (source,) = tokenizer.encode_prompts([prompt])
    limit = manifest.max_source_tokens
    if len(source) <= limit:
        return source
    if manifest.too_long == "truncate_source" and manifest.task.tagging is None:
        return shorten(source, limit)
    raise DataError(
        f"{row.where}: the prompt has {len(source)} tokens, more than the {limit} that task "
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
