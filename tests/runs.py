"""Small runs of every kind: task files of a user's own, recipes, and the engine that the worker builds from one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hyperscale.config.run import Recipe
from hyperscale.data.corpus import Corpus, load_corpus
from hyperscale.data.loader import Share, TrainLoader
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import Collective, SingleProcess, TorchCollective
from hyperscale.model.backbone import open_backbone
from hyperscale.run.worker import build_engine

CPU = torch.device("cpu")
TASKS = ("feeling", "past", "plural")
_ADJECTIVES = {"good": ("lovely", "great", "wonderful", "happy"), "bad": ("thin", "dead", "worst", "scratched")}
_NOUNS = (
    *("plot", "camera", "film", "screen", "music", "table", "day", "mill", "battery", "actor", "flower", "moon"),
    *("village", "door", "headphone", "cable", "ticket", "prize", "coast", "wind"),
)
_VERBS = (
    *("walk", "paint", "return", "call", "claim", "sound", "stay", "disappoint", "expect", "remember", "scratch"),
    *("start", "rain", "question", "answer", "plant", "cook", "talk", "open", "help"),
)


def write_tasks(folder: Path) -> list[str]:
    """Write one classification and two tasks of free text, each a JSONL file and a task file; return the latter."""
    rows = {
        "feeling": [
            {"text": f"the {noun} was {word}", "label": label}
            for noun in _NOUNS[:8]
            for label, words in _ADJECTIVES.items()
            for word in words
        ],
        "past": [{"word": verb, "form": verb + "ed"} for verb in _VERBS],
        "plural": [{"word": noun, "form": noun + "s"} for noun in (*_NOUNS, *_VERBS)],
    }
    settings = {
        "feeling": 'input: "Review: {text}\\nSentiment:"\nlabels: {good: positive, bad: negative}\n',
        "past": 'input: "Write the past tense of: {word}\\nAnswer:"\ntarget: "{form}"\nmax_new_tokens: 3\n',
        "plural": 'input: "Write the plural of: {word}\\nAnswer:"\ntarget: "{form}"\nmax_new_tokens: 4\n',
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.yaml").write_text(f"source: {name}.jsonl\n{settings[name]}")
    return [str(folder / f"{name}.yaml") for name in TASKS]


def make_recipe(path: Path, tasks: list[str], output: Path, **changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe of 5 steps of 8 rows on the backbone at `path`, in fp32; `changes`: fields of its sections."""
    sections: dict[str, dict[str, Any]] = {
        "backbone": {"name": str(path), "dtype": "float32"},
        "adaptation": {
            "adapters": [
                {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q", "v"]},
                {"kind": "bottleneck", "reduction": 4},
            ]
        },
        "data": {"tasks": tasks, "validation_limit": 6},
        "training": {
            "steps": 5,
            "batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"warmup_steps": 1, "learning_rate": 1e-3},
            "evaluate_untouched": False,
        },
        "engine": {"kind": "local"},
        "cluster": {"workers": 1},
        "tracking": {"mlflow": {"enabled": False}, "progress": {"enabled": False}},
    }
    for section, fields in changes.items():
        sections[section] = sections.get(section, {}) | dict(fields)
    return Recipe.model_validate({"name": "small", "output": str(output), **sections})


def corpus_of(recipe: Recipe) -> Corpus:
    """Read and encode a recipe's tasks."""
    folder = open_backbone(recipe.backbone)
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    return load_corpus(recipe.data, tokenizer, folder.architecture.is_encoder_decoder)


def loader_of(recipe: Recipe, corpus: Corpus, rank: int, world_size: int) -> TrainLoader:
    """Return one rank's loader."""
    return TrainLoader(
        [loaded.train.encoded for loaded in corpus.tasks],
        recipe.data,
        recipe.training.batch_size,
        recipe.training.micro_batch_size,
        recipe.seed,
        Share(rank, world_size, corpus.layout),
    )


def engine_of(recipe: Recipe) -> Engine:
    """Build a recipe's engine on this rank of the process group, or on the only one."""
    folder, num_tasks = open_backbone(recipe.backbone), len(recipe.data.tasks)
    collective: Collective = TorchCollective(CPU) if recipe.cluster.workers > 1 else SingleProcess()
    return build_engine(recipe, folder, collective, CPU, num_tasks)
