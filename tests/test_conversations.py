"""Rows of conversations: the forms that users have become the same messages; a bad row is reported with its place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hyperscale.data.conversations import Conversation
from hyperscale.data.examples import renderer
from hyperscale.data.rows import Row, read_rows
from hyperscale.data.sources import load_task_data
from hyperscale.data.tasks import Task, load_task
from hyperscale.errors import DataError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
PAIR = [QUESTION, ANSWER]


def task(**fields: object) -> Task:
    return Task.model_validate({"name": "chats", "source": "chats.jsonl", "conversation": True} | fields)


def read(values: Mapping[str, Any], of: Task | None = None) -> Conversation:
    conversation = renderer(of or task()).conversation(Row(values, "chats.jsonl:7"))
    assert conversation is not None
    return conversation


def messages(values: Mapping[str, Any], of: Task | None = None) -> list[dict[str, Any]]:
    return [dict(message) for message in read(values, of).messages]


def test_three_forms_are_the_same_messages():
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    assert messages({"messages": PAIR}) == PAIR
    assert messages({"conversations": sharegpt}) == PAIR
    assert messages({"conversations": json.dumps(sharegpt)}) == PAIR  # CSV files hold JSON text
    assert messages({"instruction": "Why?", "input": "", "output": "Because."}) == PAIR
    assert messages({"instruction": "Why?", "output": "Because.", "messages": None}) == PAIR
    assert (
        messages({"instruction": "Translate.", "input": "Hund", "output": "dog"})[0]["content"] == "Translate.\n\nHund"
    )
    assert messages({"talk": PAIR}, task(conversation={"column": "talk"})) == PAIR
    assert messages({"talk": sharegpt}, task(conversation={"column": "talk"})) == PAIR
    both = {"messages": PAIR, "conversations": sharegpt[:1]}
    assert messages(both, task(conversation={"format": "sharegpt"})) == PAIR[:1]


def test_speakers_of_sharegpt():
    turns = [
        ("system", "s"),
        ("human", "u"),
        ("function_call", "f()"),
        ("observation", "1"),
        ("gpt", "a"),
        ("tool", "2"),
    ]
    turns_read = messages({"conversations": [{"from": speaker, "value": value} for speaker, value in turns]})
    roles = ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [(one["role"], one["content"]) for one in turns_read] == [
        (role, value) for role, (_, value) in zip(roles, turns, strict=True)
    ]


def test_system_columns_and_defaults():
    system = {"role": "system", "content": "Be kind."}
    assert messages({"messages": PAIR, "system": "Be kind."}) == [system, *PAIR]
    assert messages({"instruction": "Why?", "output": "Because.", "system": "Be kind."}) == [system, *PAIR]
    assert messages({"messages": PAIR}, task(system="Be kind.")) == [system, *PAIR]
    assert messages({"messages": [system, *PAIR], "system": "Be rude."}, task(system="No.")) == [system, *PAIR]
    developer = {"role": "developer", "content": "Be terse."}
    assert messages({"messages": [developer, *PAIR]}, task(system="No.")) == [developer, *PAIR]


def test_fields_that_templates_know_are_kept_and_nulls_are_left_out():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
    turns_read = messages(
        {
            "messages": [
                {**QUESTION, "tool_calls": None, "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I must ask."},
                {"role": "tool", "content": "3", "tool_call_id": "1"},
                {**ANSWER, "thinking": "Now I know.", "tool_calls": None},
            ],
            "tools": '[{"type": "function"}]',
        }
    )
    assert turns_read[0] == {**QUESTION, "name": "ann"}
    assert turns_read[1] == {
        "role": "assistant",
        "reasoning_content": "I must ask.",
        # templates write arguments as JSON themselves
        "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": [1, 2]}}}],
    }
    assert turns_read[2:] == [
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {**ANSWER, "thinking": "Now I know."},
    ]
    assert read({"messages": PAIR, "tools": '[{"type": "function"}]'}).tools == ({"type": "function"},)
    assert read({"messages": PAIR, "tools": None}).tools == ()


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    assert messages({"messages": [{"role": "user", "content": parts}, ANSWER]}) == PAIR


SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
BAD: Mapping[str, tuple[dict[str, Any], str]] = {
    "missing role": ({"messages": [{"content": "x"}]}, "message 1 has no 'role'. Fields: content"),
    "null role": ({"messages": [QUESTION, {"role": None, "content": "x"}]}, "message 2 has no 'role'"),
    "missing speaker": ({"conversations": [{"value": "x"}]}, "message 1 has no 'from'"),
    "unknown role": (
        {"messages": [{"role": "asistant", "content": "x"}]},
        "message 1: unknown role 'asistant'. Did you mean 'assistant'? Known: system, developer, user, assistant, tool",
    ),
    "unknown speaker": (
        {"conversations": [{"from": "bot", "value": "x"}]},
        "message 1: unknown speaker 'bot'; known: hum",
    ),
    "no messages": ({"messages": []}, "the conversation is empty"),
    "no user": ({"messages": [ANSWER]}, "the conversation has no user turn"),
    "last turn of the user": (
        {"messages": [*PAIR, QUESTION]},
        "the last turn is the user's; a row must end with the assista",
    ),
    "last turn of a tool": ({"messages": [*PAIR, {"role": "tool", "content": "1"}]}, "the last turn is the tool's"),
    "no content": ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2: the assistant's turn has no content"),
    "empty answer": ({"messages": [QUESTION, {**ANSWER, "content": " "}]}, "the last assistant turn is empty"),
    "number": (
        {"messages": [{**QUESTION, "content": 3}]},
        "message 1: content is a int; it must be text, or a list of text p",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}, ANSWER]},
        "message 1: content has a part of type 'image'; only text can be trained on",
    ),
    "two forms": (
        {"messages": PAIR, "conversations": SHAREGPT},
        "the row has columns 'messages' and 'conversations'; set conversation.format to messages or sharegpt",
    ),
    "messages and alpaca": (
        {"messages": PAIR, "instruction": "x", "output": "y"},
        "the row has columns 'messages' and 'instruction'; set conversation.format to messages or alpaca",
    ),
    "no form": (
        {"mesages": PAIR},
        "the row has none of the columns messages, conversations and instruction. Did you mean",
    ),
    "text": ({"messages": "Why?"}, "column 'messages' must hold a list of messages, not a str"),
    "texts": ({"messages": ["Why?"]}, "message 1 must be an object with a role, not a str"),
    "alpaca without text": ({"instruction": "", "output": "x"}, "columns 'instruction' and 'input' are empty"),
    "alpaca without output": ({"instruction": "x", "output": None}, "the last assistant turn is empty"),
    "alpaca with a list": ({"instruction": ["x"], "output": "y"}, "column 'instruction' holds a list, not text"),
    "tools": ({"messages": PAIR, "tools": "f"}, "column 'tools' must hold a list of JSON schemas of functions"),
    "tool call": (
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": ["f"]}]},
        "a tool call must be an object with a",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_reported_with_file_row_and_task(name: str, tmp_path: Path):
    values, expected = BAD[name]
    good = {"messages": PAIR}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, values, good)))
    (tmp_path / "chats.yaml").write_text("source: chats.jsonl\nconversation: true\n")
    with pytest.raises(DataError) as caught:
        load_task_data(load_task(str(tmp_path / "chats.yaml")))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/chats.jsonl:2: task 'chats': ")
    assert expected in message
    assert "\n" not in message


def test_a_column_of_another_name_must_exist():
    with pytest.raises(DataError, match=r"chats\.jsonl:7: task 'chats': no column 'talk'\. Columns: messages"):
        read({"messages": PAIR}, task(conversation={"column": "talk"}))


def test_examples_and_splits_of_parquet_rows(tmp_path: Path):
    rows = [
        {
            "messages": [
                {**QUESTION, "content": f"{number}?", "name": None},
                {**ANSWER, "name": "a" if number % 2 else None},
            ]
        }
        for number in range(20)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    assert [row.where for row in read_rows(tmp_path / "chats.parquet")][-1].endswith("chats.parquet:row 20")
    (tmp_path / "chats.yaml").write_text(
        "source: chats.parquet\nconversation: true\nmetrics: [token_f1, exact_match]\n"
    )
    data = load_task_data(load_task(str(tmp_path / "chats.yaml")))
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 18, "validation": 2}
    example = data.splits["validation"][0]
    assert example.source.startswith("user: ")
    assert (example.target, example.candidates) == ("Because.", ())
    digests = {one.content for examples in data.splits.values() for one in examples}
    assert len(digests) == 20
    first = data.splits["train"][0].conversation
    assert first is not None
    assert first.messages[0] == {"role": "user", "content": "1?"}


def test_a_conversations_text_names_every_turn_and_tool():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}, ANSWER]
    conversation = read({"messages": turns, "tools": [{"name": "f"}]})
    assert str(conversation.prompt) == (
        'tools: [{"name": "f"}]\nuser: Why?\n'
        'assistant: {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}\ntool: 1'
    )
    assert conversation.answer == "Because."
    assert "tool_calls" not in read({"messages": turns[:2]}).answer
    assert read({"messages": turns[:2]}).answer == json.dumps([call])
    assert read({"messages": [*PAIR, QUESTION]}).prompt.messages == (*PAIR, QUESTION)  # nobody has answered yet


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"labels": {"0": "a", "1": "b"}}, "conversation excludes labels, tagging and round_to"),
        ({"tagging": {}}, "conversation excludes labels, tagging and round_to"),
        ({"input": "{x}"}, "conversation takes its texts from the messages; leave input and target out"),
        ({"conversation": {"format": "chatml"}}, "messages"),
    ],
)
def test_a_task_is_conversations_or_something_else(fields: dict[str, object], expected: str):
    with pytest.raises(ValueError, match=expected):
        task(**fields)


def test_defaults_of_a_task_of_conversations():
    chats = task()
    assert (chats.kind, chats.metrics, chats.max_new_tokens) == ("conversation", ("token_f1",), 256)
    assert Task.model_validate(chats.model_dump(mode="json")) == chats  # as a bundle keeps it
    plain = task(conversation=False, input="{x}", target="{y}")
    assert (plain.kind, plain.conversation) == ("text", None)
