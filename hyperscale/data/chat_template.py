"""Conversations as text, through the tokenizer's own chat template, with the place of every assistant turn.

A template is a program, and its output says nowhere which part is whose. A turn begins where the template's generation
prompt ends, because generation starts there, and ends with the token that closes it. Both are found by rendering parts
of the conversation. Where a template rewrites history (Qwen3 leaves out earlier reasoning, Mistral moves the system
message), no part is a prefix of the whole: a mark is then put beside a message's content, and the text without the mark
must be the text as it was. What cannot be verified is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hyperscale.data.conversations import Conversation, Message
from hyperscale.errors import DataError

Span = tuple[int, int]
"""First position, and the one after the last."""

_START_OF_REASONING = "<think>"
_MARK = "HYPERSCALEMARK"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION: Message = {"role": "user", "content": "Why?"}
_ANSWER: Message = {"role": "assistant", "content": "Because."}


@dataclass(frozen=True, slots=True)
class Closing:
    """What ends an assistant turn, found in a conversation of two questions."""

    earlier: str
    """Text from the end of the content to the end of the closing token, in turns that others follow; may be empty."""
    last: str
    """The same of the last turn; some templates close it otherwise."""
    token_id: int | None
    """The token that closes the last turn, which ends generation; None if the template has none."""


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A conversation as text. Positions are those of `prompt + answer`."""

    prompt: str
    """Everything before the last assistant turn, and the generation prompt."""
    answer: str
    """The last turn with the token that closes it."""
    spans: tuple[Span, ...]
    """What the loss counts, in order: the assistant's turns, each to the end of its closing token."""
    is_closed: bool
    """Whether the template closes the last turn by a token of its own."""


@dataclass(frozen=True, slots=True)
class _Rendering:
    """Some messages of a conversation, and their text."""

    conversation: Conversation
    messages: tuple[Message, ...]
    prompt: bool
    """Whether the generation prompt follows the messages."""
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    task: str
    """The task's name, for messages."""

    @cached_property
    def closing(self) -> Closing:
        """What ends a turn, read off a short conversation.

        Raises:
            DataError: the template refuses even that one.
        """
        probe = Conversation((_QUESTION, _ANSWER, _QUESTION), (), "a test conversation")
        whole = self._render(probe, probe.messages, prompt=True)
        alone = self._render(probe, probe.messages[:2], prompt=False)
        last, token_id = self._to_first_token(alone.text[self._edge(alone, 1, at_end=True) :])
        if token_id is None:  # what follows an earlier turn is then the next turn's header, which closes nothing
            return Closing("", "", None)
        earlier, _ = self._to_first_token(whole.text[self._edge(whole, 1, at_end=True) :])
        return Closing(earlier, last, token_id)

    @property
    def reads_tools(self) -> bool:
        """Whether the template writes the functions of the column `tools`."""
        return "tools" in self.tokenizer.get_chat_template(tools=[{}])

    def prompt(self, conversation: Conversation) -> str:
        """Return everything before the last assistant turn, and the generation prompt.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._render(conversation, conversation.prompt.messages, prompt=True).text

    def lay_out(self, conversation: Conversation) -> RenderedConversation:
        """Return the text of a conversation that ends with an assistant turn, and the places of its turns.

        Raises:
            DataError: the template refuses the conversation, or rewrites it so that a turn cannot be located.
        """
        messages, number = conversation.messages, len(conversation.messages) - 1
        before = self._render(conversation, messages[:-1], prompt=True)
        whole = self._render(conversation, messages, prompt=False)
        start = len(before.text) if whole.text.startswith(before.text) else self._start(whole, number)
        end = self._end(whole, number, start)
        shift = len(before.text) - start
        spans = []
        for place, message in enumerate(before.messages):
            if message["role"] == "assistant":
                first = self._start(before, place)
                spans.append((first, self._end(before, place, first)))
        spans.append((start + shift, end + shift))
        prompt, answer = before.text, whole.text[start:end]
        self._check_tool_calls(conversation, prompt + answer, spans)
        if _GENERATION.search(self._source(conversation)):
            marked = self._marked(before)
            marked += [(max(first, start) + shift, end + shift) for first, end in self._marked(whole) if end > start]
            spans = _common(spans, marked, self.closing)
        return RenderedConversation(prompt, answer, tuple(spans), self.closing.token_id is not None)

    def _render(self, conversation: Conversation, messages: Sequence[Message], prompt: bool) -> _Rendering:
        """Return messages of a conversation as text; `prompt`: with the generation prompt."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"task '{self.task}' holds conversations, but the tokenizer has no chat template; choose a backbone "
                "that was trained for chat, or give its tokenizer a chat template"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(conversation.tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{conversation.where}: task '{self.task}': the tokenizer's chat template refuses the conversation: "
                f"{error}{_hint(messages, str(error))}"
            ) from error
        return _Rendering(conversation, tuple(messages), prompt, cast(str, text))

    def _start(self, within: _Rendering, number: int) -> int:
        """Return where the turn of message `number` begins."""
        if number == 0:
            return self._edge(within, number, at_end=False)
        question = self._render(within.conversation, within.messages[:number], prompt=True)
        if within.text.startswith(question.text):
            return len(question.text)
        # History is rewritten: what follows the content of the message before is the same here and in `question`, up to
        # the end of the generation prompt or to the content, whichever comes first.
        follows = question.text[self._edge(question, number - 1, at_end=True) :]
        here = self._edge(within, number - 1, at_end=True)
        length = _common_length(follows, within.text[here:])
        if length == len(follows):
            return here + length
        thought = follows.rfind(_START_OF_REASONING)
        if 0 <= thought <= length < thought + len(_START_OF_REASONING):
            return here + thought  # the generation prompt opens the reasoning, which history leaves out
        content = self._edge(within, number, at_end=False)
        if here + length < content:
            raise self._rewritten(within, number)
        return content

    def _end(self, within: _Rendering, number: int, start: int) -> int:
        """Return the end of a turn that begins at `start`, with the token that closes it."""
        closing = self.closing.earlier if within.prompt else self.closing.last
        if not closing and not within.prompt:
            return max(start, len(within.text.rstrip()))
        edge = start
        if not closing or closing in json.dumps(within.messages[number], ensure_ascii=False, default=str):
            edge = self._edge(within, number, at_end=True)
        place = within.text.find(closing, edge)
        end = place + len(closing)
        is_called = [message["role"] for message in within.messages[number + 1 : number + 2]] == ["tool"]
        if place >= 0 and (not is_called or end <= self._edge(within, number + 1, at_end=False)):
            return end
        # A turn that calls a tool may be closed by another token than an answer.
        alone = self._render(within.conversation, within.messages[: number + 1], prompt=False).text.rstrip()
        if not is_called or not start < len(alone) <= self._edge(within, number + 1, at_end=False):
            raise self._rewritten(within, number)
        if not within.text.startswith(alone):
            raise self._rewritten(within, number)
        return len(alone)

    def _edge(self, within: _Rendering, number: int, at_end: bool) -> int:
        """Return where the content of message `number` ends, or begins.

        A mark is put beside the content. If the text without the mark is the text as it was, the mark is at the edge.
        """
        content = str(within.messages[number].get("content", ""))
        for tried in dict.fromkeys((content, content.rstrip() if at_end else content.lstrip(), content.strip())):
            marked = {**within.messages[number], "content": tried + _MARK if at_end else _MARK + tried}
            messages = [*within.messages[:number], marked, *within.messages[number + 1 :]]
            text = self._render(within.conversation, messages, within.prompt).text
            place = text.find(_MARK)
            if place >= 0 and text[:place] + text[place + len(_MARK) :] == within.text:
                return place
        raise self._rewritten(within, number)

    def _rewritten(self, within: _Rendering, number: int) -> DataError:
        name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
        return DataError(
            f"{within.conversation.where}: task '{self.task}': the chat template of {name} rewrites message "
            f"{number + 1} ({within.messages[number]['role']}), so the assistant's turn cannot be located. Give the "
            "tokenizer a template that keeps earlier turns as they are"
        )

    def _to_first_token(self, text: str) -> tuple[str, int | None]:
        """Return the text up to the end of its first added token, and that token's id; nothing if it has none."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        added = self.tokenizer.added_tokens_decoder
        for token_id, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token_id in added:
                return text[:end], token_id
        return "", None

    def _marked(self, within: _Rendering) -> list[Span]:
        """Return what the template itself marks as the assistant's, by `{% generation %}`."""
        options: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        _, marked = cast(
            tuple[Any, list[list[Span]]],
            render_jinja_template(
                [[dict(message) for message in within.messages]],
                tools=list(within.conversation.tools) or None,
                chat_template=self._source(within.conversation),
                return_assistant_tokens_mask=True,
                add_generation_prompt=within.prompt,
                **options,
            ),
        )
        return list(marked[0])

    def _source(self, conversation: Conversation) -> str:
        return self.tokenizer.get_chat_template(tools=list(conversation.tools) or None)

    def _check_tool_calls(self, conversation: Conversation, text: str, turns: Sequence[Span]) -> None:
        """Refuse a template that leaves out tool calls: such a turn would teach an empty answer."""
        own = [message for message in conversation.messages if message["role"] == "assistant"]
        for message, (first, end) in zip(own, turns, strict=True):
            if "tool_calls" in message and text[first:end] in ("", self.closing.earlier, self.closing.last):
                raise DataError(
                    f"{conversation.where}: task '{self.task}': the chat template leaves out the tool calls of a turn; "
                    "write them as content, or use a backbone whose template knows tools"
                )


def _common(spans: Sequence[Span], marked: Sequence[Span], closing: Closing) -> list[Span]:
    """Return the parts of turns that the template marks; a turn with such a part also keeps its closing token."""
    kept: list[Span] = []
    for number, (first, end) in enumerate(spans):
        length = len(closing.last if number == len(spans) - 1 else closing.earlier)
        parts = [(max(first, one), min(end, other)) for one, other in marked]
        parts = sorted({(one, other) for one, other in parts if one < other})
        if parts and length and parts[-1][1] < end:
            parts.append((max(end - length, parts[-1][1]), end))
        kept += parts
    return kept


def _common_length(one: str, other: str) -> int:
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _hint(messages: Sequence[Message], error: str) -> str:
    if "system" in error.lower() and messages[0]["role"] == "system":
        return ". Put the system text into the first user message, or leave it out"
    return ""
