"""Examples become padded tensors on the CPU.

Shapes: B rows, T tokens of the longest row, L label positions (L = T for a decoder-only model).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperscale.data.tokenization import Encoded, RowIds

IGNORED = -100
"""Label of a position without loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """Rows with labels, padded on the right."""

    input_ids: Tensor
    """int64 [B, T]: prompt and answer for a decoder-only model, the prompt for an encoder."""
    attention_mask: Tensor
    """int64 [B, T]: 1 on real tokens."""
    labels: Tensor
    """int64 [B, L], `IGNORED` off the answer. Decoder-only: the answer's ids where they stand in `input_ids`, not
    shifted. Encoder-decoder: the decoder's targets."""
    task_index: Tensor
    """int64 [B]."""
    num_tokens: int
    """Real tokens, the decoder's included."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to be continued: padded on the left for a decoder-only model, on the right for an encoder."""

    input_ids: Tensor
    """int64 [B, T]."""
    attention_mask: Tensor
    """int64 [B, T]."""
    task_index: Tensor
    """int64 [B]."""
    max_new_tokens: Tensor
    """int64 [B]: the most tokens that each row's answer may have."""
    rows: tuple[int, ...]
    """Index of each row's example in the evaluation set; -1 = a filler that only keeps the ranks in step."""


@dataclass(frozen=True)
class ScoringBatch:
    """Each row holds one example and the candidates that differ only in their last token."""

    batch: Batch
    """The answer is the first of the row's candidates."""
    rows: tuple[int, ...]
    """Index of each row's example in the evaluation set; -1 = a filler that only keeps the ranks in step."""
    candidates: tuple[tuple[int, ...], ...]
    """Positions of each row's answers among the example's candidates."""
    endings: Tensor
    """int64 [B, C]: the last token of each of these answers; rows of fewer than C repeat their first."""


@dataclass(frozen=True)
class Layout:
    """How a backbone wants its batches padded and labelled."""

    pad_token_id: int
    is_encoder_decoder: bool


def collate(sources: Sequence[RowIds], answers: Sequence[RowIds], tasks: Sequence[int], layout: Layout) -> Batch:
    """Make a batch of prompts, their answers and their task indices. The loss counts the whole answers."""
    counts = [len(answer) for answer in answers]
    if layout.is_encoder_decoder:
        widths, inputs, labels = (
            list(map(len, sources)),
            _padded(sources, layout.pad_token_id),
            _padded(answers, IGNORED),
        )
    else:
        widths = [len(source) + count for source, count in zip(sources, counts, strict=True)]
        inputs = np.full((len(widths), max(widths)), layout.pad_token_id, np.int64)
        labels = np.full(inputs.shape, IGNORED, np.int64)
        for row, (source, answer) in enumerate(zip(sources, answers, strict=True)):
            inputs[row, : len(source)] = source
            inputs[row, len(source) : widths[row]] = answer
            labels[row, len(source) : widths[row]] = answer
    return Batch(
        input_ids=torch.from_numpy(inputs),
        attention_mask=_mask(widths),
        labels=torch.from_numpy(labels),
        task_index=torch.tensor(tasks, dtype=torch.int64),
        num_tokens=sum(map(len, sources)) + sum(counts),
    )


def collate_examples(examples: Sequence[Encoded], tasks: Sequence[int], layout: Layout) -> Batch:
    """Make a training batch.

    Raises:
        ValueError: an encoder-decoder's example has `spans`: its loss is on the decoder's targets.
    """
    sources, answers = [one.source_ids for one in examples], [one.target_ids for one in examples]
    batch = collate(sources, answers, tasks, layout)
    if not any(one.spans for one in examples):
        return batch
    if layout.is_encoder_decoder:
        raise ValueError("spans are positions of a decoder-only model")
    labels = torch.full_like(batch.labels, IGNORED)
    for row, one in enumerate(examples):
        for first, end in one.spans or ((len(one.source_ids), one.num_tokens),):
            labels[row, first:end] = batch.input_ids[row, first:end]
    return replace(batch, labels=labels)


def collate_prompts(
    sources: Sequence[RowIds], tasks: Sequence[int], limits: Sequence[int], rows: Sequence[int], layout: Layout
) -> PromptBatch:
    """Make a batch of prompts for generation.

    Args:
        limits: the most new tokens of each row.
        rows: the index of each row's example; -1 for a filler.
    """
    left = not layout.is_encoder_decoder
    return PromptBatch(
        input_ids=torch.from_numpy(_padded(sources, layout.pad_token_id, left)),
        attention_mask=_mask(list(map(len, sources)), left),
        task_index=torch.tensor(tasks, dtype=torch.int64),
        max_new_tokens=torch.tensor(limits, dtype=torch.int64),
        rows=tuple(rows),
    )


def _padded(rows: Sequence[RowIds], value: int, left: bool = False) -> NDArray[np.int64]:
    width = max(map(len, rows))
    padded = np.full((len(rows), width), value, np.int64)
    for number, row in enumerate(rows):
        padded[number, width - len(row) if left else 0 : width if left else len(row)] = row
    return padded


def _mask(lengths: Sequence[int], left: bool = False) -> Tensor:
    """Return int64 [B, T]: 1 on the tokens of rows of these lengths."""
    counts, places = torch.tensor(lengths)[:, None], torch.arange(max(lengths))[None, :]
    return (places >= max(lengths) - counts if left else places < counts).long()
