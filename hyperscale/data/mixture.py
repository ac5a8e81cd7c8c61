"""Which examples form which optimizer step: a pure function of seed and step, the same for any number of workers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperscale.config.data import DataSettings, MixtureSettings
from hyperscale.data.random_stream import Ints, RandomStream
from hyperscale.errors import CheckpointError

Lengths = Sequence[int] | NDArray[Any]

_WINDOW, _EPOCH = 0, 1
"""Purposes of random streams. Each is seeded by (seed, purpose, counters), so none depends on earlier draws."""
_STREAM = "d9ce11989fef749a"
"""Names the draws of `RandomStream` in a checkpoint. Where numpy itself drew, this was a digest of its draws: a
checkpoint with another name was taken under another order."""


class Sample(NamedTuple):
    """One example of a step: its task's index, and its row in that task's training split."""

    task: int
    row: int


def rates(sizes: Sequence[int], settings: MixtureSettings) -> tuple[float, ...]:
    """Return each task's probability: min(n · scale, maximum)^(1/temperature), normalised to sum 1 (seqio's rule).

    `settings.weights` replace that rule.
    """
    if settings.weights is not None:
        return tuple(weight / sum(settings.weights) for weight in settings.weights)
    scaled = np.asarray(sizes, dtype=np.float64) * settings.scale
    if settings.maximum is not None:
        scaled = np.minimum(scaled, settings.maximum)
    powered = (scaled / scaled.max()) ** (1.0 / settings.temperature)  # divided first: no overflow at T near 0
    return tuple(float(rate) for rate in powered / powered.sum())


class Mixture:
    """Draws the samples of one optimizer step after another.

    Tasks are drawn by their rates; a task's rows come without replacement, in a new order every epoch. A window of
    `bucket_steps` steps is drawn at once, sorted by length, cut into steps, and the steps are shuffled. Within a step
    the samples are in order of length.
    """

    def __init__(self, lengths: Sequence[Lengths], settings: DataSettings, batch_size: int, seed: int) -> None:
        """`lengths`: tokens of every training example of every task; `batch_size`: samples of a step on all ranks.

        Arrays of lengths are kept as they are. For each row there are only its length and its place in the order of the
        epoch, 4 bytes.
        """
        self._lengths = [np.asarray(of_task) for of_task in lengths]
        self._rates = rates([len(of_task) for of_task in lengths], settings.mixture)
        self._settings = settings
        self._batch_size = batch_size
        self._seed = seed
        self._step = 0
        self._window: list[list[Sample]] = []
        # Rows drawn of each task before and after the current window.
        self._before = self._after = [0] * len(lengths)
        self._orders: dict[int, tuple[int, Ints]] = {}

    def next_step(self) -> list[Sample]:
        """Return the samples of the next step, shortest first."""
        window, position = divmod(self._step, self._settings.bucket_steps)
        if position == 0:
            self._before = self._after
            self._window, self._after = self._draw(window, self._before)
        self._step += 1
        return self._window[position]

    def state(self) -> dict[str, Any]:
        """Return, as JSON values, what `load_state` needs to continue with the next step."""
        drawn = self._before if self._step % self._settings.bucket_steps else self._after
        return {"step": self._step, "drawn": list(drawn), "order": self._order()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            CheckpointError: data, seed or settings differ, so that the order of samples would be another one.
        """
        ours = self._order()
        theirs = {"stream": ours["stream"], **state["order"]}  # older checkpoints do not name their stream
        changed = [f"{name} was {theirs.get(name)}, is {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
        if changed:
            raise CheckpointError(f"the checkpoint's order of samples cannot be continued: {'; '.join(changed)}")
        self._step = int(state["step"])
        self._before = self._after = list(state["drawn"])
        window, position = divmod(self._step, self._settings.bucket_steps)
        if position:
            self._window, self._after = self._draw(window, self._before)

    def _order(self) -> dict[str, Any]:
        """Return everything that decides the order of samples, except the lengths."""
        return {
            "stream": _STREAM,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "bucket_steps": self._settings.bucket_steps,
            "mixed_tasks": self._settings.mixed_tasks,
            "rows": [len(of_task) for of_task in self._lengths],
            "rates": list(self._rates),
        }

    def _draw(self, window: int, before: Sequence[int]) -> tuple[list[list[Sample]], list[int]]:
        """Return the steps of a window, and how many rows of each task are drawn after it."""
        steps, num_tasks = self._settings.bucket_steps, len(self._lengths)
        random = self._random(_WINDOW, window)
        if self._settings.mixed_tasks:
            tasks = random.choice(steps * self._batch_size, self._rates)
        else:
            tasks = np.repeat(random.choice(steps, self._rates), self._batch_size)
        counts = np.bincount(tasks, minlength=num_tasks)
        rows, lengths = np.empty_like(tasks), np.empty_like(tasks)
        for task in map(int, np.flatnonzero(counts)):
            drawn = self._rows(task, before[task], int(counts[task]))
            rows[tasks == task] = drawn
            lengths[tasks == task] = self._lengths[task][drawn]
        groups = np.zeros_like(tasks) if self._settings.mixed_tasks else tasks
        # Steps of one task stay so: each task was drawn a multiple of the batch.
        by_length = np.lexsort((lengths, groups))
        samples = [Sample(int(tasks[place]), int(rows[place])) for place in by_length]
        starts = random.permutation(steps) * self._batch_size
        after = [int(count + drawn) for count, drawn in zip(counts, before, strict=True)]
        return [samples[start : start + self._batch_size] for start in starts], after

    def _rows(self, task: int, first: int, count: int) -> Ints:
        """Return the rows of a task's draws number `first` to `first + count - 1`, across epochs."""
        size, parts = len(self._lengths[task]), []
        while count:
            epoch, start = divmod(first, size)
            part = self._epoch_order(task, epoch)[start : start + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch_order(self, task: int, epoch: int) -> Ints:
        if self._orders.get(task, (-1,))[0] != epoch:
            self._orders.pop(task, None)  # first, so that two orders are never held at once
            order = self._random(_EPOCH, task, epoch).permutation(len(self._lengths[task]))
            self._orders[task] = (epoch, order.astype(np.min_scalar_type(len(order))))
        return self._orders[task][1]

    def _random(self, *counters: int) -> RandomStream:
        return RandomStream(self._seed, *counters)
