"""Adapter kinds by the name their settings carry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperscale.config.adaptation import AdapterSettings
from hyperscale.model.adapters.bottleneck import Bottleneck
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.adapters.lora import Lora

ADAPTER_KINDS: Mapping[str, Callable[[Any], AdapterKind]] = {"lora": Lora, "bottleneck": Bottleneck}


def build_kinds(settings: Sequence[AdapterSettings]) -> tuple[AdapterKind, ...]:
    """Make the adapter kinds of a recipe, in the order in which they act where they meet: LoRA, inside, first."""
    order = list(ADAPTER_KINDS)
    return tuple(ADAPTER_KINDS[one.kind](one) for one in sorted(settings, key=lambda one: order.index(one.kind)))
