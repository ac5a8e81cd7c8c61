"""Batches: what is in them, the same samples for any number of ranks, equal turns for all ranks in evaluation."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from hyperscale.config.data import DataSettings
from hyperscale.data.collate import IGNORED, Batch, Layout, collate_examples, collate_prompts
from hyperscale.data.encoded import EncodedRows
from hyperscale.data.loader import Share, TrainLoader, accumulation_steps, prompt_batches, scoring_batches
from hyperscale.data.tokenization import Encoded
from hyperscale.errors import ConfigError

PAD = 0
SHORT = Encoded((5, 6), (7, 1), ((7,), (8, 9)))
LONG = Encoded((5, 6, 6, 6), (8, 9, 1), ((7,), (8, 9)))


def examples(count: int, task: int) -> list[Encoded]:
    """Every example's first token names it, so that batches can be read back."""
    random = np.random.default_rng(task)
    return [
        Encoded((1000 * task + row + 10, *([5] * int(random.integers(1, 30)))), (7, 1), ((7,), (8, 9)))
        for row in range(count)
    ]


def loader(rank: int, world_size: int, micro_batch_size: int, **fields: object) -> TrainLoader:
    settings = DataSettings.model_validate({"tasks": ["t"], "bucket_steps": 3} | fields)
    datasets = [EncodedRows.of(examples(50, 0)), EncodedRows.of(examples(20, 1))]
    return TrainLoader(datasets, settings, 16, micro_batch_size, 3, share_of(rank, world_size))


def share_of(rank: int, world_size: int) -> Share:
    return Share(rank, world_size, Layout(PAD, is_encoder_decoder=False))


def names(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def test_decoder_only_batch():
    batch = collate_examples([SHORT, LONG], [1, 0], Layout(PAD, is_encoder_decoder=False))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 0, 0, 0], [5, 6, 6, 6, 8, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 1, IGNORED, IGNORED, IGNORED], [IGNORED] * 4 + [8, 9, 1]]
    assert batch.task_index.tolist() == [1, 0]
    assert (batch.num_tokens, batch.labels.ne(IGNORED).sum()) == (11, 5)
    tensors = (batch.input_ids, batch.attention_mask, batch.labels, batch.task_index)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_encoder_decoder_batch():
    batch = collate_examples([SHORT, LONG], [1, 0], Layout(PAD, is_encoder_decoder=True))
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [5, 6, 6, 6]]
    assert batch.labels.tolist() == [[7, 1, IGNORED], [8, 9, 1]]
    assert (batch.num_tokens, batch.labels.ne(IGNORED).sum()) == (11, 5)


def test_the_loss_counts_the_spans_of_a_row():
    several = Encoded((5, 6, 7, 1, 5), (8, 9, 1), spans=((2, 4), (5, 7)))
    batch = collate_examples([several, SHORT], [0, 1], Layout(PAD, is_encoder_decoder=False))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 5, 8, 9, 1], [5, 6, 7, 1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, 7, 1, IGNORED, 8, 9, IGNORED],
        [IGNORED, IGNORED, 7, 1, *[IGNORED] * 4],
    ]
    assert (batch.num_tokens, batch.labels.ne(IGNORED).sum()) == (12, 6)
    rows = [several, Encoded(SHORT.source_ids, SHORT.target_ids)]
    assert list(EncodedRows.of(rows)) == rows
    with pytest.raises(ValueError, match="positions of a decoder-only model"):
        collate_examples([several], [0], Layout(PAD, is_encoder_decoder=True))


def test_prompts_end_where_generation_begins():
    sources = [SHORT.source_ids, LONG.source_ids]
    left = collate_prompts(sources, [1, 0], [8, 9], [4, -1], Layout(PAD, is_encoder_decoder=False))
    assert left.input_ids.tolist() == [[0, 0, 5, 6], [5, 6, 6, 6]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert (left.rows, left.task_index.tolist()) == ((4, -1), [1, 0])
    right = collate_prompts(sources, [1, 0], [8, 9], [4, -1], Layout(PAD, is_encoder_decoder=True))
    assert right.input_ids.tolist() == [[5, 6, 0, 0], [5, 6, 6, 6]]


@pytest.mark.parametrize("mixed_tasks", [True, False])
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(mixed_tasks: bool):
    reference = [Counter(names(batch)) for batch in _all_micro_batches(1, 16, 1, mixed_tasks)]
    for world_size, micro_batch_size in ((1, 4), (2, 4), (4, 4), (8, 1), (2, 8)):
        turns = accumulation_steps(16, micro_batch_size, world_size)
        batches = _all_micro_batches(world_size, micro_batch_size, turns, mixed_tasks)
        per_step = turns * world_size
        for step, expected in enumerate(reference):
            of_step = batches[step * per_step : (step + 1) * per_step]
            assert sum((Counter(names(batch)) for batch in of_step), Counter()) == expected
            widths = [batch.input_ids.shape[1] for batch in of_step]
            assert widths == sorted(widths)  # at one turn all ranks have neighbouring lengths
            if not mixed_tasks:
                assert len({int(task) for batch in of_step for task in batch.task_index}) == 1


def _all_micro_batches(world_size: int, micro_batch_size: int, turns: int, mixed_tasks: bool) -> list[Batch]:
    """Return the micro-batches of six steps in the order step, turn, rank."""
    loaders = [loader(rank, world_size, micro_batch_size, mixed_tasks=mixed_tasks) for rank in range(world_size)]
    micro_batches = []
    for _ in range(6):
        by_rank = [of_rank.next_step() for of_rank in loaders]
        assert all(len(batches) == turns for batches in by_rank)
        micro_batches += [batches[turn] for turn in range(turns) for batches in by_rank]
    return micro_batches


def test_a_run_continues_on_another_number_of_ranks():
    whole, before = loader(0, 1, 16), loader(1, 2, 4)
    for _ in range(4):
        whole.next_step()
        before.next_step()
    state = json.loads(json.dumps(before.state()))
    assert state == whole.state()
    resumed = [loader(rank, 4, 2) for rank in range(4)]
    for of_rank in resumed:
        of_rank.load_state(state)
    for _ in range(4):
        together = Counter(name for of_rank in resumed for batch in of_rank.next_step() for name in names(batch))
        assert together == Counter(names(whole.next_step()[0]))


def test_the_error_for_an_uneven_batch_names_the_nearest_even_one():
    assert accumulation_steps(16, 4, 2) == 2
    with pytest.raises(ConfigError, match=r"batch_size 20 .* 2 × 4; use 16 or 24"):
        accumulation_steps(20, 4, 2)
    with pytest.raises(ConfigError, match=r"use 8$"):
        accumulation_steps(5, 4, 2)
    with pytest.raises(ConfigError, match="use 9 or 18"):
        loader(0, 3, 3)


@pytest.mark.parametrize(("count", "world_size"), [(37, 4), (37, 1), (3, 4), (1, 2), (0, 2), (8, 2), (9, 2)])
def test_evaluation_covers_every_row_once_and_all_ranks_run_equally_often(count: int, world_size: int):
    known = examples(count, 0)
    tasks = [row % 3 for row in range(count)]
    prompts = [
        prompt_batches(known, tasks, [5] * len(known), 4, share_of(rank, world_size)) for rank in range(world_size)
    ]
    scored = [scoring_batches(known, tasks, 4, share_of(rank, world_size)) for rank in range(world_size)]
    for shares, num_rows in ((prompts, count), (scored, 2 * count)):
        assert {len(share) for share in shares} == {-(-num_rows // (4 * world_size))}
        assert all(1 <= len(batch.rows) <= 4 for share in shares for batch in share)
    counts = Counter(row for share in prompts for batch in share for row in batch.rows)
    counts.pop(-1, None)
    assert counts == dict.fromkeys(range(count), 1)
    pairs: Counter[tuple[int, int]] = Counter()
    for share in scored:
        for batch in share:
            pairs.update(
                (row, number) for row, of_row in zip(batch.rows, batch.candidates, strict=True) for number in of_row
            )
    assert {pair: number for pair, number in pairs.items() if pair[0] >= 0} == {
        (row, candidate): 1 for row in range(count) for candidate in range(2)
    }


def test_evaluation_rows_carry_their_example():
    known = examples(9, 0)
    tasks = list(range(9))
    for rank in range(2):
        for prompt in prompt_batches(known, tasks, [5] * len(known), 2, share_of(rank, 2)):
            for place, row in enumerate(prompt.rows):
                real = prompt.input_ids[place][prompt.attention_mask[place].bool()].tolist()
                assert row == -1 or (tuple(real) == known[row].source_ids and int(prompt.task_index[place]) == row)
        for scoring in scoring_batches(known, tasks, 2, share_of(rank, 2)):
            for place, (row, (candidate,)) in enumerate(zip(scoring.rows, scoring.candidates, strict=True)):
                labels = scoring.batch.labels[place]
                answer = tuple(labels[labels != IGNORED].tolist())
                assert row == -1 or answer == known[row].candidate_ids[candidate]
                assert scoring.endings[place].tolist() == [answer[-1]]
                assert row == -1 or int(scoring.batch.task_index[place]) == row


def test_candidates_that_differ_in_their_last_token_share_a_row():
    candidates = ((7,), (8, 9), (6,), (8, 5), (5, 9))
    (scoring,) = scoring_batches([Encoded((5, 6), (7, 1), candidates)], [2], 8, share_of(0, 1))
    assert scoring.rows == (0, 0, 0)
    assert scoring.candidates == ((0, 2), (1, 3), (4,))
    assert scoring.endings.tolist() == [[7, 6], [9, 5], [9, 9]]
    assert scoring.batch.input_ids.tolist() == [[5, 6, 7, PAD], [5, 6, 8, 9], [5, 6, 5, 9]]


def test_prompts_are_sorted_by_their_limits_then_by_length():
    known = examples(12, 0)
    limits = [(2, 256, 8)[row % 3] for row in range(12)]
    batches = [batch for rank in range(2) for batch in prompt_batches(known, [0] * 12, limits, 2, share_of(rank, 2))]
    for batch in batches:
        assert batch.max_new_tokens.tolist() == [limits[row] for row in batch.rows]
        assert len(set(batch.max_new_tokens.tolist())) == 1
    in_turn = [batches[number] for number in (0, 3, 1, 4, 2, 5)]  # both ranks' first batches, then their second ones
    places = [(limits[row], len(known[row].source_ids)) for batch in in_turn for row in batch.rows]
    assert places == sorted(places)
