"""Adapters as PEFT writes them: LoRA in the profile that every server reads, (IA)³, and prefixes of some families.

LoRA: one rank, lora_alpha = r with the scale folded into B, every layer present, no bias, no modules_to_save, leaf-name
targets. An rsLoRA scale is folded in too, as SGLang ignores `use_rslora` (github.com/sgl-project/sglang/issues/40835).
One PEFT folder is one method: kinds that act together have no type there.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.config.adaptation import AdapterSettings, VeraSettings
from hyperscale.config.extensions import peft_method_of
from hyperscale.errors import BundleError
from hyperscale.model.adapters.ia3 import INNER
from hyperscale.model.adapters.vera import Vera
from hyperscale.model.architectures import Architecture, Stack
from hyperscale.model.sites import Site, SiteMap
from hyperscale.model.weights import Weights

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = "prompt_embeddings"


class PeftMethod(NamedTuple):
    """The PEFT form of one kind: its part of the configuration, its tensors, and how to read them back."""

    config: Callable[[Weights, SiteMap, Architecture], Mapping[str, Any]]
    tensors: Callable[[Weights, SiteMap], Mapping[str, Tensor]]
    read: Callable[[Mapping[str, Tensor], SiteMap], Mapping[str, Mapping[str, Tensor]]]


def peft_limitation(site_map: SiteMap, architecture: Architecture) -> str | None:
    """Return the part of a map that PEFT cannot express, or None if a PEFT folder can hold all of it."""
    kinds = list(dict.fromkeys(site.kind for site in site_map.sites))
    others = sorted(kind for kind in kinds if not _has_method(kind))
    if others:
        return f"{', '.join(others)} adapters: PEFT has no such type"
    if len(kinds) > 1:
        return f"{' and '.join(kinds)} adapters together: one PEFT folder is one method"
    if kinds == ["ia3"] and len({site.name for site in site_map.sites}) < len(site_map.sites):
        return "ia3 adapters on both sides of one layer: PEFT has one vector for each"
    if kinds == ["prefix"] and architecture.is_part:
        return "prefix adapters of a multimodal checkpoint: PEFT takes the heads and layers from its own configuration"
    if kinds == ["prefix"] and architecture.is_encoder_decoder:
        return "prefix adapters of an encoder-decoder: PEFT gives its layers each other's prefixes"
    if kinds == ["prefix"] and architecture.may_slide:
        return "prefix adapters of a family with sliding windows: in PEFT a window moves past the prefix"
    return None


def vllm_limitation(site_map: SiteMap, architecture: Architecture) -> str | None:
    """Return why vLLM cannot serve the bundles of a map, or None if it can: LoRA on a decoder-only family."""
    kinds = list(dict.fromkeys(site.kind for site in site_map.sites))
    if kinds != ["lora"]:
        return f"{' and '.join(kinds)} adapters: vLLM loads LoRA only"
    if architecture.is_encoder_decoder:
        return "lora adapters of an encoder-decoder: vLLM serves decoder-only families"
    return None


def require_peft_support(site_map: SiteMap, architecture: Architecture) -> None:
    """Raise `BundleError`, naming what PEFT cannot express, unless a PEFT folder can hold all of a map."""
    reason = peft_limitation(site_map, architecture)
    if reason:
        raise BundleError(
            f"export.format 'peft' cannot express {reason}. "
            "Use export.format=native (read by 'hyperscale predict'), or train with one kind that PEFT knows"
        )


def write_peft(
    folder: Path,
    weights: Weights,
    site_map: SiteMap,
    architecture: Architecture,
    base: str,
    dtype: torch.dtype,
    adapters: Sequence[AdapterSettings],
    revision: str | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the one task in `weights` (K = 1).

    `adapters`: the settings that they were trained with. `base` and `revision`: the folder or hub id of the base model,
    and which commit, tag or branch of it.
    """
    require_peft_support(site_map, architecture)
    method = _method(site_map, adapters)
    config = {
        "task_type": "SEQ_2_SEQ_LM" if architecture.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **method.config(weights, site_map, architecture),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in method.tensors(weights, site_map).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def read_peft(
    folder: Path, site_map: SiteMap, adapters: Sequence[AdapterSettings]
) -> Mapping[str, Mapping[str, Tensor]]:
    """Read back weights [1, S, …] of every group."""
    return _method(site_map, adapters).read(load_file(folder / TENSORS), site_map)


def target_modules(site_map: SiteMap, architecture: Architecture) -> list[str] | str:
    """Return leaf names where they match only the sites' layers, else a regular expression of full names.

    T5's self- and cross-attention share leaf names: adapting q of one only needs the expression. So does the text model
    of a multimodal checkpoint, whose vision tower has layers of the same leaf names.
    """
    names = {site.name for site in site_map.sites}
    if architecture.is_part:
        return "|".join(_pattern(stack, names) for stack in architecture.stacks)
    leaves = sorted({_leaf(name) for name in names})
    for stack in architecture.stacks:
        for path in stack.projections.values():
            is_site = any(_is_at(name, stack.blocks, path) for name in names)
            if _leaf(path) in leaves and not is_site and _shares_module(path, stack.blocks, names):
                return "|".join(re.escape(name) for name in sorted(names))
    return leaves


def _pattern(stack: Stack, names: set[str]) -> str:
    """Return a regular expression of the full names of a stack's sites in all blocks."""
    blocks = f"{re.escape(stack.blocks)}[.][0-9]+[.]"
    paths = sorted({re.sub(f"^{blocks}", "", name) for name in names if name.startswith(f"{stack.blocks}.")})
    return f"{blocks}({'|'.join(map(re.escape, paths))})"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_at(name: str, blocks: str, path: str) -> bool:
    return name.startswith(f"{blocks}.") and name.endswith(f".{path}")


def _shares_module(path: str, blocks: str, names: set[str]) -> bool:
    """Return whether a site elsewhere ends in the same leaf, so that the leaf name would adapt `path` too."""
    return any(_leaf(name) == _leaf(path) and not _is_at(name, blocks, path) for name in names)


def _lora_config(weights: Weights, site_map: SiteMap, architecture: Architecture) -> Mapping[str, Any]:
    rank = weights[site_map.sites[0].group]["a"].shape[-2]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(site_map, architecture),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _lora_tensors(weights: Weights, site_map: SiteMap) -> Mapping[str, Tensor]:
    return {
        f"{_PREFIX}{site.name}.lora_{letter}.weight": weights[group][letter.lower()][0, index]
        for group, index, site in _indexed(site_map)
        for letter in "AB"
    }


def _read_lora(tensors: Mapping[str, Tensor], site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    return {
        group: {
            letter.lower(): _stacked(tensors[f"{_PREFIX}{site.name}.lora_{letter}.weight"] for site in sites)
            for letter in "AB"
        }
        for group, sites in site_map.groups.items()
    }


def _ia3_config(_weights: Weights, site_map: SiteMap, architecture: Architecture) -> Mapping[str, Any]:
    return {
        "peft_type": "IA3",
        "target_modules": target_modules(site_map, architecture),
        "feedforward_modules": sorted({_leaf(site.name) for site in site_map.sites if site.position == INNER}),
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _ia3_tensors(weights: Weights, site_map: SiteMap) -> Mapping[str, Tensor]:
    """PEFT keeps 1 + δ: a row where inputs are scaled, a column where outputs are."""
    return {
        f"{_PREFIX}{site.name}.ia3_l": (1 + weights[group]["delta"][0, index]).unsqueeze(
            0 if site.position == INNER else 1
        )
        for group, index, site in _indexed(site_map)
    }


def _read_ia3(tensors: Mapping[str, Tensor], site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    return {
        group: {"delta": _stacked(tensors[f"{_PREFIX}{site.name}.ia3_l"].float().flatten() - 1 for site in sites)}
        for group, sites in site_map.groups.items()
    }


def _prefix_config(weights: Weights, site_map: SiteMap, _architecture: Architecture) -> Mapping[str, Any]:
    """Heads, widths and layers are left to PEFT, which takes them from the base model, grouped queries included."""
    length = weights[site_map.sites[0].group]["rows"].shape[-2]
    return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "prefix_projection": False}


def _prefix_tensors(weights: Weights, site_map: SiteMap) -> Mapping[str, Tensor]:
    """PEFT keeps one row per position: keys and values of the first layer, of the second, and so on."""
    return {_ROWS: torch.cat([weights[group]["rows"][0, index] for group, index, _ in _indexed(site_map)], dim=1)}


def _read_prefix(tensors: Mapping[str, Tensor], site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    widths = [site.out_features for site in site_map.sites]
    rows = dict(zip(site_map.sites, tensors[_ROWS].split(widths, dim=1), strict=True))
    return {group: {"rows": _stacked(rows[site] for site in sites)} for group, sites in site_map.groups.items()}


def _vera_method(settings: VeraSettings) -> PeftMethod:
    """A and B are in the file too, so that no other program has to draw them again."""

    def config(_weights: Weights, site_map: SiteMap, architecture: Architecture) -> Mapping[str, Any]:
        return {
            "peft_type": "VERA",
            "r": settings.rank,
            "target_modules": target_modules(site_map, architecture),
            "projection_prng_key": settings.projection_seed,
            "save_projection": True,
            "vera_dropout": 0.0,
            "d_initial": settings.d_initial,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
        }

    def tensors(weights: Weights, site_map: SiteMap) -> Mapping[str, Tensor]:
        constants = Vera(settings).constants([site.sizes for site in site_map.sites])
        vectors = {
            f"{_PREFIX}{site.name}.vera_lambda_{letter}": weights[group][letter][0, index] + offset
            for group, index, site in _indexed(site_map)
            for letter, offset in (("d", settings.d_initial), ("b", 0.0))
        }
        return {**vectors, "base_model.vera_A": constants["shared_a"], "base_model.vera_B": constants["shared_b"]}

    def read(tensors: Mapping[str, Tensor], site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
        drawn = Vera(settings).constants([site.sizes for site in site_map.sites])
        for letter in "ab":
            stored = tensors[f"base_model.vera_{letter.upper()}"]
            if not torch.equal(stored, drawn[f"shared_{letter}"].to(stored.dtype)):
                raise BundleError("this PyTorch draws other VeRA matrices than the bundle has; load it with PEFT")
        return {
            group: {
                letter: _stacked(
                    tensors[f"{_PREFIX}{site.name}.vera_lambda_{letter}"].float() - offset for site in sites
                )
                for letter, offset in (("d", settings.d_initial), ("b", 0.0))
            }
            for group, sites in site_map.groups.items()
        }

    return PeftMethod(config, tensors, read)


_LORA = PeftMethod(_lora_config, _lora_tensors, _read_lora)
_IA3 = PeftMethod(_ia3_config, _ia3_tensors, _read_ia3)
_PREFIXES = PeftMethod(_prefix_config, _prefix_tensors, _read_prefix)
PEFT_METHODS: Mapping[str, Callable[[Any], PeftMethod]] = {
    "lora": lambda _settings: _LORA,
    "vera": _vera_method,
    "ia3": lambda _settings: _IA3,
    "prefix": lambda _settings: _PREFIXES,
}
"""Kind -> how adapters of these settings are written."""


def _has_method(kind: str) -> bool:
    return kind in PEFT_METHODS or peft_method_of(kind) is not None


def _method(site_map: SiteMap, adapters: Sequence[AdapterSettings]) -> PeftMethod:
    """Return how the one kind of a map is written, after `require_peft_support`."""
    kind = site_map.sites[0].kind
    if kind in PEFT_METHODS:
        return PEFT_METHODS[kind](next(one for one in adapters if one.kind == kind))
    method = peft_method_of(kind)
    if method is None:
        raise BundleError(f"{kind} adapters have no PEFT form in this installation")
    return cast(PeftMethod, method)


def _indexed(site_map: SiteMap) -> Sequence[tuple[str, int, Site]]:
    """List every site in map order, with its group and its position in the group."""
    places = {site: (group, index) for group, sites in site_map.groups.items() for index, site in enumerate(sites)}
    return [(*places[site], site) for site in site_map.sites]


def _stacked(tensors: Any) -> Tensor:
    """Return [1, S, …] of the tensors of S sites."""
    return torch.stack(list(tensors)).unsqueeze(0)
