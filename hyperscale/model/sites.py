"""The site map: the ordered list of places in the backbone where adapters act.

Heads take shapes from it, injection takes places, export takes names, and a checkpoint is refused when its map differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hyperscale.errors import ConfigError, nearest
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.architectures import Architecture, Stack


@dataclass(frozen=True)
class Site:
    """One adapter kind at one linear layer."""

    name: str
    """Dotted path of the layer in the backbone: `model.layers.0.self_attn.q_proj`."""
    stack: str
    layer: int
    position: str
    """What the layer is in its block (`q`, `cross_v`, `attention`, `feed_forward`)."""
    kind: str
    in_features: int
    out_features: int

    @property
    def group(self) -> str:
        """Sites of one group have weights of the same shapes and are generated as one tensor."""
        return f"{self.stack}/{self.kind}/{self.in_features}x{self.out_features}"


@dataclass(frozen=True)
class SiteMap:
    """All sites of an adapted backbone, in the order stack, layer, position."""

    sites: tuple[Site, ...]

    @property
    def groups(self) -> Mapping[str, tuple[Site, ...]]:
        """Sites by group, both in map order."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites:
            grouped.setdefault(site.group, []).append(site)
        return {key: tuple(members) for key, members in grouped.items()}

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that hold sites, in map order."""
        return tuple(dict.fromkeys(site.stack for site in self.sites))

    def num_layers(self, stack: str) -> int:
        """Return one more than the highest layer number in `stack`."""
        return 1 + max(site.layer for site in self.sites if site.stack == stack)

    @property
    def positions(self) -> tuple[str, ...]:
        """`kind:position` of every position in the map; the index is the position's id in all stacks."""
        return tuple(dict.fromkeys(f"{site.kind}:{site.position}" for site in self.sites))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the map as plain values, in order."""
        return [asdict(site) for site in self.sites]

    @staticmethod
    def from_json(rows: Sequence[Mapping[str, Any]]) -> "SiteMap":
        """Read what `to_json` wrote."""
        return SiteMap(tuple(Site(**row) for row in rows))


def find_sites(backbone: nn.Module, architecture: Architecture, kinds: Sequence[AdapterKind]) -> SiteMap:
    """List the sites of `kinds` in a backbone; parameters may be on the meta device or partitioned.

    Raises:
        ConfigError: a target is unknown to the family, or this backbone has no such layer in any block.
    """
    found: list[Site] = []
    for stack in architecture.stacks:
        blocks = backbone.get_submodule(stack.blocks)
        for layer, block in enumerate(blocks.children()):
            for kind in kinds:
                found.extend(_sites_of_block(block, stack, layer, kind))
    for kind in kinds:
        _refuse_missing_targets(found, kind, architecture)
    return SiteMap(tuple(found))


def _places(stack: Stack, kind: AdapterKind) -> Mapping[str, str]:
    return stack.sublayers if kind.acts_on == "sublayers" else stack.projections


def _sites_of_block(block: nn.Module, stack: Stack, layer: int, kind: AdapterKind) -> list[Site]:
    present = dict(block.named_modules())
    sites = []
    for target in kind.targets:
        path = _places(stack, kind).get(target)
        linear = present.get(path) if path else None
        if isinstance(linear, nn.Linear):
            name = f"{stack.blocks}.{layer}.{path}"
            sites.append(Site(name, stack.name, layer, target, kind.name, linear.in_features, linear.out_features))
    return sites


def _refuse_missing_targets(found: Sequence[Site], kind: AdapterKind, architecture: Architecture) -> None:
    known = list(dict.fromkeys(name for stack in architecture.stacks for name in _places(stack, kind)))
    used = {site.position for site in found if site.kind == kind.name}
    missing = [target for target in kind.targets if target not in used]
    if missing:
        hint = nearest(missing[0], known)
        reason = "this backbone has no such layer" if missing[0] in known else f"known: {', '.join(known)}"
        raise ConfigError(
            f"adaptation.adapters: {kind.name} target '{missing[0]}' cannot be used on a "
            f"{architecture.model_type} backbone ({reason}).{hint}"
        )
