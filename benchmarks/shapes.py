"""Shapes that several benchmarks use: of published backbones, as fields of their configuration, and of the adapters."""

from typing import Any

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
"""TinyLlama's (arXiv 2401.02385)."""

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""LLaMA-3 8B's (arXiv 2407.21783, table 3)."""

LLAMA_70B: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
"""LLaMA-3 70B's, from the same table."""

Q_AND_V: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 8, "targets": ["q", "v"]}
"""The LoRA of the recorded benchmarks, and of the peers beside them."""
