"""The layers of a backbone as PEFT and servers name them, where it is the text model of a multimodal checkpoint.

vLLM and PEFT load the whole checkpoint, in which the text model lies deeper. vLLM maps an adapter's names with the
`hf_to_vllm_mapper` of its class. For Gemma 3 that maps `model.language_model.` alone (vllm/model_executor/models/
gemma3_mm.py). An adapter under the text model's own names is then loaded without an error and has no effect
(github.com/vllm-project/vllm/issues/48019).
"""

from dataclasses import replace

from hyperscale.model.architectures import Architecture
from hyperscale.model.families.multimodal import Multimodal
from hyperscale.model.sites import SiteMap


def served_sites(site_map: SiteMap, multimodal: Multimodal | None) -> SiteMap:
    """Return a site map under the names of the whole model; the same one where there is no other model around it."""
    if multimodal is None:
        return site_map
    return SiteMap(tuple(replace(site, name=multimodal.server_name(site.name)) for site in site_map.sites))


def served_family(architecture: Architecture, multimodal: Multimodal | None) -> Architecture:
    """Return a family's row with the paths of the whole model."""
    if multimodal is None:
        return architecture
    stacks = tuple(
        replace(
            stack,
            blocks=multimodal.server_name(stack.blocks),
            final_norm=multimodal.server_name(stack.final_norm),
        )
        for stack in architecture.stacks
    )
    return replace(architecture, stacks=stacks, is_part=True)
