"""LoRA as PEFT writes it, in the profile that every server reads.

One rank, lora_alpha = r with the scale folded into B, every layer present, no bias, no modules_to_save, leaf-name
targets.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.errors import BundleError
from hyperscale.model.architectures import Architecture
from hyperscale.model.sites import SiteMap
from hyperscale.model.weights import Weights

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def refuse_unless_lora(site_map: SiteMap) -> None:
    """Raise `BundleError`, naming the kinds, if a map holds anything that PEFT's LoRA cannot say."""
    others = sorted({site.kind for site in site_map.sites} - {"lora"})
    if others:
        raise BundleError(
            f"export.format 'peft' cannot express {', '.join(others)} adapters: PEFT has no such type. "
            "Use export.format=native (read by 'hyperscale predict'), or train with lora adapters only"
        )


def write_peft(
    folder: Path, weights: Weights, site_map: SiteMap, architecture: Architecture, base: str, dtype: torch.dtype
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the one task in `weights` (K = 1)."""
    refuse_unless_lora(site_map)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for group, sites in site_map.groups.items():
        for index, site in enumerate(sites):
            a, b = weights[group]["a"][0, index], weights[group]["b"][0, index]
            rank = a.shape[0]
            tensors[f"{_PREFIX}{site.name}.lora_A.weight"] = a.to(dtype).contiguous()
            tensors[f"{_PREFIX}{site.name}.lora_B.weight"] = b.to(dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if architecture.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(site_map, architecture),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def target_modules(site_map: SiteMap, architecture: Architecture) -> list[str] | str:
    """Return leaf names where they mean just the sites' layers, else a regular expression of full names.

    T5's self- and cross-attention share leaf names: adapting q of one only needs the expression.
    """
    names = {site.name for site in site_map.sites}
    leaves = sorted({name.rpartition(".")[2] for name in names})
    for stack in architecture.stacks:
        for position, path in stack.projections.items():
            is_leaf = path.rpartition(".")[2] in leaves
            is_site = any(site.stack == stack.name and site.position == position for site in site_map.sites)
            if is_leaf and not is_site and _shares_module(path, stack.blocks, names):
                return "|".join(re.escape(name) for name in sorted(names))
    return leaves


def _shares_module(path: str, blocks: str, names: set[str]) -> bool:
    """Return whether a site elsewhere ends in the same leaf, so that the leaf name would adapt `path` too."""
    leaf = path.rpartition(".")[2]
    return any(
        name.endswith(f".{leaf}") and not (name.startswith(blocks) and name.endswith(f".{path}")) for name in names
    )


def read_peft(folder: Path, site_map: SiteMap) -> Mapping[str, Mapping[str, Tensor]]:
    """Read back weights [1, S, …] of every group."""
    tensors = load_file(folder / TENSORS)
    found: dict[str, dict[str, Tensor]] = {}
    for group, sites in site_map.groups.items():
        a = [tensors[f"{_PREFIX}{site.name}.lora_A.weight"] for site in sites]
        b = [tensors[f"{_PREFIX}{site.name}.lora_B.weight"] for site in sites]
        found[group] = {"a": torch.stack(a).unsqueeze(0), "b": torch.stack(b).unsqueeze(0)}
    return found
