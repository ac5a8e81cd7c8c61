"""Checks a recipe before any worker starts: backbone, tasks, rows, sites, DeepSpeed JSON."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoTokenizer

from hyperscale.config.run import Recipe
from hyperscale.data.corpus import load_corpus
from hyperscale.data.descriptions import encode_descriptions
from hyperscale.engine.ds_config import complete_ds_config, read_ds_config
from hyperscale.export.peft_format import require_peft_support
from hyperscale.model.backbone import build_empty, open_backbone
from hyperscale.model.build import Blueprint
from hyperscale.model.generators.generator import num_parameters
from hyperscale.model.quantized.blocks import num_weights
from hyperscale.model.task_encoders.registry import blank_features


@dataclass(frozen=True)
class Preflight:
    """The sizes that a valid recipe resolves to."""

    backbone_parameters: int
    trained_parameters: int
    sites: int
    rows: dict[str, tuple[int, int]]
    """task -> training and validation rows."""


def check_recipe(recipe: Recipe, report_phase: Callable[[str], None]) -> Preflight:
    """Open, read and build everything except weights and workers. Fetches the backbone and packaged data if needed.

    `report_phase` receives the name of each phase as it starts.

    Raises:
        HyperscaleError: the first problem, in one message.
    """
    report_phase("opening the backbone")
    folder = open_backbone(recipe.backbone)
    empty = build_empty(folder, recipe.backbone)
    blueprint = Blueprint.of_backbone(empty, folder.architecture, recipe.adaptation.adapters)
    if recipe.export.format == "peft":
        require_peft_support(blueprint.site_map, folder.architecture)
    if recipe.engine.kind == "zero":
        raw = read_ds_config(recipe.engine.ds_config)
        complete_ds_config(raw, recipe.training, recipe.backbone, recipe.cluster.workers, block_numel=1)
    report_phase("reading the tasks")
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    corpus = load_corpus(
        recipe.data,
        tokenizer,
        folder.architecture.is_encoder_decoder,
        with_test=recipe.training.evaluate_test,
    )
    if recipe.adaptation.reads_descriptions:
        encode_descriptions([loaded.task for loaded in corpus.tasks], tokenizer, corpus.layout.pad_token_id)
    features = blank_features(recipe.adaptation, len(corpus.tasks), folder.config.hidden_size)
    generator = blueprint.build_generator(recipe.adaptation, len(corpus.tasks), recipe.seed, features)
    return Preflight(
        backbone_parameters=num_weights(empty),
        trained_parameters=num_parameters(generator),
        sites=len(blueprint.site_map.sites),
        rows={loaded.task.name: (len(loaded.train.encoded), len(loaded.validation.encoded)) for loaded in corpus.tasks},
    )
