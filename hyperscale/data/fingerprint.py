"""The key of a task's encoded rows: equal keys mean equal rows.

It holds the task, the content of its data, the tokenizer, the limits and the versions of what encodes. It holds no path
and no time, so a copied file or a new checkout finds the rows that are there.
"""

import json
from collections.abc import Collection
from importlib.metadata import version
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.tasks import Task

ENCODING_VERSION = 1
"""Increase it when the same rows, task and tokenizer give other ids, other splits, or other files."""

_OF_THE_TASK = {"source", "description", "metrics", "positive_label", "not_with", "shares_texts_with", "max_new_tokens"}
"""Fields of a task that change none of its encoded rows. The source counts by its content."""

_OF_THE_DATA = {
    *("max_source_tokens", "max_target_tokens", "too_long", "train_limit", "validation_limit", "test_limit"),
}
"""Fields of `DataSettings` that change a task's encoded rows."""


def fingerprint(
    task: Task,
    content: str,
    tokenizer: str,
    is_encoder_decoder: bool,
    settings: DataSettings,
    excluded: Collection[bytes],
) -> str:
    """Return the key of one task's encoded rows.

    Args:
        task: as its file has it, with or without labels from the data.
        content: identifies the rows of the source, see `sources.open_source`.
        tokenizer: `tokenizer_digest`.
        excluded: digests of texts that must not be among the training rows.
    """
    return _digest(
        {
            "version": ENCODING_VERSION,
            "libraries": [version("tokenizers"), version("transformers")],
            "task": task.model_dump(mode="json", exclude=_OF_THE_TASK),
            "content": content,
            "tokenizer": tokenizer,
            "is_encoder_decoder": is_encoder_decoder,
            "settings": settings.model_dump(mode="json", include=_OF_THE_DATA),
            "excluded": _digest(sorted(one.hex() for one in excluded)),
        }
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides what ids a tokenizer gives: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = sorted(tokenizer.get_vocab().items())
    else:
        backend.no_padding()  # left over from another call; each of our calls sets both
        backend.no_truncation()
        vocabulary = backend.to_str()
    arguments = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name not in _PLACES}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _digest([type(tokenizer).__name__, vocabulary, arguments, special, tokenizer.chat_template])


_PLACES = {
    "name_or_path",
    "vocab_file",
    "tokenizer_file",
    "merges_file",
    "is_local",
    "local_files_only",
    "chat_template",
}
"""Arguments of a tokenizer that say where it was read from, or that are an attribute too."""


def _digest(value: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode()))
