"""Every shipped recipe loads, fits its schema, and names only what exists."""

import jsonschema
import pytest
import torch
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from hyperscale.assets.backbones import PACKAGED
from hyperscale.config.loading import dump_recipe, load_recipe, packaged_recipes, parse_recipe
from hyperscale.config.run import Recipe
from hyperscale.data.tasks import load_task
from hyperscale.engine.ds_config import complete_ds_config, read_ds_config
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.generators.generator import num_parameters
from hyperscale.model.generators.registry import build_generator
from hyperscale.model.sites import find_sites

RECIPES = packaged_recipes()


def test_the_demo_is_there() -> None:
    assert "demo" in RECIPES
    demo = load_recipe("demo")
    assert (demo.cluster.workers, demo.engine.kind, demo.cluster.gpus_per_worker) == (2, "zero", 0)
    assert demo.backbone.name in PACKAGED


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe(name: str) -> None:
    text = RECIPES[name].read_text()
    raw = yaml.safe_load(text)
    jsonschema.validate(raw, Recipe.model_json_schema())
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.output.endswith(f"/runs/{name}")
    assert parse_recipe(dump_recipe(recipe), name) == recipe
    jsonschema.validate(dump_recipe(recipe), Recipe.model_json_schema())
    assert text.startswith("# ")
    if recipe.backbone.name not in PACKAGED:
        assert "NOT TRIED" in text


@pytest.mark.parametrize("name", RECIPES)
def test_its_tasks_and_its_deepspeed_json(name: str) -> None:
    recipe = load_recipe(name)
    tasks = [load_task(task, recipe.data.task_folders) for task in recipe.data.tasks]
    names = {task.name for task in tasks}
    assert len(names) == len(tasks)
    assert [task.name for task in tasks if names.intersection(task.not_with)] == []
    assert max(task.max_new_tokens for task in tasks) <= recipe.data.max_target_tokens
    raw = read_ds_config(recipe.engine.ds_config)
    completed = complete_ds_config(raw, recipe.training, recipe.backbone, recipe.cluster.workers, block_numel=1000)
    assert completed["train_batch_size"] == recipe.training.batch_size


@pytest.mark.parametrize("kind", ["hypernetwork", "per_layer", "independent", "shared"])
def test_methods_are_compared_by_one_word(kind: str) -> None:
    for name in RECIPES:
        assert load_recipe(name, [f"adaptation.generator.kind={kind}"]).adaptation.generator.kind == kind


@pytest.mark.parametrize(
    ("name", "num_tasks", "published"),
    [
        ("hyperformer_pp_t5_base", 8, 5_211_056),
        ("hyperformer_t5_base", 8, 122_343_744),
        ("hyperloader_t5_base", 7, 6_784_368),
        ("houlsby_t5_base", 8, 8 * 4_806_144),
    ],
)
def test_a_papers_recipe_trains_as_much_as_the_paper(name: str, num_tasks: int, published: int) -> None:
    recipe = load_recipe(name)
    kinds = build_kinds(recipe.adaptation.adapters)
    config = T5Config(vocab_size=32_128, d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        site_map = find_sites(T5ForConditionalGeneration(config), ARCHITECTURES["t5"], kinds)
        generator = build_generator(recipe.adaptation, site_map, kinds, num_tasks, seed=0)
    assert num_parameters(generator) == published


def test_sst2_is_never_with_movies() -> None:
    assert "sst2" in load_task("movies").not_with
