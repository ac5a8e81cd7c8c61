"""The counts of a step are exact at any size."""

import dataclasses

import torch

from hyperscale.data.collate import Batch
from hyperscale.engine.step import _Totals


def test_counts_are_exact_above_24_bits() -> None:
    """fp32 cannot tell 2^24 from 2^24 + 1."""
    totals = _Totals.zeros(1, torch.device("cpu"))
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Batch)), torch.zeros(3, 1))
    for tokens in (2**24, 1):
        batch = Batch(**fields | {"task_index": torch.zeros(3, dtype=torch.int64), "num_tokens": tokens})
        totals.add(torch.tensor(1.0), 1.0, torch.ones(1), torch.tensor([0]), batch)
    result = totals.result("token_mean", 0.1, torch.tensor(1.0))
    assert (result.tokens, result.samples, result.task_losses) == (2**24 + 1, 6, {0: 1.0})
