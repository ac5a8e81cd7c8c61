"""Chat templates in the formats that families publish, written anew, and what each must make of a conversation.

`segments` of a format writes the text by hand, piece by piece, with whether the loss counts the piece. It shares no
code with the templates or with the package.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import TEXTS

Message = Mapping[str, Any]
Segments = list[tuple[str, bool]]
"""Text, and whether the loss counts it."""


@dataclass(frozen=True)
class Format:
    """One family's format."""

    template: str
    tokens: tuple[str, ...]
    """Its special tokens."""
    bos: str
    eos: str
    segments: Callable[[Sequence[Message], Sequence[Any]], Segments]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a byte-level tokenizer that puts a bos before every text of its own accord, as LLaMA 3's does."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<pad>", *dict.fromkeys((self.bos, self.eos, *self.tokens))]
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.token_to_id(self.bos))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token="<pad>",
            additional_special_tokens=list(self.tokens),
            chat_template=self.template,
            clean_up_tokenization_spaces=False,
        )


CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks what the assistant writes, and the line break after it."""

QWEN3_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
{{- '# Tools' -}}{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > last.user and (loop.last or m.reasoning_content) -%}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Leaves out reasoning before the last user turn, and the system's own turn when there are tools."""

LLAMA3_TEMPLATE = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- set role = 'ipython' if m.role == 'tool' else m.role -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{%- if m.tool_calls -%}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' -}}
{{- (m.tool_calls[0].function.arguments | tojson) + '}' -}}
{%- else -%}
{{- m.content | trim -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

MISTRAL_TEMPLATE = """\
{%- set has_system = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in turns -%}
{%- if m.role == 'user' -%}
{%- if tools and m == users[-1] -%}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST] ' + (messages[0].content + '\\n\\n' if has_system and loop.last else '') + m.content + '[/INST]' -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS] ' + (m.tool_calls | map(attribute='function') | list | tojson) + eos_token -}}
{%- else -%}
{{- ' ' + m.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
"""Has no generation prompt, and writes the system message and the tools into the last user turn alone."""

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) -}}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
"""Closes a turn by a token that is not eos."""


def _chatml(messages: Sequence[Message], tools: Sequence[Any]) -> Segments:
    pieces: Segments = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces += [(f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", is_answer)]
        pieces.append(("\n", False))
    return pieces


def _qwen3(messages: Sequence[Message], tools: Sequence[Any]) -> Segments:
    last_user = max(place for place, message in enumerate(messages) if message["role"] == "user")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    head = f"{system}\n\n# Tools\n" if system and tools else "# Tools\n" if tools else system
    head += "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    pieces: Segments = [(f"<|im_start|>system\n{head}<|im_end|>\n", False)] if head else []
    for place, message in enumerate(messages):
        content = message.get("content", "")
        if message["role"] == "user":
            pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n", False))
        elif message["role"] == "tool":
            response = f"<tool_response>\n{content}\n</tool_response>"
            pieces.append((f"<|im_start|>user\n{response}<|im_end|>\n", False))
        elif message["role"] == "assistant":
            thought = message.get("reasoning_content", "")
            shows = place > last_user and (place == len(messages) - 1 or thought)
            calls = "".join(
                f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
                f"{json.dumps(call['function']['arguments'])}}}\n</tool_call>"
                for call in message.get("tool_calls", ())
            )
            text = (f"<think>\n{thought}\n</think>\n\n" if shows else "") + content + calls
            pieces += [("<|im_start|>assistant\n", False), (f"{text}<|im_end|>", True), ("\n", False)]
    return pieces


def _llama3(messages: Sequence[Message], tools: Sequence[Any]) -> Segments:
    pieces: Segments = [("<|begin_of_text|>", False)]
    for message in messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        text = message.get("content", "").strip()
        if message.get("tool_calls"):
            function = message["tool_calls"][0]["function"]
            text = f'{{"name": "{function["name"]}", "parameters": {json.dumps(function["arguments"])}}}'
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        pieces.append((f"{text}<|eot_id|>", role == "assistant"))
    return pieces


def _mistral(messages: Sequence[Message], tools: Sequence[Any]) -> Segments:
    """The system message and the tools stand in the last user turn, as at the time of the last answer."""
    last_user = max(place for place, message in enumerate(messages) if message["role"] == "user")
    pieces: Segments = [("<s>", False)]
    for place, message in enumerate(messages):
        content = message.get("content", "")
        if message["role"] == "user":
            if tools and place == last_user:
                pieces.append((f"[AVAILABLE_TOOLS] {json.dumps(tools)}[/AVAILABLE_TOOLS]", False))
            system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
            is_asked = place == len(messages) - 2
            pieces.append((f"[INST] {system if is_asked else ''}{content}[/INST]", False))
        elif message["role"] == "tool":
            pieces.append((f'[TOOL_RESULTS] {{"content": {content}}}[/TOOL_RESULTS]', False))
        elif message.get("tool_calls"):
            calls = json.dumps([call["function"] for call in message["tool_calls"]])
            pieces.append((f"[TOOL_CALLS] {calls}</s>", True))
        elif message["role"] == "assistant":
            pieces.append((f" {content}</s>", True))
    return pieces


def _gemma(messages: Sequence[Message], tools: Sequence[Any]) -> Segments:
    pieces: Segments = [("<bos>", False)]
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if is_answer else 'user'}\n", False))
        pieces += [(f"{message['content'].strip()}<end_of_turn>", is_answer), ("\n", False)]
    return pieces


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
FORMATS: Mapping[str, Format] = {
    "chatml": Format(CHATML_TEMPLATE, _CHATML_TOKENS, "<|endoftext|>", "<|im_end|>", _chatml),
    "marked": Format(MARKED_CHATML_TEMPLATE, _CHATML_TOKENS, "<|endoftext|>", "<|im_end|>", _chatml),
    "qwen3": Format(
        QWEN3_TEMPLATE,
        (*_CHATML_TOKENS, "<think>", "</think>", "<tool_call>", "</tool_call>"),
        "<|endoftext|>",
        "<|im_end|>",
        _qwen3,
    ),
    "llama3": Format(
        LLAMA3_TEMPLATE,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        _llama3,
    ),
    "mistral": Format(
        MISTRAL_TEMPLATE,
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "<s>",
        "</s>",
        _mistral,
    ),
    "gemma": Format(GEMMA_TEMPLATE, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", _gemma),
}
