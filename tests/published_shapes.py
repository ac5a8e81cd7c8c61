"""config.json of published models, shapes alone: what planning needs of a backbone that is not here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shapes import LLAMA_8B

_MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {"model_type": "llama", **LLAMA_8B},
    "google/gemma-2-2b-it": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {**_MISTRAL_7B, "vocab_size": 32768},
    "mistralai/Mistral-7B-Instruct-v0.2": {**_MISTRAL_7B, "vocab_size": 32000},
}
PARAMETERS: Mapping[str, int] = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-2-2b-it": 2_614_341_888,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
}
"""As the hub states them."""


def write_config(name: str, folder: Path) -> Path:
    """Write the config.json of a published model into `folder`, which must exist, and return the folder."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return folder
