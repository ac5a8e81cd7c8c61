"""Greedy decoding and label scoring, over a backbone that may be sharded.

Under ZeRO-3 every rank must run the same number of forwards: through `anyone` the ranks agree whether one more is
needed.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperscale.model.adapted import AdaptedModel, label_positions, token_losses
from hyperscale.model.attention import cache_argument

Agree = Callable[[bool], bool]
"""Takes each rank's flag and returns True on all ranks if any flag is True."""

_FINISHED_SHARE = 0.25
"""Finished rows are dropped once they are more than this share of the batch. Dropping them copies the cache of the
others, as every new token does."""


@torch.no_grad()
def greedy_decode(
    model: AdaptedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: Tensor,
    stop_ids: Tensor,
    anyone: Agree,
) -> Tensor:
    """Continue each prompt with the most likely token until a stop token or its limit; inside `model.adapting(...)`.

    The batch is decoded until its last row is finished, here and on all other ranks.

    Args:
        input_ids: [B, T], left-padded for causal models, right-padded for encoder-decoders.
        attention_mask: [B, T].
        max_new_tokens: int64 [B], each at least 1: the most tokens of each row.
        stop_ids: [E] token ids that end an answer.
        anyone: see `Agree`; every rank must call this function equally often.

    Returns:
        New tokens [B, M] with M <= the largest limit; after its last token a row holds the first of `stop_ids`.
    """
    kind = _Seq2SeqSteps if model.architecture.is_encoder_decoder else _CausalSteps
    steps: _Steps = kind(model, input_ids, attention_mask)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    limits = max_new_tokens
    finished = torch.zeros_like(rows, dtype=torch.bool)
    longest = int(limits.max())
    answers = stop_ids[0].repeat(len(rows), longest)
    num_tokens = 0
    while True:
        token = steps.next_logits().argmax(-1)
        if num_tokens < longest:  # beyond it, this rank only runs the forwards that another rank needs
            answers[rows, num_tokens] = torch.where(finished, stop_ids[0], token)
        num_tokens += 1
        finished |= torch.isin(token, stop_ids) | (limits <= num_tokens)
        if not anyone(not bool(finished.all())):
            return answers[:, :num_tokens]
        if finished.float().mean() > _FINISHED_SHARE and len(rows) > 1:
            going = _unfinished(finished)
            rows, limits, finished, token = rows[going], limits[going], finished[going], token[going]
            steps.keep(going)
            model.injection.keep(going)
        steps.append(token)


def _unfinished(finished: Tensor) -> Tensor:
    """Return the indices of the unfinished rows; if there are none, one index, since other ranks may need forwards."""
    return (~finished).nonzero().flatten() if not finished.all() else torch.zeros_like(finished, dtype=torch.int64)[:1]


class _Steps(Protocol):
    """Continues a batch token by token."""

    def next_logits(self) -> Tensor:
        """Return the logits [B, V] of what follows."""
        ...

    def append(self, token: Tensor) -> None:
        """Add each row's next token, [B]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        ...


class _CausalSteps:
    def __init__(self, model: AdaptedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._model, self._mask, self._feed = model, attention_mask, input_ids
        self._places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        self._cache: Any = None
        self._cache_name = cache_argument(model.backbone)

    def next_logits(self) -> Tensor:
        output = self._model.backbone(
            input_ids=self._feed,
            attention_mask=self._mask,
            position_ids=self._places,
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output[self._cache_name]
        logits: Tensor = output.logits[:, -1]
        return logits

    def append(self, token: Tensor) -> None:
        self._feed = token.unsqueeze(1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
        self._places = self._places[:, -1:] + 1

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask, self._places = self._mask[rows], self._places[rows]


class _Seq2SeqSteps:
    def __init__(self, model: AdaptedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._model, self._ids, self._mask = model, input_ids, attention_mask
        start: int = model.backbone.config.decoder_start_token_id  # type: ignore[union-attr, assignment]
        self._feed = input_ids.new_full((input_ids.shape[0], 1), start)
        self._cache: Any = None
        self._cache_name = cache_argument(model.backbone)
        self._encoded: Any = None

    def next_logits(self) -> Tensor:
        inputs = {"input_ids": self._ids} if self._encoded is None else {"encoder_outputs": (self._encoded,)}
        output = self._model.backbone(
            **inputs,
            attention_mask=self._mask,
            decoder_input_ids=self._feed,
            **{self._cache_name: self._cache},
            use_cache=True,
        )
        self._encoded, self._cache = output.encoder_last_hidden_state, output[self._cache_name]
        logits: Tensor = output.logits[:, -1]
        return logits

    def append(self, token: Tensor) -> None:
        self._feed = token.unsqueeze(1)

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._encoded, self._mask = self._encoded[rows], self._mask[rows]


@torch.no_grad()
def answer_log_likelihoods(
    model: AdaptedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, endings: Tensor
) -> Tensor:
    """Return the log-likelihoods [B, C], at least fp32, of C answers to each prompt; inside `model.adapting(...)`.

    An answer is a row's label tokens with another last token. The tokens before it are computed once for all C. The
    log-likelihoods are sums over tokens, so whole answers compete, as in the usual label-scoring protocol.

    Args:
        input_ids, attention_mask, labels: as in `AdaptedModel.label_logits`; every row has a label.
        endings: int64 [B, C], the last tokens.
    """
    device = input_ids.device
    positions, targets, samples = label_positions(labels.cpu(), model.architecture.is_encoder_decoder)
    last = torch.bincount(samples).cumsum(0).to(device) - 1
    targets = targets.to(device)
    logits = model.label_logits(input_ids, attention_mask, labels, positions.to(device))
    losses = token_losses(logits, targets)
    total = losses.new_zeros(len(input_ids)).index_add(0, samples.to(device), -losses)
    # at one position, log-likelihoods and logits have the same differences
    ended = logits[last].to(losses.dtype)
    return total.unsqueeze(1) + ended.gather(1, endings) - ended.gather(1, targets[last].unsqueeze(1))
