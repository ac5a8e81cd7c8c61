"""Recipes for published models: planned from shapes alone, and bundles that vLLM takes."""

from pathlib import Path

import pytest

from hyperscale.config.loading import load_recipe
from hyperscale.config.run import Recipe
from hyperscale.export.peft_format import peft_limitation, vllm_limitation
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import architecture_of
from hyperscale.model.backbone import open_shapes
from hyperscale.model.sites import table_sites
from hyperscale.run.plan import PlanOptions, plan_recipe
from tests.published_shapes import PARAMETERS, write_config

NAMES = ("qwen3_8b", "llama3_8b", "gemma2_2b", "mistral_7b", "t2l_mistral")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts; its default is 16."""
PLANS = [(name, gpus) for name in NAMES for gpus in (1, 2, 8)]
QUICK = {("gemma2_2b", 1), ("gemma2_2b", 2), ("qwen3_8b", 8)}
"""The others take 3 seconds each too."""
EVERY_PLAN = [each if each in QUICK else pytest.param(*each, marks=pytest.mark.long) for each in PLANS]


def on_shapes(name: str, folder: Path) -> Recipe:
    """Load a recipe, its backbone replaced by the published config.json alone."""
    recipe = load_recipe(name)
    backbone = recipe.backbone.model_copy(update={"name": str(write_config(recipe.backbone.name, folder))})
    return recipe.model_copy(update={"backbone": backbone})


@pytest.mark.parametrize(("name", "gpus"), EVERY_PLAN)
def test_it_is_planned_for_80_gib(name: str, gpus: int, tmp_path: Path):
    recipe = on_shapes(name, tmp_path)
    plan = plan_recipe(recipe, PlanOptions(gpus, 1, 80 * 2**30, 300.0, 300.0))
    assert plan.backbone_parameters == PARAMETERS[load_recipe(name).backbone.name]
    assert plan.machine.ranks == gpus
    assert plan.fits
    assert plan.largest_micro_batch >= recipe.training.micro_batch_size
    assert plan.pace.tokens_per_second > 0
    shard = 2 * plan.backbone_parameters / gpus
    assert shard < plan.memory.total < shard + 30 * 2**30
    assert recipe.training.batch_size % (gpus * recipe.training.micro_batch_size) == 0


@pytest.mark.parametrize("name", NAMES)
def test_vllm_takes_its_bundles(name: str, tmp_path: Path):
    recipe = on_shapes(name, tmp_path)
    (adapter,) = recipe.adaptation.adapters
    row = open_shapes(recipe.backbone).architecture
    assert row == architecture_of(row.model_type)
    site_map = table_sites(row, build_kinds([adapter]))
    assert peft_limitation(site_map, row) is None
    assert vllm_limitation(site_map, row) is None
    assert adapter.rank in VLLM_RANKS
    assert adapter.rank <= 16
    assert recipe.export.format == "peft"


def test_text_to_lora_trains_as_many_parameters_as_its_heads_have(tmp_path: Path):
    """Two heads of 512 inputs, for A and B of q (4096 to 4096) and of v (4096 to 1024), and what makes their input."""
    plan = plan_recipe(on_shapes("t2l_mistral", tmp_path), PlanOptions(8, 1, 80 * 2**30, None, None))
    outputs = 8 * (4096 + 4096) + 8 * (4096 + 1024)
    heads = outputs * 512 + outputs
    assert heads < plan.trained_parameters < 1.02 * heads
