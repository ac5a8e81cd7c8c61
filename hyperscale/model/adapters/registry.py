"""Adapter kinds by the `kind` of their settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperscale.config.adaptation import AdapterSettings
from hyperscale.config.extensions import adapter_implementation
from hyperscale.errors import PluginError
from hyperscale.model.adapters.bottleneck import Bottleneck
from hyperscale.model.adapters.ia3 import Ia3
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.adapters.lora import Lora
from hyperscale.model.adapters.norm_delta import NormDelta
from hyperscale.model.adapters.prefix import Prefix
from hyperscale.model.adapters.vera import Vera

ADAPTER_KINDS: Mapping[str, Callable[[Any], AdapterKind]] = {
    "lora": Lora,
    "vera": Vera,
    "ia3": Ia3,
    "bottleneck": Bottleneck,
    "norm_delta": NormDelta,
    "prefix": Prefix,
}


def build_kinds(settings: Sequence[AdapterSettings]) -> tuple[AdapterKind, ...]:
    """Build the adapter kinds of a recipe, in the order in which they act at a shared layer.

    LoRA and VeRA come first because they change the projection itself. Then come the kinds that scale the output, then
    those that follow it. Registered kinds come last, sorted by name, so the order does not depend on what is installed.

    Raises:
        PluginError: a kind of a plug-in that cannot be imported, or that acts inside the attention.
    """
    order = list(ADAPTER_KINDS)
    packaged = sorted((one for one in settings if one.kind in order), key=lambda one: order.index(one.kind))
    others = sorted((one for one in settings if one.kind not in order), key=lambda one: one.kind)
    return (*(ADAPTER_KINDS[one.kind](one) for one in packaged), *map(_build_registered, others))


def _build_registered(settings: AdapterSettings) -> AdapterKind:
    kind: AdapterKind = adapter_implementation(settings.kind)(settings)
    inside = [target for target in kind.targets if kind.acts_on(target) in ("keys", "values")]
    if inside:
        raise PluginError(
            f"adapter kind '{settings.kind}' acts on {kind.acts_on(inside[0])}, where only the package's own prefix "
            "can; a registered kind acts on projections, sublayers, inputs and norms"
        )
    return kind
