"""Tokens of the tasks' written descriptions, for a task encoder that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hyperscale.data.tasks import Task
from hyperscale.errors import DataError


@dataclass(frozen=True)
class DescriptionBatch:
    """One row for each task, padded on the right."""

    input_ids: Tensor
    """int64 [K, T]."""
    attention_mask: Tensor
    """int64 [K, T]: 1 on real tokens."""


def encode_descriptions(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, pad_token_id: int
) -> DescriptionBatch:
    """Tokenise each task's description without cutting it.

    Raises:
        DataError: a task has no description.
    """
    undescribed = [task.name for task in tasks if not task.description.strip()]
    if undescribed:
        raise DataError(
            f"task '{undescribed[0]}' has no description, which adaptation.task_encoder.kind=text reads; "
            "write one in its file"
        )
    texts = [task.description.strip() for task in tasks]
    rows = [tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return DescriptionBatch(
        torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], dtype=torch.int64),
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.int64),
    )
