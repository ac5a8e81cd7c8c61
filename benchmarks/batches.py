"""The samples that all sides of the step benchmark train on."""

import json

from benchmarks.shapes import Q_AND_V
from hyperscale.config.loading import load_recipe
from hyperscale.config.run import Recipe
from hyperscale.data.collate import Batch
from hyperscale.data.corpus import load_corpus
from hyperscale.data.loader import Share, TrainLoader
from hyperscale.model.backbone import open_backbone


def recipe_of(dtype: str, ranks: int, *changes: str) -> Recipe:
    """Return the demo's recipe with a dtype, as many workers as ranks, and other changes."""
    fixed = {
        "adaptation.adapters": [Q_AND_V],
        "cluster.workers": ranks,
        "backbone.dtype": dtype,
        "tracking.mlflow.enabled": False,
    }
    return load_recipe("demo", [*(f"{key}={json.dumps(value)}" for key, value in fixed.items()), *changes])


def bucket(is_bucketed: bool) -> str:
    """Return the change of the recipe that groups rows by length over eight steps, or not at all."""
    return f"data.bucket_steps={8 if is_bucketed else 1}"


def batches_of(recipe: Recipe, rank: int, steps: int) -> list[list[Batch]]:
    """Return a rank's micro-batches of the first steps."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (after a peer has configured DeepSpeed in transformers)

    folder = open_backbone(recipe.backbone)
    corpus = load_corpus(
        recipe.data, AutoTokenizer.from_pretrained(folder.path), folder.architecture.is_encoder_decoder
    )
    loader = TrainLoader(
        [loaded.train.encoded for loaded in corpus.tasks],
        recipe.data,
        recipe.training.batch_size,
        recipe.training.micro_batch_size,
        recipe.seed,
        Share(rank, recipe.cluster.workers, corpus.layout),
    )
    return [loader.next_step() for _ in range(steps)]
