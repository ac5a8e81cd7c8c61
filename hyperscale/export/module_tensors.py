"""Generated weights by the backbone's module paths, under the names that users of PEFT know."""

from collections.abc import Mapping

from torch import Tensor

from hyperscale.model.adapters.ia3 import INNER
from hyperscale.model.sites import Site, SiteMap
from hyperscale.model.weights import Weights

ModuleTensors = dict[str, dict[str, Tensor]]
"""Module path -> tensor name -> tensor."""

_LORA = {"a": "lora_A", "b": "lora_B"}


def tensors_by_module(weights: Weights, site_map: SiteMap) -> ModuleTensors:
    """Return copies of the one task in `weights` (K = 1), in site-map order.

    LoRA tensors are `lora_A` [rank, in] and `lora_B` [out, rank], PEFT's names and shapes; the scale alpha / rank is
    part of `lora_B`. A prefix is `prefix_keys` and `prefix_values`, both [length, width]. Every other kind names its
    tensors `<kind>_<name>`: `bottleneck_down`, `ia3_delta`, `norm_delta`. What (IA)³ scales before the last projection
    of a feed-forward is `ia3_delta_input`.
    """
    by_module: ModuleTensors = {}
    places = {site: (group, index) for group, sites in site_map.groups.items() for index, site in enumerate(sites)}
    for site in site_map.sites:
        group, index = places[site]
        named = by_module.setdefault(site.name, {})
        for name, tensor in weights[group].items():
            named[_public_name(site, name, named)] = tensor[0, index].detach().clone()
    return by_module


def _public_name(site: Site, name: str, tensors: Mapping[str, Tensor]) -> str:
    if site.kind == "lora":
        return _LORA[name]
    if site.kind == "prefix":
        return f"prefix_{site.position}"
    if site.kind == "norm_delta":
        return "norm_delta"
    public = f"{site.kind}_{name}"
    if site.kind == "ia3" and site.position == INNER:
        return f"{public}_input"
    return f"{public}_{site.position}" if public in tensors else public
