"""The batches of one rank: its micro-batches of each optimizer step, and its share of an evaluation set.

Under ZeRO-3 every rank must run the model equally often, so all ranks get the same number of batches. Where an
evaluation set is too small for that, fillers (copies of a row, numbered -1) complete it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hyperscale.config.data import DataSettings
from hyperscale.data.collate import (
    Batch,
    Layout,
    PromptBatch,
    ScoringBatch,
    collate,
    collate_examples,
    collate_prompts,
)
from hyperscale.data.encoded import EncodedRows
from hyperscale.data.mixture import Mixture, Sample
from hyperscale.data.tokenization import Encoded, TokenIds
from hyperscale.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Which part of all rows one rank runs, and how its batches are laid out."""

    rank: int
    world_size: int
    layout: Layout


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches each rank runs in one optimizer step.

    Raises:
        ConfigError: the ranks cannot share the batch evenly; names the nearest batch sizes that work.
    """
    together = micro_batch_size * world_size
    if batch_size % together == 0:
        return batch_size // together
    below, above = batch_size // together * together, -(-batch_size // together) * together
    raise ConfigError(
        f"training.batch_size {batch_size} is not a multiple of workers × micro_batch_size = "
        f"{world_size} × {micro_batch_size}; use {f'{below} or {above}' if below else above}"
    )


class TrainLoader:
    """Gives one rank its micro-batches, step by step. The samples of a step are the same for any world size."""

    def __init__(
        self,
        datasets: Sequence[EncodedRows],
        settings: DataSettings,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        share: Share,
    ) -> None:
        """`datasets`: the training split of every task, in the order of task indices; `batch_size`: over all ranks."""
        self._datasets = datasets
        self._accumulation_steps = accumulation_steps(batch_size, micro_batch_size, share.world_size)
        self._micro_batch_size = micro_batch_size
        self._share = share
        self._mixture = Mixture([dataset.num_tokens for dataset in datasets], settings, batch_size, seed)

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step; all ranks run similar lengths at one time."""
        samples = self._mixture.next_step()
        size = self._micro_batch_size
        places = [(turn * self._share.world_size + self._share.rank) * size for turn in range(self._accumulation_steps)]
        return [self._collate(samples[place : place + size]) for place in places]

    def state(self) -> dict[str, Any]:
        """Return the place in the order of samples as JSON values; the same on every rank and for any world size."""
        return self._mixture.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; raises `CheckpointError` where the order would be another one."""
        self._mixture.load_state(state)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        examples = [self._datasets[sample.task][sample.row] for sample in samples]
        return collate_examples(examples, [sample.task for sample in samples], self._share.layout)


def scoring_batches(
    examples: Sequence[Encoded], tasks: Sequence[int], micro_batch_size: int, share: Share
) -> list[ScoringBatch]:
    """Return this rank's share of all examples with all their candidates; every rank gets the same number of batches.

    Candidates that differ only in their last token share a row. Rows are sorted by length, so a batch may mix tasks.

    Args:
        tasks: the task index of each example.
    """
    pairs = [(row, numbers) for row, example in enumerate(examples) for numbers in _rows_of(example.candidate_ids)]
    pairs.sort(key=lambda pair: len(examples[pair[0]].source_ids) + len(examples[pair[0]].candidate_ids[pair[1][0]]))
    batches = []
    for chosen, is_filler in _parts(len(pairs), micro_batch_size, share):
        rows, groups = zip(*(pairs[place] for place in chosen), strict=True)
        answers = [
            [examples[row].candidate_ids[number] for number in group] for row, group in zip(rows, groups, strict=True)
        ]
        batch = collate(
            [examples[row].source_ids for row in rows],
            [of_row[0] for of_row in answers],
            [tasks[row] for row in rows],
            share.layout,
        )
        most = max(map(len, answers))
        endings = [[one[-1] for one in of_row] + [of_row[0][-1]] * (most - len(of_row)) for of_row in answers]
        batches.append(ScoringBatch(batch, (-1,) * len(rows) if is_filler else rows, groups, torch.tensor(endings)))
    return batches


def _rows_of(candidates: Sequence[TokenIds]) -> list[tuple[int, ...]]:
    """Group the positions of candidates that are equal up to their last token."""
    groups: dict[TokenIds, list[int]] = {}
    for number, candidate in enumerate(candidates):
        groups.setdefault(candidate[:-1], []).append(number)
    return [tuple(group) for group in groups.values()]


def prompt_batches(
    examples: Sequence[Encoded], tasks: Sequence[int], limits: Sequence[int], micro_batch_size: int, share: Share
) -> list[PromptBatch]:
    """Return this rank's share of the prompts; every rank gets the same number of batches.

    Rows are sorted by their limits, then by length: a batch decodes until its longest answer is done, so a row that may
    have 8 new tokens does not wait for one that may have 256.

    Args:
        tasks: the task index of each example.
        limits: the most new tokens of each example.
    """
    ordered = sorted(range(len(examples)), key=lambda row: (limits[row], len(examples[row].source_ids)))
    batches = []
    for chosen, is_filler in _parts(len(ordered), micro_batch_size, share):
        rows = [ordered[place] for place in chosen]
        numbers = [-1] * len(rows) if is_filler else rows
        sources = [examples[row].source_ids for row in rows]
        of_tasks, of_limits = [tasks[row] for row in rows], [limits[row] for row in rows]
        batches.append(collate_prompts(sources, of_tasks, of_limits, numbers, share.layout))
    return batches


def _parts(num_rows: int, micro_batch_size: int, share: Share) -> list[tuple[range, bool]]:
    """Cut 0 … num_rows - 1 into batches of almost equal size; return this rank's rows, and whether they are fillers.

    Neighbouring batches go to neighbouring ranks, so that all ranks run similar lengths at the same time.
    """
    turns = -(-num_rows // (micro_batch_size * share.world_size))
    total = turns * share.world_size
    bounds = [number * num_rows // total for number in range(total + 1)] if total else []
    parts = []
    for turn in range(turns):
        place = turn * share.world_size + share.rank
        start, end = bounds[place : place + 2]
        first = min(start, num_rows - 1)
        parts.append((range(start, end), False) if end > start else (range(first, first + 1), True))
    return parts
