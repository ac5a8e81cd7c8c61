"""Rendered conversations as token ids, with the positions that the loss counts.

The prompt is encoded by itself, as generation sees it. The ids of the whole text must begin with it, so that training
sees the ids of `apply_chat_template`; where a token would span the border between prompt and answer, the answer is
encoded by itself.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.chat_template import ChatTemplate, RenderedConversation, Span
from hyperscale.data.conversations import Conversation
from hyperscale.data.shortening import shorten
from hyperscale.errors import BackboneError, DataError

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedTurns:
    """Token ids of one conversation."""

    source_ids: TokenIds
    """Everything before the last assistant turn, and the generation prompt."""
    target_ids: TokenIds
    """The last turn with the token that closes it."""
    spans: tuple[Span, ...]
    """Ranges of `source_ids + target_ids` whose tokens the loss counts."""
    shortened: bool = False
    """Whether the oldest exchanges, or tokens, of the prompt were left out."""


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations within token limits."""

    template: ChatTemplate
    eos: int
    """Ends a last turn that the template does not close."""

    def encode(self, conversations: Sequence[Conversation], settings: DataSettings) -> list[EncodedTurns | None]:
        """Encode conversations that end with the assistant; None for one that must be left out.

        Under `truncate_source` a prompt that is too long loses its oldest exchanges, whole, but never the system
        message and the last exchange. Where that is not enough, it loses tokens from its middle.

        Raises:
            DataError: the template refuses a conversation, or one is too long under `too_long: error`, or the template
                marks nothing in it as the assistant's.
            BackboneError: the tokenizer cannot locate its tokens in the text.
        """
        encoded = self._encode(conversations)
        return [
            self._fit(conversation, one, settings) for conversation, one in zip(conversations, encoded, strict=True)
        ]

    def encode_prompt(self, conversation: Conversation, most: int, may_shorten: bool) -> TokenIds | None:
        """Encode a conversation before its last assistant turn; None if it is longer than `most` tokens.

        `may_shorten`: leave out what `encode` leaves out under `truncate_source`.
        """
        conversation = conversation.prompt
        (tokens,) = _encode(self.template.tokenizer, [self.template.prompt(conversation)])
        while len(tokens.ids) > most and may_shorten and (shorter := without_oldest(conversation)) is not None:
            conversation = shorter
            (tokens,) = _encode(self.template.tokenizer, [self.template.prompt(conversation)])
        return tuple(tokens.ids) if len(tokens.ids) <= most else shorten(tokens.ids, most) if may_shorten else None

    def _encode(self, conversations: Sequence[Conversation]) -> list[EncodedTurns]:
        tokenizer = self.template.tokenizer
        if not tokenizer.is_fast:
            raise BackboneError(
                f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens stand in a text, so the "
                "turns of conversations cannot be located; save the backbone with a fast tokenizer (tokenizer.json)"
            )
        rendered = [self.template.lay_out(conversation) for conversation in conversations]
        prompts = _encode(tokenizer, [one.prompt for one in rendered])
        wholes = _encode(tokenizer, [one.prompt + one.answer for one in rendered])
        encoded = [
            _join(tokenizer, one, prompt, whole, self.eos)
            for one, prompt, whole in zip(rendered, prompts, wholes, strict=True)
        ]
        for conversation, one in zip(conversations, encoded, strict=True):
            if not one.spans:
                raise DataError(
                    f"{conversation.where}: task '{self.template.task}': the chat template marks nothing in this "
                    "conversation as the assistant's ({% generation %}), so there is nothing to train on"
                )
        return encoded

    def _fit(self, conversation: Conversation, one: EncodedTurns, settings: DataSettings) -> EncodedTurns | None:
        most, most_target = settings.max_source_tokens, settings.max_target_tokens
        if len(one.source_ids) <= most and len(one.target_ids) <= most_target:
            return one
        if settings.too_long == "error":
            raise DataError(
                f"{conversation.where}: task '{self.template.task}': the conversation has {len(one.source_ids)} tokens "
                f"before the last turn and {len(one.target_ids)} in it, more than data.max_source_tokens {most} or "
                f"data.max_target_tokens {most_target}; raise the limits or change data.too_long"
            )
        if settings.too_long == "drop" or len(one.target_ids) > most_target:
            return None
        while len(one.source_ids) > most and (shorter := without_oldest(conversation)) is not None:
            conversation = shorter
            (one,) = self._encode([conversation])
        return _shortened(one, most)


def without_oldest(conversation: Conversation) -> Conversation | None:
    """Return a conversation without its oldest exchange: from the first user turn to before the second one.

    Returns:
        None if there is only one.
    """
    messages = conversation.messages
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    first = next(place for place, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    return replace(conversation, messages=messages[:first] + messages[users[1] :])


def _shortened(one: EncodedTurns, most: int) -> EncodedTurns:
    """Return a conversation whose prompt has lost tokens from its middle if it has more than `most`."""
    length = len(one.source_ids)
    counted = [False] * (length + len(one.target_ids))
    for first, end in one.spans:
        counted[first:end] = [True] * (end - first)
    kept = [*shorten(counted[:length], most), *counted[length:]]
    spans = _merged([(place, place + 1) for place, counts in enumerate(kept) if counts])
    return EncodedTurns(shorten(one.source_ids, most), one.target_ids, spans, shortened=True)


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: list[int]
    starts: list[int]
    """Where each token begins in the text."""


def _join(
    tokenizer: PreTrainedTokenizerBase, rendered: RenderedConversation, prompt: _Tokens, whole: _Tokens, eos: int
) -> EncodedTurns:
    length, border = len(prompt.ids), len(rendered.prompt)
    if whole.ids[:length] == prompt.ids and all(start >= border for start in whole.starts[length : length + 1]):
        target, starts = whole.ids[length:], whole.starts[length:]
    else:
        (answer,) = _encode(tokenizer, [rendered.answer])
        target, starts = answer.ids, [border + start for start in answer.starts]
    # A token at the border may report the space before it, or none of it: on either side it is the prompt's.
    places = [*(min(start, border - 1) for start in prompt.starts), *(max(start, border) for start in starts)]
    spans = [span for first, end in rendered.spans if (span := _positions(places, first, end)) is not None]
    if not rendered.is_closed:
        target = [*target, eos]
        spans = [*spans, (length + len(target) - 1, length + len(target))]
    return EncodedTurns(tuple(prompt.ids), tuple(target), _merged(spans))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[_Tokens]:
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        _Tokens(list(ids), [start for start, _ in offsets])
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _positions(starts: Sequence[int], first: int, end: int) -> Span | None:
    """Return the range of tokens that begin within [first, end) of the text, or None if there are none."""
    span = bisect_left(starts, first), bisect_left(starts, end)
    return span if span[0] < span[1] else None


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for first, end in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)
