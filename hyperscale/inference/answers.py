"""A model's answers to encoded prompts, computed by all ranks together.

Label scoring answers classifications, greedy decoding everything else.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperscale.data.collate import Layout
from hyperscale.data.loader import Share, prompt_batches, scoring_batches
from hyperscale.data.tokenization import Encoded, TaskTokenizer
from hyperscale.engine.collective import Collective
from hyperscale.inference.decoding import answer_log_likelihoods, greedy_decode
from hyperscale.model.adapted import AdaptedModel


@dataclass(frozen=True)
class Question:
    """One prompt of one task."""

    task: int
    encoded: Encoded
    candidates: tuple[str, ...]
    """The possible answers of a classification, in the order of `encoded.candidate_ids`; empty for free text."""


@dataclass(frozen=True)
class Answerer:
    """Answers questions of several tasks in mixed batches; every rank must call it with the same questions."""

    model: AdaptedModel
    collective: Collective
    device: torch.device
    tokenizers: Sequence[TaskTokenizer]
    """One per task index."""
    layout: Layout
    batch_size: int
    """Rows that one rank runs at once."""
    say: Callable[[str, int, int], None]
    """Reports progress to the user: what is running, the number of the batch, and how many batches there are."""
    check_stop: Callable[[], None] | None = None
    """Called on every rank before every batch. It may end the answering by raising, on all ranks alike."""

    def __call__(self, questions: Sequence[Question], adapted: bool = True) -> list[str]:
        """Return an answer per question, the same list on every rank; `adapted=False` asks the backbone alone."""
        scored = [number for number, question in enumerate(questions) if question.candidates]
        decoded = [number for number, question in enumerate(questions) if not question.candidates]
        answers: dict[int, str] = {}
        if scored:
            chosen = self._score([questions[number] for number in scored], adapted)
            answers.update(zip(scored, chosen, strict=True))
        if decoded:
            texts = self._decode([questions[number] for number in decoded], adapted)
            answers.update(zip(decoded, texts, strict=True))
        return [answers[number] for number in range(len(questions))]

    def _score(self, questions: Sequence[Question], adapted: bool) -> list[str]:
        encoded, tasks = [question.encoded for question in questions], [question.task for question in questions]
        batches = scoring_batches(encoded, tasks, self.batch_size, self._share())
        mine: dict[int, list[tuple[float, int]]] = {}
        for number, scoring in enumerate(batches, start=1):
            self._begin_batch("scoring labels", number, len(batches))
            batch = scoring.batch
            with self._adapted(batch.task_index, adapted):
                likelihoods = answer_log_likelihoods(
                    self.model,
                    batch.input_ids.to(self.device),
                    batch.attention_mask.to(self.device),
                    batch.labels.to(self.device),
                    scoring.endings.to(self.device),
                )
            for row, candidates, values in zip(scoring.rows, scoring.candidates, likelihoods.tolist(), strict=True):
                if row >= 0:
                    mine.setdefault(row, []).extend(zip(values, candidates, strict=False))
        everyone = self.collective.gather(mine)
        likely = [max(pair for ranks in everyone for pair in ranks.get(row, [])) for row in range(len(questions))]
        return [question.candidates[candidate] for question, (_, candidate) in zip(questions, likely, strict=True)]

    def _decode(self, questions: Sequence[Question], adapted: bool) -> list[str]:
        encoded, tasks = [question.encoded for question in questions], [question.task for question in questions]
        limits = [self.tokenizers[task].task.max_new_tokens for task in tasks]
        batches = prompt_batches(encoded, tasks, limits, self.batch_size, self._share())
        mine: dict[int, str] = {}
        for number, batch in enumerate(batches, start=1):
            self._begin_batch("generating answers", number, len(batches))
            with self._adapted(batch.task_index, adapted):
                tokens = greedy_decode(
                    self.model,
                    batch.input_ids.to(self.device),
                    batch.attention_mask.to(self.device),
                    batch.max_new_tokens.to(self.device),
                    self._stop_ids(),
                    self.collective.anyone,
                )
            for row, new in zip(batch.rows, tokens.tolist(), strict=True):
                if row >= 0:
                    mine[row] = self.tokenizers[tasks[row]].decode(new)
        merged = {row: text for ranks in self.collective.gather(mine) for row, text in ranks.items()}
        return [merged[row] for row in range(len(questions))]

    def _begin_batch(self, text: str, number: int, count: int) -> None:
        if self.check_stop is not None:
            self.check_stop()
        self.say(text, number, count)

    @torch.no_grad()
    def _adapted(self, task_index: Tensor, adapted: bool) -> AbstractContextManager[None]:
        return self.model.adapting(task_index.to(self.device)) if adapted else nullcontext()

    def _share(self) -> Share:
        return Share(self.collective.rank, self.collective.world_size, self.layout)

    def _stop_ids(self) -> Tensor:
        stops = {token: None for tokenizer in self.tokenizers for token in tokenizer.stop_ids}
        return torch.tensor(list(stops), device=self.device)
