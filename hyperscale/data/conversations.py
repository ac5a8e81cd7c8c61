"""Conversations of rows: `messages`, ShareGPT's `conversations` and Alpaca's three columns, all as the same messages.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}
    {"instruction": "…", "input": "…", "output": "…"}

A row may also have the columns `system` (a text) and `tools` (JSON schemas of functions, for the chat template).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hyperscale.config.section import Section
from hyperscale.data.rows import Row
from hyperscale.errors import DataError, nearest

Message = Mapping[str, Any]
"""`role`, `content` (text; absent where a turn only calls tools), and any field that the chat template knows."""

ConversationFormat = Literal["messages", "sharegpt", "alpaca"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_COLUMN: Mapping[ConversationFormat, str] = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "user": "user",
    "assistant": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


class ConversationSettings(Section):
    """The columns of a task whose rows are conversations."""

    format: ConversationFormat | None = None
    """None: the row's columns decide; `messages`, `conversations` or `instruction` must be one of them."""
    column: str | None = None
    """Column of the messages, if it is not `messages` (format messages) or `conversations` (format sharegpt)."""
    tools: str = "tools"
    """Column of the functions that the model may call: JSON schemas, as a list or as JSON text. Rows may lack it."""
    system: str = "system"
    """Column of a system message, for rows whose messages have none. Rows may lack it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row, in order."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    where: str
    """File and line of the row."""

    @property
    def prompt(self) -> "Conversation":
        """The conversation before its last assistant turn; all of it if a user or a tool spoke last."""
        if self.messages[-1]["role"] != "assistant":
            return self
        return replace(self, messages=self.messages[:-1])

    @property
    def answer(self) -> str:
        """The text of the last turn; its tool calls as JSON where it has no text."""
        last = self.messages[-1]
        return str(last.get("content") or _json(last.get("tool_calls", ())))

    def __str__(self) -> str:
        """Return every message as `role: text`, whatever the chat template."""
        tools = [f"tools: {_json(list(self.tools))}"] if self.tools else []
        return "\n".join([*tools, *(f"{message['role']}: {_text(message)}" for message in self.messages)])


def read_conversation(row: Row, settings: ConversationSettings, task: str, system: str | None) -> Conversation:
    """Return the conversation of a row. Its last turn may be anyone's.

    Args:
        task: the task's name, for messages.
        system: the system message of rows that have none.

    Raises:
        DataError: the row has no conversation or two, or a turn has no known role or no text.
    """
    where = f"{row.where}: task '{task}'"
    form = settings.format or _form_of(row, settings, where)
    match form:
        case "messages":
            messages = _from_messages(row, settings.column or _COLUMN[form], where)
        case "sharegpt":
            messages = _from_sharegpt(row, settings.column or _COLUMN[form], where)
        case "alpaca":
            messages = _from_alpaca(row, where)
    if not messages:
        raise DataError(f"{where}: the conversation is empty")
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{where}: the conversation has no user turn")
    own_system = row.values.get(settings.system) or system
    if own_system and not any(message["role"] in ("system", "developer") for message in messages):
        messages.insert(0, {"role": "system", "content": str(own_system)})
    return Conversation(tuple(messages), _tools(row, settings.tools, where), row.where)


def check_answered(conversation: Conversation, task: str) -> None:
    """Raise `DataError` unless an assistant turn with text or tool calls ends the row."""
    last = conversation.messages[-1]
    where = f"{conversation.where}: task '{task}'"
    if last["role"] != "assistant":
        raise DataError(
            f"{where}: the last turn is the {last['role']}'s; a row must end with the assistant's, which is trained "
            "and scored. Leave that turn out"
        )
    if not str(last.get("content", "")).strip() and "tool_calls" not in last:
        raise DataError(f"{where}: the last assistant turn is empty")


def _form_of(row: Row, settings: ConversationSettings, where: str) -> ConversationFormat:
    if settings.column is not None:
        turns = _listed(row.values.get(settings.column))
        is_sharegpt = turns is not None and any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
        return "sharegpt" if is_sharegpt else "messages"
    forms = [form for form, column in _COLUMN.items() if row.values.get(column) is not None]
    if len(forms) > 1:
        columns = " and ".join(f"'{_COLUMN[form]}'" for form in forms)
        raise DataError(f"{where}: the row has columns {columns}; set conversation.format to {' or '.join(forms)}")
    if not forms:
        raise DataError(
            f"{where}: the row has none of the columns messages, conversations and instruction."
            f"{nearest('messages', row.values)} Columns: {', '.join(row.values) or 'none'}"
        )
    return forms[0]


def _from_messages(row: Row, column: str, where: str) -> list[Message]:
    turns = _turns(row, column, where)
    return [_message(turn, "role", turn.get("role"), f"{where}: message {n}") for n, turn in enumerate(turns, 1)]


def _from_sharegpt(row: Row, column: str, where: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(row, column, where), 1):
        place = f"{where}: message {number}"
        speaker = turn.get("from")
        if speaker is not None and speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{place}: unknown speaker '{speaker}'; known: {', '.join(_SHAREGPT_ROLES)}")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        role = _SHAREGPT_ROLES.get(str(speaker))
        messages.append(_message({**others, "content": turn.get("value")}, "from", role, place))
    return messages


def _from_alpaca(row: Row, where: str) -> list[Message]:
    texts: dict[str, str] = {}
    for column in ("instruction", "input", "output"):
        value = row.values.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column '{column}' holds a {type(value).__name__}, not text")
        texts[column] = value or ""
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    if not question:
        raise DataError(f"{where}: columns 'instruction' and 'input' are empty")
    messages: list[Message] = [{"role": "user", "content": question}]
    return [*messages, {"role": "assistant", "content": texts["output"]}] if "output" in row.values else messages


def _turns(row: Row, column: str, where: str) -> list[Mapping[str, Any]]:
    if column not in row.values:
        there = ", ".join(row.values) or "none"
        raise DataError(f"{where}: no column '{column}'.{nearest(column, row.values)} Columns: {there}")
    turns = _listed(row.values[column])
    if turns is None:
        kind = type(row.values[column]).__name__
        raise DataError(f"{where}: column '{column}' must hold a list of messages, not a {kind}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: message {number} must be an object with a role, not a {type(turn).__name__}")
    return turns


def _listed(value: Any) -> list[Any] | None:
    """Return a list, also from JSON text (CSV files have no lists); None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _message(turn: Mapping[str, Any], key: str, role: Any, where: str) -> Message:
    """Return a turn as a message: fields that are null are left out, as in rows of an Arrow table."""
    if role is None:
        raise DataError(f"{where} has no '{key}'. Fields: {', '.join(turn) or 'none'}")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role '{role}'.{nearest(str(role), ROLES)} Known: {', '.join(ROLES)}")
    message = {name: value for name, value in turn.items() if value is not None and name not in ("role", "content")}
    calls = [_call(call, where) for call in message.pop("tool_calls", ())]
    content = _content(turn.get("content"), where)
    if content is None and not calls:
        raise DataError(f"{where}: the {role}'s turn has no content")
    return {
        "role": role,
        **({} if content is None else {"content": content}),
        **message,
        **({"tool_calls": calls} if calls else {}),
    }


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: content is a {type(content).__name__}; it must be text, or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: content has a part of type '{kind}'; only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> Any:
    """Return a tool call with its arguments as an object: templates write them as JSON themselves."""
    if not isinstance(call, Mapping):
        raise DataError(f"{where}: a tool call must be an object with a function, not a {type(call).__name__}")
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return call
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if "function" in call else function


def _tools(row: Row, column: str, where: str) -> tuple[Any, ...]:
    value = row.values.get(column)
    if value is None or value == "":
        return ()
    tools = _listed(value)
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: column '{column}' must hold a list of JSON schemas of functions")
    return tuple(tools)


def _text(message: Message) -> str:
    """Return a message's content, and whatever else it holds as JSON."""
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    parts = [message.get("content", ""), _json(others) if others else ""]
    return "\n".join(part for part in parts if part)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
