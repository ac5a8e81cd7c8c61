"""Adapter kinds by the name their settings carry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperscale.config.adaptation import AdapterSettings
from hyperscale.model.adapters.bottleneck import Bottleneck
from hyperscale.model.adapters.ia3 import Ia3
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.adapters.lora import Lora
from hyperscale.model.adapters.norm_delta import NormDelta
from hyperscale.model.adapters.prefix import Prefix

ADAPTER_KINDS: Mapping[str, Callable[[Any], AdapterKind]] = {
    "lora": Lora,
    "ia3": Ia3,
    "bottleneck": Bottleneck,
    "norm_delta": NormDelta,
    "prefix": Prefix,
}


def build_kinds(settings: Sequence[AdapterSettings]) -> tuple[AdapterKind, ...]:
    """Make the adapter kinds of a recipe, in the order in which they act where they meet.

    LoRA, inside, comes first; then what scales the projection; then what is put after it.
    """
    order = list(ADAPTER_KINDS)
    return tuple(ADAPTER_KINDS[one.kind](one) for one in sorted(settings, key=lambda one: order.index(one.kind)))
