"""Examples become token ids, with one rule for the boundary between prompt and answer.

Prompt and answer are always tokenised apart and joined as ids. So a prompt has the same ids in training, in label
scoring and in generation, whatever answer follows. For a decoder-only model the space between them belongs to the
answer (`Sentiment:` + ` positive`), as most vocabularies hold words with their leading space; tokenizers that put that
space themselves (SentencePiece) get none from us, and neither do answers after a chat template's header.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations, takewhile
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.chat_encoding import ConversationEncoder
from hyperscale.data.chat_template import ChatTemplate, Span
from hyperscale.data.conversations import Conversation
from hyperscale.data.examples import Example
from hyperscale.data.shortening import shorten
from hyperscale.data.tagging import last_sentinel
from hyperscale.data.tasks import Task
from hyperscale.errors import BackboneError, DataError
from hyperscale.logger import get_logger

_logger = get_logger(__name__)

TokenIds = tuple[int, ...]
RowIds = TokenIds | NDArray[np.unsignedinteger[Any]]
"""Ids of a row: a tuple where they were just made, a slice of a mapped file where they come from the cache."""

_END_OF_REASONING = "</think>"
"""Ends the reasoning of Qwen3, SmolLM3, DeepSeek R1 and others."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids of one example."""

    source_ids: RowIds
    """The prompt with the special tokens of the tokenizer's own rule; ends in eos for an encoder."""
    target_ids: RowIds
    """The answer and eos."""
    candidate_ids: tuple[TokenIds, ...] = ()
    """All answers of a classification, in the order of the task's labels; see `encode_candidates`."""
    spans: tuple[Span, ...] = ()
    """Ranges [first, end) of `source_ids + target_ids` whose tokens the loss counts. () = the whole target."""
    shortened: bool = False
    """Whether tokens of the prompt were left out to meet `max_source_tokens`; not kept by the cache."""

    @property
    def num_tokens(self) -> int:
        """Tokens that a training step runs for this example."""
        return len(self.source_ids) + len(self.target_ids)

    def __eq__(self, other: object) -> bool:
        """Compare ids, whatever holds them, candidates and spans."""
        return isinstance(other, Encoded) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return tuple(map(int, self.source_ids)), tuple(map(int, self.target_ids)), self.candidate_ids, self.spans


@dataclass(frozen=True)
class TaskTokenizer:
    """A tokenizer as one task uses it."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    is_encoder_decoder: bool

    def encode_examples(self, examples: Sequence[Example], settings: DataSettings) -> list[Encoded | None]:
        """Encode examples, each by itself; None stands for one that must be left out.

        The result depends on nothing but the task, the tokenizer, the limits of `settings` and the example. Calls of
        thousands of examples are faster than calls of one.

        Raises:
            DataError: an example is too long under `too_long: error`, two labels have the same tokens, or the chat
                template refuses a conversation.
        """
        if self.task.conversation is not None:
            return self._encode_conversations(examples, settings)
        answers = list(dict.fromkeys(example.target for example in examples))
        target_ids = dict(zip(answers, self.encode_answers(answers), strict=True))
        labels = list(dict.fromkeys(example.candidates for example in examples))
        candidate_ids = {candidates: self.encode_candidates(candidates) for candidates in labels}
        encoded: list[Encoded | None] = []
        for example, source in zip(examples, self.encode_prompts([one.source for one in examples]), strict=True):
            target = target_ids[example.target]
            fitting = self._fit(example, source, target, settings)
            candidates = candidate_ids[example.candidates]
            shortened = fitting is not None and len(fitting) < len(source)
            encoded.append(None if fitting is None else Encoded(fitting, target, candidates, shortened=shortened))
        return encoded

    def encode_prompts(self, prompts: Sequence[str]) -> list[TokenIds]:
        """Encode prompts as training, scoring and generation all see them.

        Raises:
            DataError: the task asks for a chat template and the tokenizer has none, or its template refuses the prompt.
        """
        eos = self._eos()
        if self.task.chat or self.task.conversation is not None:
            return self._ids([self._in_chat(prompt) for prompt in prompts], special=False)
        if self.is_encoder_decoder:
            return [ids if ids[-1:] == (eos,) else (*ids, eos) for ids in self._ids(prompts, special=True)]
        # A tokenizer that also closes texts would make the model answer after the end of the text.
        encoded = self._ids([prompt.rstrip(" ") for prompt in prompts], special=True)
        return [ids[:-1] if ids[-1:] == (eos,) else ids for ids in encoded]

    def encode_conversation(self, conversation: Conversation, most: int, may_shorten: bool) -> TokenIds | None:
        """Encode a conversation before its last assistant turn, as training and generation see it.

        Args:
            most: the largest number of tokens.
            may_shorten: leave out the oldest exchanges of a longer one, then tokens from its middle.

        Returns:
            None for a longer one that may not be shortened.
        """
        return self._conversations().encode_prompt(conversation, most, may_shorten)

    def encode_answers(self, answers: Sequence[str]) -> list[TokenIds]:
        """Encode answers, each closed by eos, or in a chat by the token that closes the template's turns."""
        eos = self.stop_ids[-1]
        space = self._space()
        return [(*ids, eos) for ids in self._ids([_led_by(space, answer) for answer in answers], special=False)]

    def encode_candidates(self, candidates: Sequence[str]) -> tuple[TokenIds, ...]:
        """Encode a classification's answers for scoring.

        They carry eos only where one of them begins another: elsewhere the words alone decide, and the chance that a
        backbone without adapters stops there would add noise.

        Raises:
            DataError: two answers have the same tokens.
        """
        closed = self.encode_answers(candidates)
        if len(set(closed)) < len(closed):
            raise DataError(
                f"task '{self.task.name}': two labels have the same tokens in this vocabulary: {candidates}"
            )
        opened = [ids[:-1] for ids in closed]
        nested = any(longer[: len(shorter)] == shorter for shorter, longer in permutations(opened, 2))
        return tuple(closed if nested else opened)

    def decode(self, token_ids: Sequence[int] | RowIds) -> str:
        """Return a generated answer as text: up to the first stop token, without special tokens and outer spaces.

        Answers of sequence labelling keep their sentinels, which are special tokens of T5. A turn of a conversation
        loses its reasoning: what is before the last `</think>`.
        """
        stops = set(self.stop_ids)
        answer = list(takewhile(lambda one: one not in stops, map(int, token_ids)))
        if self.task.conversation is not None:
            answer = _after_last(answer, self.tokenizer.convert_tokens_to_ids(_END_OF_REASONING))
        skip = self.task.tagging is None
        text = self.tokenizer.decode(answer, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if self.task.conversation is not None:
            text = cast(str, text).rpartition(_END_OF_REASONING)[2]
        return cast(str, text).strip()

    @cached_property
    def stop_ids(self) -> TokenIds:
        """The tokens that end an answer: eos, and in a chat the token that closes the template's last turn."""
        eos = self._eos()
        if self.is_encoder_decoder or not (self.task.chat or self.task.conversation is not None):
            return (eos,)
        closing = self._template.closing.token_id
        return (eos,) if closing is None or closing == eos else (eos, closing)

    def lacks_sentinels(self, prompt: str) -> bool:
        """Whether a sentence of sequence labelling has more words than the vocabulary has sentinels for.

        T5 has 100, and one closes the sentence: 99 words.
        """
        last = last_sentinel(prompt) if self.task.tagging is not None else None
        return last is not None and self.tokenizer.convert_tokens_to_ids(last) in (None, self.tokenizer.unk_token_id)

    def _ids(self, texts: Sequence[str], special: bool) -> list[TokenIds]:
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in batch["input_ids"]]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.task.name)

    def _conversations(self) -> ConversationEncoder:
        if self.is_encoder_decoder:
            raise DataError(
                f"task '{self.task.name}' holds conversations, which need a decoder-only backbone; an encoder-decoder "
                "has no chat template. Write input and target templates instead, or choose another backbone"
            )
        return ConversationEncoder(self._template, self._eos())

    def _encode_conversations(self, examples: Sequence[Example], settings: DataSettings) -> list[Encoded | None]:
        conversations = [cast(Conversation, example.conversation) for example in examples]
        encoded = self._conversations().encode(conversations, settings)
        if any(conversation.tools for conversation in conversations) and not self._template.reads_tools:
            _logger.warning(
                "task %s: rows have tools, but the tokenizer's chat template leaves them out", self.task.name
            )
        return [
            None if one is None else Encoded(one.source_ids, one.target_ids, (), one.spans, one.shortened)
            for one in encoded
        ]

    def scored_example(self, example: Example, encoded: Encoded) -> Example:
        """Return an example with the reference of its answer: a tool call is written as the template writes it."""
        conversation = example.conversation
        if conversation is None or "tool_calls" not in conversation.messages[-1]:
            return example
        return replace(example, target=self.decode(encoded.target_ids))

    def _in_chat(self, prompt: str) -> str:
        system = [{"role": "system", "content": self.task.system}] if self.task.system is not None else []
        messages = [*system, {"role": "user", "content": prompt}]
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"task '{self.task.name}' asks for chat, but the tokenizer has no chat template; set chat: false"
            )
        try:
            return cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise DataError(
                f"task '{self.task.name}': the tokenizer's chat template refuses the prompt: {error}"
            ) from error

    def _space(self) -> str:
        if self.task.chat or self.task.conversation is not None or self.is_encoder_decoder:
            return ""
        first = self.tokenizer.convert_ids_to_tokens(list(self._ids(["a"], special=False)[0]))[0]
        return "" if first.startswith(("▁", "Ġ")) else " "

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BackboneError(f"the tokenizer of {self.tokenizer.name_or_path} has no end-of-sequence token")
        return cast(int, eos)

    def _fit(self, example: Example, source: TokenIds, target: TokenIds, settings: DataSettings) -> TokenIds | None:
        """Return the prompt's ids within the limits, or None where the example must be left out."""
        if self.lacks_sentinels(example.source):
            if settings.too_long == "error":
                raise DataError(
                    f"task '{self.task.name}': a sentence has more words than the vocabulary has sentinels for: "
                    f"'{example.source[:60]}…'; divide it, or let data.too_long be drop"
                )
            return None
        if len(source) <= settings.max_source_tokens and len(target) <= settings.max_target_tokens:
            return source or None
        if settings.too_long == "error":
            raise DataError(
                f"task '{self.task.name}': a row has {len(source)} source and {len(target)} target tokens, more than "
                f"data.max_source_tokens {settings.max_source_tokens} or data.max_target_tokens "
                f"{settings.max_target_tokens}: '{example.source[:60]}…'; raise the limits or change data.too_long"
            )
        may_shorten = settings.too_long == "truncate_source" and self.task.tagging is None  # every word has its tag
        if may_shorten and len(target) <= settings.max_target_tokens:
            return shorten(source, settings.max_source_tokens)
        return None


def _after_last(ids: list[int], token: int | list[int]) -> list[int]:
    place = next((place for place in reversed(range(len(ids))) if ids[place] == token), -1)
    return ids[place + 1 :]


def _led_by(space: str, answer: str) -> str:
    return answer if answer[:1].isspace() else space + answer
