"""Conversations through chat templates, token by token: the ids, and on which of them there is loss."""

import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hyperscale.assets.backbones import resolve_packaged
from hyperscale.assets.packages import PinnedPackage, fetch
from hyperscale.config.data import DataSettings
from hyperscale.data.chat_template import ChatTemplate
from hyperscale.data.collate import IGNORED, Layout, collate_examples
from hyperscale.data.examples import Example, renderer
from hyperscale.data.rows import Row
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import Encoded, TaskTokenizer
from hyperscale.errors import BackboneError, DataError
from tests.chat_formats import CHATML_TEMPLATE, FORMATS, LLAMA3_TEMPLATE, Segments
from tests.rows import encode_split
from tests.tiny import TEXTS

TASK = Task.model_validate({"name": "chats", "source": "chats.jsonl", "conversation": True})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


SYSTEM = {"role": "system", "content": "Answer like a friend."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
SHORT = [user("What is the plot?"), assistant("It is thin.")]
SEVERAL = [*SHORT, user("And the music?"), assistant("The music stays with you."), user("So?"), assistant("Good film.")]
REASONED = [
    user("2 + 2?"),
    assistant("4", reasoning_content="Two and two."),
    user("And 3 + 3?"),
    assistant("6", reasoning_content="Three and three."),
]
CALLS = [
    user("How is the weather in Rome?"),
    assistant("", tool_calls=[call("Rome")], reasoning_content="I must ask."),
    {"role": "tool", "name": "weather", "content": "rain"},
    assistant("It rains."),
    user("And in Oslo?"),
    assistant("", tool_calls=[call("Oslo")]),
    {"role": "tool", "name": "weather", "content": "sun"},
    assistant("The sun shines."),
]
SAME = [user("yes"), assistant("yes"), user("yes"), assistant("yes")]
"""A turn cannot be found by its text."""
SPOKEN_TOKENS = [
    user("What ends a turn?"),
    assistant("It is <|im_end|>, </s> or <end_of_turn>, or <|eot_id|>."),
    *SHORT,
]


def row(messages: Sequence[Mapping[str, Any]], **columns: Any) -> Row:
    return Row({"messages": list(messages), **columns}, "chats.jsonl:7")


def settings(**fields: object) -> DataSettings:
    return DataSettings.model_validate(
        {"tasks": ["chats"], "max_source_tokens": 2000, "max_target_tokens": 500} | fields
    )


def example(messages: Sequence[Mapping[str, Any]], task: Task = TASK, **columns: Any) -> Example:
    return renderer(task).example(row(messages, **columns))


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], task: Task = TASK, **columns: Any
) -> Encoded:
    (encoded,) = TaskTokenizer(tokenizer, task, is_encoder_decoder=False).encode_examples(
        [example(messages, task, **columns)], settings()
    )
    assert encoded is not None
    return encoded


def labels(encoded: Encoded) -> list[int]:
    (row,) = collate_examples([encoded], [0], Layout(0, is_encoder_decoder=False)).labels.tolist()
    return row


def written(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a text written by hand, up to the last piece with loss."""
    text = "".join(piece for piece, _ in segments)
    loss = [is_loss for piece, is_loss in segments for _ in piece]
    end = len(loss) - loss[::-1].index(True)
    encoded = tokenizer(text[:end], add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    return ids, [
        one if loss[start] and all(loss[start:stop]) else IGNORED
        for one, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True)
    ]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return FORMATS[name].tokenizer()


CONVERSATIONS = {
    "one turn": (SHORT, ()),
    "several turns": (SEVERAL, ()),
    "system": ([SYSTEM, *SEVERAL], ()),
    "reasoning": (REASONED, ()),
    "tools": (CALLS, TOOLS),
    "system and tools": ([SYSTEM, *CALLS], TOOLS),
    "equal texts": (SAME, ()),
    "closing tokens in a text": (SPOKEN_TOKENS, ()),
    "spaces at the ends": ([user(" a "), assistant("  b \n"), user("\nc"), assistant(" d")], ()),
    "two assistant turns in a row": ([*SHORT, assistant("And long."), user("So?"), assistant("Good.")], ()),
}
_NOT_KNOWN: Mapping[str, set[str]] = {
    "gemma": {"system", "tools", "system and tools", "two assistant turns in a row"},
    "chatml": {"tools", "system and tools"},
    "marked": {"tools", "system and tools"},
}


@pytest.mark.parametrize(
    ("name", "conversation"),
    [(name, title) for name in FORMATS for title in CONVERSATIONS if title not in _NOT_KNOWN.get(name, ())],
)
def test_ids_and_labels_are_those_written_by_hand(name: str, conversation: str):
    messages, tools = CONVERSATIONS[conversation]
    tokenizer = tokenizer_of(name)
    encoded = encode(tokenizer, messages, tools=list(tools))
    ids, expected = written(tokenizer, FORMATS[name].segments(messages, tools))
    assert list(encoded.source_ids + encoded.target_ids) == ids
    assert labels(encoded) == expected
    assert ids.count(tokenizer.bos_token_id) == (
        FORMATS[name].bos in FORMATS[name].template or "bos" in FORMATS[name].template
    )
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=list(tools) or None, add_generation_prompt=True, return_dict=False
    )
    assert list(encoded.source_ids) == prompt  # what a server sees


_PIECES = (
    *(
        "yes",
        "the plot",
        " ",
        "\n",
        "\n\n",
        "<",
        "<|im_end|>",
        "</s>",
        "[INST]",
        "<end_of_turn>",
        "<think>",
        "</think>",
    ),
    *(
        "{{ bos_token }}",
        "{% generation %}",
        "assistant",
        "<|im_start|>assistant\n",
        "é",
        "你好",
        "🙂",
        "\t",
        '"',
        "\\",
    ),
)


@pytest.mark.parametrize("name", FORMATS)
def test_turns_of_random_conversations_are_where_they_were_written(name: str):
    """Texts hold closing tokens, headers and template code: nothing is found by the look of it."""
    random = Random(name)
    template = ChatTemplate(tokenizer_of(name), "chats")
    has_system, has_pairs = name != "gemma", name not in ("gemma", "qwen3")  # Qwen3 writes a pair at the end otherwise
    for _ in range(80):
        messages = [SYSTEM] if has_system and random.random() < 0.4 else []
        for _ in range(random.randint(1, 4)):
            messages.append(user(_random_text(random)))
            messages += [
                assistant(_random_text(random)) for _ in range(random.choice((1, 1, 1, 2)) if has_pairs else 1)
            ]
        conversation = example(messages).conversation
        assert conversation is not None
        laid_out = template.lay_out(conversation)
        segments = FORMATS[name].segments(messages, ())
        ends = list(accumulate(len(text) for text, _ in segments))
        turns = [(end - len(text), end) for (text, is_loss), end in zip(segments, ends, strict=True) if is_loss]
        assert laid_out.prompt + laid_out.answer == "".join(text for text, _ in segments)[: turns[-1][1]]
        assert list(laid_out.spans) == turns
        assert len(laid_out.prompt) == turns[-1][0]


def _random_text(random: Random) -> str:
    return "".join(random.choices(_PIECES, k=random.randint(0, 6))) + random.choice(("yes", "x", "é."))


@pytest.mark.parametrize("conversation", ["one turn", "several turns", "system", "equal texts"])
def test_marks_of_a_template_and_rendered_parts_agree(conversation: str):
    messages, _ = CONVERSATIONS[conversation]
    marked = tokenizer_of("marked")
    whole = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(marked, messages)
    ours = [label != IGNORED for label in labels(encoded)]
    (line_break,) = marked("\n", add_special_tokens=False)["input_ids"]
    ids = whole["input_ids"]
    assert ids == [*encoded.source_ids, *encoded.target_ids, line_break]
    # The template also marks the line break after the closing token, which generation never reaches.
    assert (
        ours == [bool(mark) and one != line_break for mark, one in zip(whole["assistant_masks"], ids, strict=True)][:-1]
    )
    plain = encode(tokenizer_of("chatml"), messages)
    assert (plain.source_ids, plain.target_ids, plain.spans) == (encoded.source_ids, encoded.target_ids, encoded.spans)


def test_marks_choose_what_is_trained():
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>",
    )
    encoded = encode(tokenizer, SEVERAL)
    assert encoded.spans == ((len(encoded.source_ids), encoded.num_tokens),)
    tokenizer.chat_template = CHATML_TEMPLATE + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(DataError, match=r"chats\.jsonl:7: task 'chats': the chat template marks nothing in this conv"):
        encode(tokenizer, SEVERAL)


def test_the_packaged_backbone():
    tokenizer = AutoTokenizer.from_pretrained(resolve_packaged("smollm2-135m-instruct"))
    spaced = [SYSTEM, user(" a"), assistant("\nb ")]
    for messages in ([SYSTEM, *SEVERAL], [SYSTEM, *SAME], [SYSTEM, *SPOKEN_TOKENS], spaced):
        encoded = encode(tokenizer, messages)
        ids, expected = written(tokenizer, FORMATS["chatml"].segments(messages, ()))
        assert list(encoded.source_ids + encoded.target_ids) == ids
        assert labels(encoded) == expected
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert list(encoded.source_ids) == prompt
    text = tokenizer.decode(encode(tokenizer, SHORT).source_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")  # the template's own


def test_a_token_that_would_span_prompt_and_answer_is_divided():
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE.replace("\n", " ")
    whole = tokenizer.apply_chat_template(SHORT, return_dict=False)
    encoded = encode(tokenizer, SHORT)
    prompt = tokenizer.apply_chat_template(SHORT[:-1], add_generation_prompt=True, return_dict=False)
    assert list(encoded.source_ids) == prompt != whole[: len(prompt)]  # what generation sees, whatever the answer
    assert tokenizer.decode(encoded.target_ids) == "It is thin.<|im_end|>"
    assert encoded.spans == ((len(prompt), encoded.num_tokens),)
    earlier = encode(tokenizer, SEVERAL)
    trained = [tokenizer.decode((earlier.source_ids + earlier.target_ids)[first:end]) for first, end in earlier.spans]
    # In history the token begins before the turn, so it is not the turn's.
    assert trained[0] == "t is thin.<|im_end|>"
    assert trained[-1] == "Good film.<|im_end|>"


def test_a_vocabulary_that_puts_spaces_itself():
    """LLaMA 2 and Mistral v1: a token holds the space that the template writes before an answer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *(message["content"] for message in SEVERAL), "[INST] [/INST]"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoded = encode(fast, SEVERAL)
    ids = fast.apply_chat_template(SEVERAL, return_dict=False)
    assert list(encoded.source_ids + encoded.target_ids) == ids
    trained = [fast.decode(ids[first:end]).strip() for first, end in encoded.spans]
    assert trained == [f"{message['content']}</s>" for message in SEVERAL if message["role"] == "assistant"]


TRL = PinnedPackage(
    name="trl",
    version="1.16.0",
    kind="wheel",
    filename="trl-1.16.0-py3-none-any.whl",
    num_bytes=948205,
    sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
    licence="Apache-2.0",
)
"""Carries the templates of many families as they are published."""
PUBLISHED = {
    "gemma": ("gemma", (SHORT, SEVERAL, SAME)),
    "gemma3": ("gemma", (SHORT, SEVERAL, SAME)),
    "llama3": ("llama3", (SHORT, SEVERAL, SAME, [SYSTEM, *SEVERAL])),
    "qwen3": ("qwen3", (SHORT, SEVERAL, SAME, [SYSTEM, *SEVERAL], REASONED)),
    "qwen2_5": ("chatml", ([SYSTEM, *SEVERAL], [SYSTEM, *SAME])),
}


@pytest.fixture(scope="module")
def published() -> Mapping[str, str]:
    """Templates by name, read from the wheel; nothing of it is installed."""
    with zipfile.ZipFile(fetch(TRL)) as wheel:
        return {
            name.rpartition("/")[2].removesuffix(".jinja"): wheel.read(name).decode()
            for name in wheel.namelist()
            if name.startswith("trl/chat_templates/")
        }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_what_is_written_by_hand(name: str, published: Mapping[str, str]):
    form, conversations = PUBLISHED[name]
    tokenizer = FORMATS[form].tokenizer()
    tokenizer.chat_template = published[name]
    for messages in conversations:
        encoded = encode(tokenizer, messages)
        ids, expected = written(tokenizer, FORMATS[form].segments(messages, ()))
        assert list(encoded.source_ids + encoded.target_ids) == ids
        assert labels(encoded) == expected


def test_published_templates_agree_with_their_marked_variants(published: Mapping[str, str]):
    """For these families the wheel also has a template with `{% generation %}`: transformers' mask is the judge."""
    for name in ("llama3", "gemma", "qwen2_5", "qwen3_instruct_2507", "cohere"):
        tokenizer = FORMATS["qwen3"].tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|eot_id|>", "<end_of_turn>"]})
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|END_OF_TURN_TOKEN|>"]})
        tokenizer.chat_template = published[f"{name}_training"]
        mask = tokenizer.apply_chat_template(SEVERAL, return_dict=True, return_assistant_tokens_mask=True)
        marked = [one for one, is_marked in zip(mask["input_ids"], mask["assistant_masks"], strict=True) if is_marked]
        breaks = tokenizer("\n", add_special_tokens=False)["input_ids"]
        tokenizer.chat_template = published[name]
        ours = [label for label in labels(encode(tokenizer, SEVERAL)) if label != IGNORED]
        assert ours == [one for one in marked if one not in breaks], name


def test_generation_stops_at_the_token_that_closes_a_turn():
    gemma = TaskTokenizer(tokenizer_of("gemma"), TASK, is_encoder_decoder=False)
    end = gemma.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert gemma.stop_ids == (gemma.tokenizer.eos_token_id, end)
    encoded = encode(tokenizer_of("gemma"), SHORT)
    assert encoded.target_ids[-1] == end
    assert gemma.decode([*encoded.target_ids, 17, 18]) == "It is thin."
    chatty = TaskTokenizer(
        tokenizer_of("gemma"),
        Task.model_validate({"name": "t", "source": "x", "input": "{x}", "target": "{y}", "chat": True}),
        is_encoder_decoder=False,
    )
    assert chatty.encode_answers(["thin"])[0][-1] == end  # what the backbone was trained to end a turn with
    plain = Task.model_validate({"name": "t", "source": "x", "input": "{x}", "target": "{y}"})
    eos = gemma.tokenizer.eos_token_id
    assert TaskTokenizer(tokenizer_of("gemma"), plain, is_encoder_decoder=False).stop_ids == (eos,)
    qwen = TaskTokenizer(tokenizer_of("qwen3"), TASK, is_encoder_decoder=False)
    answer = encode(tokenizer_of("qwen3"), REASONED).target_ids
    assert "Three and three." in qwen.tokenizer.decode(answer)
    assert qwen.decode(answer) == "6"  # scored without its reasoning


def test_a_turn_that_no_token_closes_gets_eos():
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode(tokenizer, SEVERAL)
    ids = encoded.source_ids + encoded.target_ids
    trained = [tokenizer.decode(ids[first:end]) for first, end in encoded.spans]
    assert trained == [" It is thin.", " The music stays with you.", " Good film.<|im_end|>"]
    assert TaskTokenizer(tokenizer, TASK, is_encoder_decoder=False).stop_ids == (tokenizer.eos_token_id,)


def test_the_reference_of_a_tool_call_is_the_call_as_the_template_writes_it():
    tokenizer = TaskTokenizer(tokenizer_of("llama3"), TASK, is_encoder_decoder=False)
    split = encode_split(tokenizer, [example(CALLS[:2]), example(SHORT)], settings())
    assert [one.target for one in split.examples] == [
        '{"name": "weather", "parameters": {"city": "Rome"}}',
        "It is thin.",
    ]


def test_long_conversations_lose_their_oldest_exchanges(caplog: pytest.LogCaptureFixture):
    tokenizer = tokenizer_of("chatml")
    messages = [SYSTEM, *SEVERAL]
    whole, last = encode(tokenizer, messages), encode(tokenizer, [SYSTEM, *SEVERAL[2:]])
    limits = {"max_source_tokens": len(whole.source_ids) - 1, "too_long": "truncate_source"}
    of_task = TaskTokenizer(tokenizer, TASK, is_encoder_decoder=False)
    split = encode_split(of_task, [example(messages), example(SHORT)], settings(**limits))
    assert list(split.encoded) == [last, encode(tokenizer, SHORT)]
    assert (split.dropped, "task chats: 1 of 2 prompts shortened to" in caplog.text) == (0, True)
    # the loss is on what remains, in which the system message and the last exchange always are
    text = tokenizer.decode(last.source_ids)
    assert text.startswith("<|im_start|>system\nAnswer like a friend.<|im_end|>\n<|im_start|>user\nAnd the music?")
    assert len(last.spans) == 2
    caplog.clear()
    assert (
        encode_split(of_task, [example(messages), example(SHORT)], settings(**limits | {"too_long": "drop"})).dropped
        == 1
    )
    assert "task chats: 1 of 2 rows left out, beyond" in caplog.text
    with pytest.raises(
        DataError, match=r"chats\.jsonl:7: task 'chats': the conversation has \d+ tokens before the last"
    ):
        encode_split(of_task, [example(messages)], settings(**limits | {"too_long": "error"}))


def test_a_last_exchange_that_is_too_long_loses_tokens_from_its_middle():
    tokenizer = tokenizer_of("llama3")
    of_task = TaskTokenizer(tokenizer, TASK, is_encoder_decoder=False)
    messages = [user("start " + "very " * 300 + "end"), *CALLS[1:4]]
    whole = encode(tokenizer, messages)
    (cut,) = of_task.encode_examples([example(messages)], settings(max_source_tokens=300, too_long="truncate_source"))
    assert cut is not None
    assert (len(cut.source_ids), cut.target_ids, cut.shortened) == (300, whole.target_ids, True)
    counted = [one for one in labels(cut) if one != IGNORED]
    all_counted = [one for one in labels(whole) if one != IGNORED]
    assert counted == all_counted  # the call of the tool stands behind the cut
    most = len(whole.target_ids) - 1
    limits = settings(max_target_tokens=most, too_long="truncate_source")
    assert of_task.encode_examples([example(messages)], limits) == [None]  # an answer is never cut


def test_prompts_of_predict_are_those_of_training():
    tokenizer = tokenizer_of("qwen3")
    of_task = TaskTokenizer(tokenizer, TASK, is_encoder_decoder=False)
    encoded = encode(tokenizer, [SYSTEM, *SEVERAL])
    for messages in ([SYSTEM, *SEVERAL], [SYSTEM, *SEVERAL[:-1]]):  # with and without the last answer
        conversation = renderer(TASK).conversation(row(messages))
        assert conversation is not None
        assert of_task.encode_conversation(conversation, 2000, may_shorten=False) == encoded.source_ids
        assert of_task.encode_conversation(conversation, 20, may_shorten=False) is None
        shortest = of_task.encode_conversation(conversation, 20, may_shorten=True)
        assert shortest is not None
        assert len(shortest) == 20
    assert of_task.encode_prompts(["So?"]) == [encode(tokenizer, [user("So?"), assistant("x")]).source_ids]


def test_system_messages_of_the_task_and_of_the_row():
    task = TASK.model_copy(update={"system": "Be brief."})
    tokenizer = tokenizer_of("chatml")
    for messages, columns, system in (
        (SHORT, {}, "Be brief."),
        (SHORT, {"system": "Be rude."}, "Be rude."),
        ([SYSTEM, *SHORT], {"system": "Be rude."}, "Answer like a friend."),
    ):
        ids, _ = written(tokenizer, FORMATS["chatml"].segments([{"role": "system", "content": system}, *SHORT], ()))
        encoded = encode(tokenizer, messages, task, **columns)
        assert list(encoded.source_ids + encoded.target_ids) == ids


def test_the_error_for_what_cannot_be_encoded_names_it():
    start = r"chats\.jsonl:7: task 'chats': "
    with pytest.raises(
        DataError, match=start + "the tokenizer's chat template refuses the conversation: System role not"
    ):
        encode(tokenizer_of("gemma"), [SYSTEM, *SHORT])
    with pytest.raises(DataError, match=r"System role not supported\. Put the system text into the first user message"):
        encode(tokenizer_of("gemma"), [SYSTEM, *SHORT])
    with pytest.raises(DataError, match=start + ".*refuses the conversation: Roles must alternate"):
        encode(tokenizer_of("gemma"), [user("a"), *SHORT])
    bare = FORMATS["chatml"].tokenizer()
    bare.chat_template = None
    with pytest.raises(
        DataError, match="task 'chats' holds conversations, but the tokenizer has no chat template; cho"
    ):
        encode(bare, SHORT)
    lossy = FORMATS["llama3"].tokenizer()
    lossy.chat_template = LLAMA3_TEMPLATE.replace("if m.tool_calls", "if false").replace(
        "m.content | trim", "m.content"
    )
    with pytest.raises(DataError, match=start + "the chat template leaves out the tool calls of a turn; write them as"):
        encode(lossy, CALLS, tools=TOOLS)
    rewriting = FORMATS["chatml"].tokenizer()
    rewriting.chat_template = CHATML_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.last or 'music?' not in m.content else m.content | reverse }}"
    )
    with pytest.raises(
        DataError, match=start + r"the chat template of .* rewrites message \d \(\w+\), so the assistant"
    ):
        encode(rewriting, SEVERAL)
    with pytest.raises(
        DataError, match="task 'chats' holds conversations, which need a decoder-only backbone; an encod"
    ):
        TaskTokenizer(tokenizer_of("chatml"), TASK, is_encoder_decoder=True).encode_examples(
            [example(SHORT)], settings()
        )


def test_tools_that_a_template_leaves_out_are_reported(caplog: pytest.LogCaptureFixture):
    encode(tokenizer_of("qwen3"), SHORT, tools=TOOLS)
    assert caplog.text == ""
    encode(tokenizer_of("chatml"), SHORT, tools=TOOLS)
    assert "task chats: rows have tools, but the tokenizer's chat template leaves them out" in caplog.text


def test_a_tokenizer_without_offsets_is_an_error(monkeypatch: pytest.MonkeyPatch):
    slow = FORMATS["chatml"].tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(BackboneError, match="does not say where its tokens stand in a text, so the turns of conversat"):
        encode(slow, SHORT)
