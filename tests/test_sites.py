"""The site map: every place of an adapter in a backbone, in order, found from the architecture table."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import hyperscale
from hyperscale.config.adaptation import (
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    NormDeltaSettings,
    PrefixSettings,
)
from hyperscale.errors import ConfigError
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import ARCHITECTURES, architecture_of
from hyperscale.model.attention import cache_argument
from hyperscale.model.sites import SiteMap, find_sites

LLAMA, T5 = ARCHITECTURES["llama"], ARCHITECTURES["t5"]


def llama() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )


def t5(feed_forward: str = "gated-gelu") -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_heads": 4}
    with torch.device("meta"):
        return T5ForConditionalGeneration(
            T5Config(num_layers=1, num_decoder_layers=2, feed_forward_proj=feed_forward, **sizes)
        )


def kinds(*targets: str, sublayers: Sequence[str] = ()) -> Sequence[AdapterKind]:
    settings = [LoraSettings(targets=targets)] if targets else []
    bottleneck = [BottleneckSettings.model_validate({"targets": list(sublayers)})] if sublayers else []
    return build_kinds([*settings, *bottleneck])


def test_llama():
    site_map = find_sites(llama(), LLAMA, kinds("q", "v", "down", sublayers=("attention", "feed_forward")))
    assert [(site.name, site.position, site.kind, site.in_features, site.out_features) for site in site_map.sites] == [
        (f"model.layers.{layer}.{name}", position, kind, width_in, width_out)
        for layer in (0, 1)
        for name, position, kind, width_in, width_out in (
            ("self_attn.q_proj", "q", "lora", 32, 32),
            ("self_attn.v_proj", "v", "lora", 32, 16),  # grouped queries
            ("mlp.down_proj", "down", "lora", 48, 32),
            ("self_attn.o_proj", "attention", "bottleneck", 32, 32),
            ("mlp.down_proj", "feed_forward", "bottleneck", 48, 32),
        )
    ]
    assert [site.layer for site in site_map.sites] == [0] * 5 + [1] * 5
    assert site_map.stacks == ("decoder",)
    assert site_map.positions == ("lora:q", "lora:v", "lora:down", "bottleneck:attention", "bottleneck:feed_forward")
    assert {group: [site.name for site in sites] for group, sites in site_map.groups.items()} == {
        "decoder/lora/32x32": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "decoder/lora/32x16": ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"],
        "decoder/lora/48x32": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
        "decoder/bottleneck/32x32": ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"],
        "decoder/bottleneck/48x32": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    }


def test_t5():
    site_map = find_sites(t5(), T5, kinds("q", "cross_v", "wi_1", sublayers=("attention", "feed_forward")))
    assert [site.name for site in site_map.sites] == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
        "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1.DenseReluDense.wo",
        *(
            f"decoder.block.{layer}.{name}"
            for layer in (0, 1)
            for name in (
                "layer.0.SelfAttention.q",
                "layer.1.EncDecAttention.v",
                "layer.2.DenseReluDense.wi_1",
                "layer.0.SelfAttention.o",
                "layer.2.DenseReluDense.wo",
            )
        ),
    ]
    assert site_map.stacks == ("encoder", "decoder")
    groups = {site.group for site in site_map.sites if site.position == "q"}
    assert groups == {"encoder/lora/32x16", "decoder/lora/32x16"}


@pytest.mark.parametrize("model", [llama(), t5("relu"), t5("gated-gelu")], ids=["llama", "t5", "t5 gated"])
def test_one_word_for_every_linear_layer_of_the_blocks(model: nn.Module):
    architecture = ARCHITECTURES[model.config.model_type]
    settings = [LoraSettings.model_validate({"targets": "all"}), Ia3Settings.model_validate({"targets": ["all", "k"]})]
    site_map = find_sites(model, architecture, build_kinds(settings))
    blocks = [
        f"{stack.blocks}.{number}.{name}"
        for stack in architecture.stacks
        for number, block in enumerate(model.get_submodule(stack.blocks).children())
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for kind in ("lora", "ia3"):
        assert sorted(site.name for site in site_map.sites if site.kind == kind) == sorted(blocks)
    assert not any("head" in name or "embed" in name for name in blocks)


def test_one_word_is_the_list_that_it_stands_for():
    every = build_kinds([LoraSettings.model_validate({"targets": "all"})])
    listed = kinds("q", "k", "v", "o", "gate", "up", "down")
    assert find_sites(llama(), LLAMA, every) == find_sites(llama(), LLAMA, listed)
    of_t5 = find_sites(t5("relu"), T5, every).targets_of("lora")
    assert of_t5 == ("q", "k", "v", "o", "wi", "wo", "cross_q", "cross_k", "cross_v", "cross_o")


def test_scales_norms_and_prefixes():
    settings = [Ia3Settings(), NormDeltaSettings(), PrefixSettings()]
    site_map = find_sites(llama(), LLAMA, build_kinds(settings))
    assert [(site.name, site.position, site.in_features, site.out_features) for site in site_map.sites] == [
        *(
            (f"model.layers.{layer}.{name}", position, *sizes)
            for layer in (0, 1)
            for name, position, *sizes in (
                ("self_attn.k_proj", "k", 32, 16),
                ("self_attn.v_proj", "v", 32, 16),
                ("mlp.down_proj", "feed_forward", 48, 48),  # what goes into it
                ("input_layernorm", "attention", 32, 32),
                ("post_attention_layernorm", "feed_forward", 32, 32),
                ("self_attn", "keys", 32, 16),
                ("self_attn", "values", 32, 16),
            )
        ),
        ("model.norm", "final", 32, 32),
    ]
    assert site_map.sites[-1].layer == 2
    assert [site.kind for site in site_map.where(lambda site: site.layer == 2).sites] == ["norm_delta"]

    site_map = find_sites(t5(), T5, build_kinds(settings))
    assert [site.name for site in site_map.sites if site.kind == "norm_delta"] == [
        "encoder.block.0.layer.0.layer_norm",
        "encoder.block.0.layer.1.layer_norm",
        "encoder.final_layer_norm",
        *(f"decoder.block.{layer}.layer.{place}.layer_norm" for layer in (0, 1) for place in (0, 1, 2)),
        "decoder.final_layer_norm",
    ]
    assert [site.name for site in site_map.sites if site.position == "keys"] == [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.1.layer.0.SelfAttention",
    ]
    assert {site.group for site in site_map.sites if site.kind == "ia3"} == {
        f"{stack}/ia3/{sizes}" for stack in ("encoder", "decoder") for sizes in ("32x16", "48x48")
    }


def test_a_map_survives_json():
    site_map = find_sites(t5(), T5, kinds("q", sublayers=("attention",)))
    again = SiteMap.from_json(json.loads(json.dumps(site_map.to_json())))
    assert again == site_map
    assert list(again.groups) == list(site_map.groups)


@pytest.mark.parametrize(
    ("target", "feed_forward", "reason"),
    [
        ("qq", "relu", r"known: q, k, v, o, wi, wi_0, wi_1, wo, cross_q, cross_k, cross_v, cross_o"),
        ("gate", "relu", "known: .*"),
        ("wi_0", "relu", "this backbone has no such layer"),
        ("wi", "gated-gelu", "this backbone has no such layer"),
    ],
)
def test_an_unknown_target_is_an_error(target: str, feed_forward: str, reason: str):
    expected = rf"^adaptation\.adapters: lora target '{target}' cannot be used on a t5 backbone \({reason}\)"
    with pytest.raises(ConfigError, match=expected) as caught:
        find_sites(t5(feed_forward), T5, kinds("q", target))
    assert "\n" not in str(caught.value)


def test_a_misspelt_target_gets_its_name():
    with pytest.raises(ConfigError, match=r"Did you mean 'cross_q'\?"):
        find_sites(t5(), T5, kinds("q", "corss_q"))


def test_a_target_that_the_family_knows_is_not_suggested_for_itself():
    with pytest.raises(ConfigError, match=r"'wi_0' .*\(this backbone has no such layer\)\.$"):
        find_sites(t5("relu"), T5, kinds("q", "wi_0"))


@pytest.mark.parametrize("model", [llama(), t5("relu"), t5("gated-gelu")], ids=["llama", "t5", "t5 gated"])
def test_the_table_describes_the_models(model: nn.Module):
    architecture = ARCHITECTURES[model.config.model_type]
    assert type(model) is getattr(transformers, architecture.model_class)
    assert architecture.is_encoder_decoder is model.config.is_encoder_decoder
    for stack in architecture.stacks:
        for block in model.get_submodule(stack.blocks).children():
            assert type(block).__name__ == architecture.block_class
            linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            absent = {"wi", "wi_0", "wi_1"}  # a T5 has one or the other two
            assert linear <= set(stack.projections.values())
            assert {name.rpartition(".")[2] for name in set(stack.projections.values()) - linear} <= absent
            assert set(stack.sublayers.values()) <= linear
            norms = {name for name, module in block.named_modules() if hasattr(module, "variance_epsilon")}
            assert norms == set(stack.norms.values())
            attention = block.get_submodule(stack.attention)
            called = inspect.signature(attention.forward).parameters
            assert {architecture.mask_argument, cache_argument(attention), "hidden_states"} <= called.keys()
        assert hasattr(model.get_submodule(stack.final_norm), "variance_epsilon")
    rotary = [name for name, module in model.named_modules() if "Rotary" in type(module).__name__]
    assert rotary == [architecture.rotary] if architecture.rotary else rotary == []


def test_no_other_file_names_a_layer():
    package = Path(hyperscale.__file__).parent
    stacks = [stack for architecture in map(architecture_of, ARCHITECTURES) for stack in architecture.stacks]
    parts = {part for stack in stacks for path in stack.projections.values() for part in path.split(".")}
    words = {part for part in parts if len(part) > 5} | {stack.blocks for stack in stacks}
    assert {"q_proj", "SelfAttention", "model.layers"} <= words
    named = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}(?!\w)" for word in sorted(words)))
    offenders = [path for path in package.rglob("*.py") if named.search(strip_comments(path.read_text()))]
    assert {path.parent.name for path in offenders} == {"families"}


def strip_comments(source: str) -> str:
    return re.sub(r'"""[\s\S]*?"""|#[^\n]*', "", source)
