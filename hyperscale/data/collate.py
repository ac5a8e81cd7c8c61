"""Examples become padded tensors on the CPU.

Shapes: B rows, T tokens of the longest row, L label positions (L = T for a decoder-only model).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperscale.data.tokenization import Encoded, TokenIds

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


def collate(sources: Sequence[TokenIds], answers: Sequence[TokenIds], tasks: Sequence[int], layout: Layout) -> Batch:
    """Make a batch of prompts, their answers and their task indices."""
    if layout.is_encoder_decoder:
        inputs, labels = list(sources), list(answers)
    else:
        inputs = [source + answer for source, answer in zip(sources, answers, strict=True)]
        labels = [(IGNORED,) * len(source) + answer for source, answer in zip(sources, answers, strict=True)]
    return Batch(
        input_ids=_padded(inputs, layout.pad_token_id),
        attention_mask=_padded([(1,) * len(row) for row in inputs], 0),
        labels=_padded(labels, IGNORED),
        task_index=torch.tensor(tasks, dtype=torch.int64),
        num_tokens=sum(map(len, sources)) + sum(map(len, answers)),
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
    labels = _padded([_labels_of(one) for one in examples], IGNORED)
    return replace(batch, labels=labels)


def _labels_of(example: Encoded) -> TokenIds:
    """Return the ids where the loss counts them, `IGNORED` elsewhere."""
    ids = example.source_ids + example.target_ids
    labels = [IGNORED] * len(ids)
    for first, end in example.spans or ((len(example.source_ids), len(ids)),):
        labels[first:end] = ids[first:end]
    return tuple(labels)


def collate_prompts(
    sources: Sequence[TokenIds], tasks: Sequence[int], limits: Sequence[int], rows: Sequence[int], layout: Layout
) -> PromptBatch:
    """Make a batch of prompts for generation.

    Args:
        limits: the most new tokens of each row.
        rows: the index of each row's example; -1 for a filler.
    """
    left = not layout.is_encoder_decoder
    return PromptBatch(
        input_ids=_padded(sources, layout.pad_token_id, left),
        attention_mask=_padded([(1,) * len(source) for source in sources], 0, left),
        task_index=torch.tensor(tasks, dtype=torch.int64),
        max_new_tokens=torch.tensor(limits, dtype=torch.int64),
        rows=tuple(rows),
    )


def _padded(rows: Sequence[TokenIds], value: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    pads = [(value,) * (width - len(row)) for row in rows]
    return torch.tensor(
        [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)], dtype=torch.int64
    )
