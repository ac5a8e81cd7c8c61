"""The examples' data: three tasks that share every prompt, so that only the adapters tell them apart."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TASKS = ("past", "plural", "capitals")
ANSWERS = {
    "walk": ("walked", "walks", "WALK"),
    "jump": ("jumped", "jumps", "JUMP"),
    "cook": ("cooked", "cooks", "COOK"),
    "paint": ("painted", "paints", "PAINT"),
    "plant": ("planted", "plants", "PLANT"),
    "laugh": ("laughed", "laughs", "LAUGH"),
    "climb": ("climbed", "climbs", "CLIMB"),
    "drift": ("drifted", "drifts", "DRIFT"),
}
"""Word -> its answer in each of TASKS."""


def prompt(word: str) -> str:
    """Return what the model reads, whatever the task."""
    return f"Form of {word}:"


def rows() -> list[tuple[str, str, int]]:
    """Return every prompt with each task's answer and the task's number."""
    return [
        (prompt(word), f" {answer}", task) for word, answers in ANSWERS.items() for task, answer in enumerate(answers)
    ]


def encode(tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> tuple[list[int], list[int]]:
    """Return input ids and labels of one row; only the answer is learned."""
    question = tokenizer(source)["input_ids"]
    answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*question, *answer], [*[-100] * len(question), *answer]


def collate(encoded: list[dict[str, list[int] | int]]) -> dict[str, Tensor]:
    """Pad rows of `input_ids`, `labels` and `task_ids` to one batch [B, T]."""
    longest = max(len(row["input_ids"]) for row in encoded)
    filled = {
        "input_ids": [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in encoded],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in encoded],
        "labels": [row["labels"] + [-100] * (longest - len(row["labels"])) for row in encoded],
        "task_ids": [row["task_ids"] for row in encoded],
    }
    return {name: torch.tensor(values) for name, values in filled.items()}


def dataset(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int] | int]]:
    """Return all rows, encoded."""
    encoded = []
    for source, target, task in rows():
        input_ids, labels = encode(tokenizer, source, target)
        encoded.append({"input_ids": input_ids, "labels": labels, "task_ids": task})
    return encoded
