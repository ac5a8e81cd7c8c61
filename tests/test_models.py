"""`hyperscale models`: what it says of each family is what the program does."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from hyperscale.cli import main
from hyperscale.config.adaptation import ADAPTER_SETTINGS, LoraSettings
from hyperscale.errors import ConfigError
from hyperscale.export.peft_format import peft_limitation, vllm_limitation
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.sites import find_sites
from hyperscale.run.models import family_support, list_families
from tests import test_moe, test_multimodal_checkpoints, tiny

SIZES = {
    "vocab_size": 50,
    "num_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "pad_token_id": 0,
}


def empty(model_type: str) -> nn.Module:
    """Build a small model without weights, under the settings that tests/tiny.py gives its family."""
    config = CONFIG_MAPPING[model_type](**{**SIZES, **tiny.FAMILIES.get(model_type, {})})
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, ARCHITECTURES[model_type].model_class)(config)
    return model


def test_every_family_is_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(ARCHITECTURES)]] == list(ARCHITECTURES)
    assert main(["models", "--json"]) == 0
    families = {family["model_type"]: family for family in json.loads(capsys.readouterr().out)}
    assert list(families) == list(ARCHITECTURES)
    assert families["llama"]["tested_with"] == ["smollm2-135m-instruct", "random weights"]
    assert families["t5"]["tested_with"] == ["random weights"]
    assert families["llama"]["adapters"]["lora"]["vllm"] is None
    reason = "lora adapters of an encoder-decoder: vLLM serves decoder-only families"
    assert families["t5"]["adapters"]["lora"]["vllm"] == reason
    assert all(family["adapters"].keys() == set(ADAPTER_SETTINGS) for family in families.values())


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_a_family_supports_what_its_line_says(model_type: str):
    backbone, architecture = empty(model_type), ARCHITECTURES[model_type]
    (family,) = [family for family in list_families() if family.model_type == model_type]
    for name, support in family.adapters.items():
        kinds = build_kinds([ADAPTER_SETTINGS[name].model_validate({"kind": name})])
        if support.lacks:
            with pytest.raises(ConfigError, match=f"{name} target '{support.lacks[0]}' cannot be used"):
                find_sites(backbone, architecture, kinds)
            continue
        site_map = find_sites(backbone, architecture, kinds)
        assert set(site_map.targets_of(name)) <= {*support.targets, "final"}
        assert peft_limitation(site_map, architecture) == support.peft
        assert vllm_limitation(site_map, architecture) == support.vllm


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_lora_is_for_every_linear_layer_of_the_blocks(model_type: str):
    """By the one word `all`, its default: fused and cross-attention projections too, but not what a row leaves out."""
    backbone, architecture = empty(model_type), ARCHITECTURES[model_type]
    linear = {
        f"{stack.blocks}.{number}.{path}"
        for stack in architecture.stacks
        for number, block in enumerate(backbone.get_submodule(stack.blocks).children())
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and path not in stack.untouched
    }
    kinds = build_kinds([LoraSettings()])
    assert kinds[0].targets == ("all",)
    assert {site.name for site in find_sites(backbone, architecture, kinds).sites} == linear


def test_random_weights_stand_for_a_model_that_the_tests_build():
    """Each family is in one of the tests' lists of tiny models, or has a builder of its own."""
    text_models = {text["model_type"] for _, _, text, _ in test_multimodal_checkpoints.WHOLES.values()}
    assert set(ARCHITECTURES) <= {"llama", "t5", *tiny.FAMILIES, *test_moe.FAMILIES, *text_models}


def test_a_row_that_lacks_a_default_target_says_so():
    fused: dict[str, Any] = {"projections": {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"}}
    llama = ARCHITECTURES["llama"]
    support = family_support(replace(llama, stacks=(replace(llama.stacks[0], **fused),)))
    assert (support.adapters["ia3"].targets, support.adapters["ia3"].lacks) == (("feed_forward",), ("k", "v"))
    assert support.projections == ("qkv", "o")
