"""The tasks' written descriptions as tokens, for a task encoder that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hyperscale.data.tasks import Task
from hyperscale.errors import DataError


@dataclass(frozen=True)
class DescriptionBatch:
    """One row a task, padded on the right."""

    input_ids: Tensor
    """int64 [K, T]."""
    attention_mask: Tensor
    """int64 [K, T]: 1 on real tokens."""


def encode_descriptions(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, pad_token_id: int
) -> DescriptionBatch:
    """Tokenise what each task's file says of it, whole.

    Raises:
        DataError: a task says nothing.
    """
    silent = [task.name for task in tasks if not task.description.strip()]
    if silent:
        raise DataError(
            f"task '{silent[0]}' has no description, which adaptation.task_encoder.kind=text reads; "
            "write one in its file"
        )
    texts = [task.description.strip() for task in tasks]
    rows = [tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return DescriptionBatch(
        torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], dtype=torch.int64),
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.int64),
    )
