"""Generation against transformers' own, label scoring against whole logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GenerationConfig

from hyperscale.data.collate import Batch, Layout, PromptBatch, collate, collate_prompts
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import Encoded, TaskTokenizer
from hyperscale.engine.collective import SingleProcess
from hyperscale.inference.answers import Answerer, Question
from hyperscale.inference.decoding import answer_log_likelihoods, greedy_decode
from hyperscale.model.adapted import AdaptedModel, label_positions, shift_right, token_losses
from tests import tiny

PROMPTS = (
    "Review: The plot is thin, but the actors are wonderful.\nSentiment:",
    "Write the plural of: city\nAnswer:",
    "Nobody remembered.",
    "What is the capital of the country that borders both France and Portugal?",
)
ANSWERS = ("positive", "cities", "The door of the old mill was painted blue.", "it")
SLOTS = torch.tensor([1, 0, 2, 1])
UNREACHED = torch.tensor([10**6])
"""No token: rows go on to the end."""


@pytest.fixture(scope="module", params=["llama", "t5"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


@pytest.fixture(scope="module")
def model(folder: Path) -> AdaptedModel:
    adapters = [{"kind": "lora", "rank": 2, "targets": ["q", "v"]}, {"kind": "bottleneck", "reduction": 8}]
    adapted = tiny.adapted_model(folder, {"adapters": adapters}, num_tasks=3)
    tiny.disturb(adapted.generator)
    return adapted


@pytest.fixture(scope="module")
def prompts(folder: Path, model: AdaptedModel) -> PromptBatch:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = [tuple(ids) for ids in tokenizer(list(PROMPTS))["input_ids"]]
    layout = Layout(tokenizer.pad_token_id, model.architecture.is_encoder_decoder)
    batch = collate_prompts(sources, SLOTS.tolist(), [12] * len(sources), range(len(sources)), layout)
    assert not batch.attention_mask.all()
    return batch


@pytest.fixture(scope="module")
def labelled(folder: Path, model: AdaptedModel) -> Batch:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = [tuple(ids) for ids in tokenizer(list(PROMPTS))["input_ids"]]
    answers = [tuple(ids) for ids in tokenizer(list(ANSWERS), add_special_tokens=False)["input_ids"]]
    layout = Layout(tokenizer.pad_token_id, model.architecture.is_encoder_decoder)
    return collate(sources, answers, SLOTS.tolist(), layout)


def decode(model: AdaptedModel, batch: PromptBatch, stop_ids: Tensor, most: int = 12) -> Tensor:
    with model.adapting(SLOTS):
        return greedy_decode(
            model, batch.input_ids, batch.attention_mask, limits(most, batch.input_ids), stop_ids, anyone=bool
        )


def limits(most: int, input_ids: Tensor) -> Tensor:
    return torch.full((len(input_ids),), most)


def reference(model: AdaptedModel, batch: PromptBatch, stop_ids: Tensor, most: int = 12) -> Tensor:
    """Let transformers generate with the adapters active; without the prompt or the start token."""
    config = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_ids.tolist(),
        pad_token_id=int(stop_ids[0]),
        decoder_start_token_id=model.backbone.config.to_dict().get("decoder_start_token_id"),
    )
    with model.adapting(SLOTS), torch.no_grad():
        tokens = model.backbone.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
        )
    return tokens[:, 1 if model.architecture.is_encoder_decoder else batch.input_ids.shape[1] :]


def test_greedy_decoding_is_transformers_own(model: AdaptedModel, prompts: PromptBatch):
    free = decode(model, prompts, UNREACHED)
    assert free.shape == (4, 12)
    assert len({tuple(row) for row in free.tolist()}) == 4
    assert torch.equal(free, reference(model, prompts, UNREACHED))

    # Stop tokens that rows reach at different times, or never.
    stop_ids = torch.stack([free[0, 2], free[1, 5]])
    stopped = decode(model, prompts, stop_ids)
    assert torch.equal(stopped, reference(model, prompts, stop_ids))
    ends = [first_stop(row, stop_ids) for row in stopped]
    assert len(set(ends)) > 1
    for row, end in zip(stopped, ends, strict=True):
        assert (row[end + 1 :] == stop_ids[0]).all()

    # Rows that have stopped are dropped, but for one where all have and other ranks have not.
    sizes: list[int] = []
    head = model.backbone.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _head, args: sizes.append(len(args[0])))
    most = max(ends) + 3
    with model.adapting(SLOTS):
        waited = greedy_decode(
            model,
            prompts.input_ids,
            prompts.attention_mask,
            limits(most, prompts.input_ids),
            free[:, 3].unique(),
            lambda _: len(sizes) < most,
        )
    handle.remove()
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1], len(sizes)) == (4, 1, most)
    assert torch.equal(waited, reference_padded(model, prompts, free[:, 3].unique(), most))

    # When the last row stops, nobody goes on.
    everyone = free[:, 3].unique()
    short = decode(model, prompts, everyone)
    assert torch.equal(short, reference(model, prompts, everyone))
    assert short.shape[1] == max(first_stop(row, everyone) for row in free) + 1 <= 4


def reference_padded(model: AdaptedModel, batch: PromptBatch, stop_ids: Tensor, width: int) -> Tensor:
    answers = reference(model, batch, stop_ids, width)
    return torch.nn.functional.pad(answers, (0, width - answers.shape[1]), value=int(stop_ids[0]))


def first_stop(row: Tensor, stop_ids: Tensor) -> int:
    places = torch.isin(row, stop_ids).nonzero()
    return int(places[0]) if len(places) else len(row)


def test_a_batch_decodes_as_its_rows_do_alone(model: AdaptedModel, prompts: PromptBatch):
    together = decode(model, prompts, UNREACHED)
    for row in range(len(SLOTS)):
        real = prompts.attention_mask[row].bool()
        ids = prompts.input_ids[row, real].unsqueeze(0)
        with model.adapting(SLOTS[row : row + 1]):
            alone = greedy_decode(model, ids, torch.ones_like(ids), limits(12, ids), UNREACHED, anyone=bool)
        assert torch.equal(alone[0], together[row])


def test_ranks_decode_equally_often(model: AdaptedModel, prompts: PromptBatch):
    """A rank whose rows are done goes on while another rank's are not, and says so at every step."""
    free = decode(model, prompts, UNREACHED)
    stop_ids = free[:, 1].unique()
    ours = decode(model, prompts, stop_ids)
    assert ours.shape[1] == 2
    flags: list[bool] = []

    def another_rank_needs_five(flag: bool) -> bool:
        flags.append(flag)
        return flag or len(flags) < 5

    forwards: list[int] = []
    counting = model.backbone.register_forward_hook(lambda *_: forwards.append(1))
    with model.adapting(SLOTS):
        tokens = greedy_decode(
            model,
            prompts.input_ids,
            prompts.attention_mask,
            limits(12, prompts.input_ids),
            stop_ids,
            another_rank_needs_five,
        )
    counting.remove()
    assert flags == [True, False, False, False, False]
    assert len(forwards) == tokens.shape[1] == 5
    assert torch.equal(tokens[:, :2], ours)
    assert (tokens[:, 2:] == stop_ids[0]).all()


def test_each_row_ends_at_its_own_limit(model: AdaptedModel, prompts: PromptBatch):
    free = decode(model, prompts, UNREACHED)
    of_rows = torch.tensor([1, 6, 3, 6])
    forwards: list[int] = []
    counting = model.backbone.register_forward_hook(lambda *_: forwards.append(1))

    def run(anyone: Callable[[bool], bool]) -> Tensor:
        forwards.clear()
        with model.adapting(SLOTS):
            return greedy_decode(model, prompts.input_ids, prompts.attention_mask, of_rows, UNREACHED, anyone)

    tokens = run(bool)
    assert len(forwards) == tokens.shape[1] == 6
    for row, limit in enumerate(of_rows.tolist()):
        assert torch.equal(tokens[row, :limit], free[row, :limit])
        assert (tokens[row, limit:] == UNREACHED[0]).all()
    # Another rank's limit is larger: this one runs its forwards and makes no more tokens.
    assert torch.equal(run(lambda flag: flag or len(forwards) < 9), tokens)
    assert len(forwards) == 9
    counting.remove()


def test_a_short_task_beside_a_long_one_runs_its_own_number_of_forwards(model: AdaptedModel, folder: Path):
    """8 rows of at most 2 tokens and 2 of at most 20, in batches of 2: 4 x 2 + 20 forwards, not 5 x 20."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = model.architecture.is_encoder_decoder
    tasks = [task(name, most).written_for(kind) for name, most in (("short", 2), ("long", 20))]
    tokenizers = [TaskTokenizer(tokenizer, one, kind) for one in tasks]
    prompts = tokenizers[0].encode_prompts(list(PROMPTS))
    questions = [Question(int(row in (3, 6)), Encoded(prompts[row % 4], (), ()), ()) for row in range(10)]
    layout = Layout(tokenizer.pad_token_id, kind)
    answerer = Answerer(model, SingleProcess(), torch.device("cpu"), tokenizers, layout, 2, lambda *_: None)
    forwards: list[int] = []
    counting = model.backbone.register_forward_hook(lambda *_: forwards.append(1))
    answers = answerer(questions)
    counting.remove()
    assert len(forwards) == 4 * 2 + 20
    for question, answer in zip(questions, answers, strict=True):
        (alone,) = answerer([question])
        assert answer == alone


def task(name: str, most: int) -> Task:
    return Task.model_validate(
        {"name": name, "source": "rows.jsonl", "input": "{a}", "target": "{b}", "max_new_tokens": most}
    )


def whole_logits(model: AdaptedModel, batch: Batch) -> Tensor:
    """Return logits at every position [B, L, V], where position l predicts `labels[:, l]`."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if model.architecture.is_encoder_decoder:
        start = torch.full((len(batch.labels), 1), model.backbone.config.decoder_start_token_id)
        padded = batch.labels.masked_fill(batch.labels == -100, model.backbone.config.pad_token_id)
        return model.backbone(**inputs, decoder_input_ids=torch.cat([start, padded[:, :-1]], dim=1)).logits
    return model.backbone(**inputs).logits.roll(1, dims=1)


def test_label_logits_are_rows_of_the_whole(model: AdaptedModel, labelled: Batch):
    positions, targets, samples = label_positions(labelled.labels, model.architecture.is_encoder_decoder)
    assert len(positions) == sum(labelled.labels.ne(-100).flatten())
    assert torch.equal(torch.bincount(samples), labelled.labels.ne(-100).sum(1))
    with torch.no_grad(), model.adapting(SLOTS):
        rows = model.label_logits(labelled.input_ids, labelled.attention_mask, labelled.labels, positions)
        whole = whole_logits(model, labelled)
        again = whole_logits(model, labelled)
    expected = whole[labelled.labels != -100]
    assert rows.shape == expected.shape
    assert (rows - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(whole, again)  # nothing of the selection is left behind
    assert torch.equal(targets, labelled.labels[labelled.labels != -100])
    for smoothing in (0.0, 0.1):
        log_p = expected.double().log_softmax(-1)
        plain = -(1 - smoothing) * log_p[range(len(targets)), targets] - smoothing * log_p.mean(-1)
        losses = token_losses(rows, targets, smoothing)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), plain, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_answers(model: AdaptedModel, labelled: Batch):
    labels = labelled.labels
    ends = [max(place for place, label in enumerate(row) if label != -100) for row in labels.tolist()]
    endings = torch.tensor([[int(labels[row, end]), 7, 40 + row] for row, end in enumerate(ends)])
    with torch.no_grad(), model.adapting(SLOTS):
        likelihoods = answer_log_likelihoods(model, labelled.input_ids, labelled.attention_mask, labels, endings)
        log_p = whole_logits(model, labelled).double().log_softmax(-1)
    for row, end in enumerate(ends):
        for column, ending in enumerate(endings[row].tolist()):
            answer = [ending if place == end else label for place, label in enumerate(labels[row].tolist())]
            expected = sum(log_p[row, place, label].item() for place, label in enumerate(answer) if label != -100)
            assert likelihoods[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert likelihoods.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operator returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.numel = max(self.numel, result.numel())
        return result


def test_decoding_copies_no_weights_for_every_row(model: AdaptedModel, prompts: PromptBatch):
    """The head, above all: PyTorch multiplies it row by row with a slice of the prompt's hidden states."""
    with Largest() as largest:
        decode(model, prompts, UNREACHED)
    vocabulary, width = model.backbone.get_output_embeddings().weight.shape
    assert len(SLOTS) * vocabulary <= largest.numel < len(SLOTS) * vocabulary * width


def test_positions_of_labels():
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    positions, targets, samples = label_positions(labels, is_encoder_decoder=False)
    # nothing predicts the token at 0; the token at t is predicted at t - 1
    assert (positions.tolist(), targets.tolist(), samples.tolist()) == ([1, 2, 6], [7, 8, 9], [0, 0, 1])
    positions, targets, samples = label_positions(labels, is_encoder_decoder=True)
    assert (positions.tolist(), targets.tolist(), samples.tolist()) == ([0, 2, 3, 7], [5, 7, 8, 9], [0, 0, 0, 1])


def test_decoder_inputs_are_transformers_own(tiny_t5_folder: Path):
    backbone = tiny.adapted_model(tiny_t5_folder).backbone
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    assert torch.equal(shift_right(labels, backbone.config), backbone._shift_right(labels))
