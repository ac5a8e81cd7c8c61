"""The order of samples: shares, epochs, lengths, and a resume that no one can tell from a run in one piece."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from hyperscale.config.data import DataSettings, MixtureSettings
from hyperscale.data.mixture import Mixture, Sample, rates
from hyperscale.data.random_stream import RandomStream
from hyperscale.errors import CheckpointError

SIZES = (40, 10, 23)
KNOWN = [[(2, 15), (0, 31), (0, 38), (2, 12)], [(0, 34), (0, 35), (0, 15), (0, 21)], [(0, 6), (0, 17), (0, 18), (2, 9)]]
KNOWN_CHOICE = [0, 2, 2, 2, 0, 0, 2, 2, 1, 2, 2, 0]
KNOWN_PERMUTATION = [6, 8, 7, 2, 11, 0, 3, 9, 10, 1, 5, 4]


def lengths() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 90, size=size).tolist() for size in SIZES]


def mixture(batch_size: int = 8, seed: int = 5, **fields: object) -> Mixture:
    return Mixture(lengths(), DataSettings.model_validate({"tasks": ["t"]} | fields), batch_size, seed)


def steps(source: Mixture, count: int) -> list[list[Sample]]:
    return [source.next_step() for _ in range(count)]


def test_rates_follow_seqio():
    assert rates([30, 10], MixtureSettings()) == (0.75, 0.25)
    assert rates([1600, 100], MixtureSettings(temperature=2)) == pytest.approx((0.8, 0.2))
    assert rates([1000, 50], MixtureSettings(maximum=150)) == pytest.approx((0.75, 0.25))
    assert rates([1000, 50], MixtureSettings(maximum=150, scale=3)) == pytest.approx((0.5, 0.5))
    assert rates([10**9, 1], MixtureSettings(temperature=1e-3)) == (1.0, 0.0)
    assert rates([67349, 2490, 635], MixtureSettings(temperature=1e6)) == pytest.approx((1 / 3,) * 3, rel=1e-4)


def test_tasks_come_by_their_rates_and_rows_without_replacement():
    drawn = [sample for step in steps(mixture(mixture={"temperature": 2}), 500) for sample in step]
    shares = Counter(sample.task for sample in drawn)
    for task, rate in enumerate(rates(SIZES, MixtureSettings(temperature=2))):
        deviation = (rate * (1 - rate) / len(drawn)) ** 0.5
        assert abs(shares[task] / len(drawn) - rate) < 4 * deviation
    for task, size in enumerate(SIZES):
        counts = Counter(sample.row for sample in drawn if sample.task == task)
        assert set(counts) == set(range(size))
        assert max(counts.values()) - min(counts.values()) == 1  # no row a second time before every row once more


def test_the_order_is_the_seeds_alone():
    assert steps(mixture(), 20) == steps(mixture(), 20)
    assert steps(mixture(), 20) != steps(mixture(seed=6), 20)
    # Two epochs of one task come in two orders.
    single = Mixture([list(range(1, 65))], DataSettings(tasks=("t",)), batch_size=64, seed=0)
    assert [sample.row for sample in single.next_step()] == list(range(64))  # sorted by length
    unsorted = Mixture([[1] * 64], DataSettings(tasks=("t",)), batch_size=64, seed=0)
    first, second = unsorted.next_step(), unsorted.next_step()
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("mixed_tasks", [True, False])
def test_buckets_sort_a_window_without_changing_what_is_in_it(mixed_tasks: bool):
    known = lengths()
    narrow, wide = mixture(mixed_tasks=mixed_tasks), mixture(mixed_tasks=mixed_tasks, bucket_steps=10)

    def padding(step: list[Sample]) -> int:
        sizes = [known[sample.task][sample.row] for sample in step]
        assert sizes == sorted(sizes)
        return max(sizes) * len(sizes) - sum(sizes)

    bucketed, plain = steps(wide, 40), steps(narrow, 40)
    assert all(len(step) == 8 for step in bucketed)
    assert sum(map(padding, bucketed)) < 0.6 * sum(map(padding, plain))
    longest = [known[step[-1].task][step[-1].row] for step in bucketed[:10]]
    assert longest != sorted(longest)  # the steps of a window are shuffled
    for source in (bucketed, plain):
        tasks = [{sample.task for sample in step} for step in source]
        assert all(len(of_step) == 1 for of_step in tasks) is not mixed_tasks
        assert set().union(*tasks) == {0, 1, 2}
    counts = Counter(sample for step in bucketed[:10] for sample in step)
    for task, size in enumerate(SIZES):
        of_task = [counts[Sample(task, row)] for row in range(size)]
        assert max(of_task) - min(of_task) <= 1


@pytest.mark.parametrize("fields", [{}, {"bucket_steps": 4}, {"bucket_steps": 4, "mixed_tasks": False}])
def test_resume_continues_exactly(fields: dict[str, object]):
    whole = steps(mixture(**fields), 30)
    for stop in (0, 1, 4, 7, 8, 22):
        first = mixture(**fields)
        assert steps(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state()))
        assert len(json.dumps(state)) < 400
        second = mixture(**fields)
        second.next_step()  # whatever it did before
        second.load_state(state)
        assert second.state() == state
        assert steps(second, 30 - stop) == whole[stop:]


def test_another_order_is_not_continued():
    state = mixture().state()
    with pytest.raises(CheckpointError, match=r"cannot be continued: seed was 5, is 6; batch_size was 8, is 16"):
        mixture(batch_size=16, seed=6).load_state(state)
    with pytest.raises(CheckpointError, match="bucket_steps was 1, is 2"):
        mixture(bucket_steps=2).load_state(state)
    other = Mixture(lengths()[:2], DataSettings(tasks=("t",)), 8, 5)
    with pytest.raises(CheckpointError, match=r"rows was \[40, 10, 23\], is \[40, 10\]"):
        other.load_state(state)


def test_the_order_is_the_same_under_every_numpy():
    """A checkpoint's order goes on wherever it is loaded, so these samples may never change."""
    assert [list(map(tuple, step)) for step in steps(mixture(batch_size=4), 3)] == KNOWN
    stream = RandomStream(3, 1, 4)
    assert stream.choice(12, (0.5, 0.2, 0.3)).tolist() == KNOWN_CHOICE
    assert stream.permutation(12).tolist() == KNOWN_PERMUTATION


@pytest.mark.parametrize("size", [0, 1, 2, 3, 33, 70_000])
def test_draws_are_those_of_numpy_2(size: int):
    """Checkpoints that were taken while numpy drew go on too. A numpy that draws otherwise may drop this test."""
    numpys = np.random.Generator(np.random.Philox(np.random.SeedSequence([7, size])))
    stream, rates = RandomStream(7, size), (0.15, 0.6, 0.25)
    assert stream.choice(size, rates).tolist() == numpys.choice(3, size=size, p=rates).tolist()
    order = numpys.permutation(size).tolist()
    assert stream._permutation(size).tolist() == order
    again = RandomStream(7, size)
    again.choice(size, rates)
    assert again.permutation(size).tolist() == order  # a large order comes from numpy where it draws alike


def test_an_order_that_another_numpy_drew_is_not_continued():
    state = mixture().state()
    before_the_field = {**state, "order": {name: value for name, value in state["order"].items() if name != "stream"}}
    mixture().load_state(before_the_field)
    others = {**state, "order": {**state["order"], "stream": "0123456789abcdef"}}
    with pytest.raises(CheckpointError, match=r"cannot be continued: stream was 0123456789abcdef, is d9ce11989fef749a"):
        mixture().load_state(others)


def test_a_task_smaller_than_a_step_is_repeated():
    tiny = Mixture([[4, 5, 6]], DataSettings(tasks=("t",)), batch_size=8, seed=1)
    counts = [Counter(sample.row for step in run for sample in step) for run in (steps(tiny, 1), steps(tiny, 2))]
    assert sum(counts, Counter()) == {0: 8, 1: 8, 2: 8}
    assert all(
        earlier <= later for step in steps(tiny, 3) for earlier, later in pairwise(sample.row for sample in step)
    )
