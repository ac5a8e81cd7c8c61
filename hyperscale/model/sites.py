"""The site map: the ordered list of places in the backbone where adapters act.

Heads take their shapes from it, injection its places, and export its names. A checkpoint with another map is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hyperscale.errors import ConfigError, nearest
from hyperscale.model.adapters.kinds import ALL, AdapterKind, Place
from hyperscale.model.architectures import Architecture, Stack
from hyperscale.model.families.table import FUSED_QKV
from hyperscale.model.shapes import whole_shape


@dataclass(frozen=True)
class Site:
    """One adapter kind at one layer."""

    name: str
    """Dotted path of the layer in the backbone: `model.layers.0.self_attn.q_proj`."""
    stack: str
    layer: int
    """Number of the block; of a stack's final norm, how many blocks come before it."""
    position: str
    """The adapted part of the block (`q`, `cross_v`, `attention`, `feed_forward`, `keys`)."""
    kind: str
    in_features: int
    """Width of the layer's input."""
    out_features: int
    """Width of the adapted tensor."""

    @property
    def sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

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

    def where(self, keep: Callable[[Site], bool]) -> "SiteMap":
        """Return the map of the sites for which `keep` is true, in the same order."""
        return SiteMap(tuple(site for site in self.sites if keep(site)))

    @property
    def positions(self) -> tuple[str, ...]:
        """`kind:position` of every position in the map; the index is the position's id in all stacks."""
        return tuple(dict.fromkeys(f"{site.kind}:{site.position}" for site in self.sites))

    def sites_of(self, kind: str) -> tuple[Site, ...]:
        """Return the sites of one adapter kind, in map order."""
        return tuple(site for site in self.sites if site.kind == kind)

    def targets_of(self, kind: str) -> tuple[str, ...]:
        """Return the positions of one adapter kind, in map order: what `all` stood for."""
        return tuple(dict.fromkeys(site.position for site in self.sites_of(kind)))

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
        ConfigError: a target is unknown to the family, or this backbone has no such layer in any block. Or a kind acts
            on norms, and the family's row does not name all of them.
    """
    _check_norms(backbone, architecture, kinds)
    sites: list[Site] = []
    for stack in architecture.stacks:
        blocks = list(backbone.get_submodule(stack.blocks).children())
        for layer, block in enumerate(blocks):
            for kind in kinds:
                sites.extend(_sites_of_block(block, stack, layer, kind))
        for kind in kinds:
            for target in kind.targets:
                if target == _FINAL and kind.acts_on(target) == "norms":
                    width = _norm_width(backbone.get_submodule(stack.final_norm))
                    sites.append(Site(stack.final_norm, stack.name, len(blocks), target, kind.name, width, width))
    for kind in kinds:
        _check_targets(sites, kind, architecture)
    return SiteMap(tuple(sites))


def table_sites(architecture: Architecture, kinds: Sequence[AdapterKind]) -> SiteMap:
    """List the sites of one block of each stack by the family's row alone. Without a backbone their sizes are 0."""
    return SiteMap(
        tuple(
            Site(f"{stack.blocks}.0.{path}", stack.name, 0, target, kind.name, 0, 0)
            for stack in architecture.stacks
            for kind in kinds
            for target in _targets(stack, kind)
            for path in [_paths(stack, kind.acts_on(target)).get(target)]
            if path is not None
        )
    )


_FINAL = "final"
"""The norm that belongs to no block."""
_OF_EXPERTS = frozenset({"gate", "up", "down", "feed_forward", "experts", "router"})
"""Targets for which a mixture of experts has only frozen layers."""
CHOSEN: tuple[Place, ...] = ("projections", "sublayers", "inputs")
"""Places whose targets a recipe names. A target that is missing from the backbone is therefore an error."""


def _paths(stack: Stack, place: Place) -> Mapping[str, str]:
    match place:
        case "projections":
            return stack.projections
        case "sublayers":
            return stack.sublayers
        case "inputs":
            return {name: path for name, path in stack.sublayers.items() if name == "feed_forward"}
        case "norms":
            return stack.norms
        case "keys" | "values":
            return {place: stack.attention}


def _sites_of_block(block: nn.Module, stack: Stack, layer: int, kind: AdapterKind) -> list[Site]:
    present = dict(block.named_modules())
    sites = []
    for target in _targets(stack, kind):
        place = kind.acts_on(target)
        path = _paths(stack, place).get(target)
        if path is None or path not in present:
            continue
        sizes = _sizes(present, path, stack, place)
        sites.append(Site(f"{stack.blocks}.{layer}.{path}", stack.name, layer, target, kind.name, *sizes))
    return sites


def _targets(stack: Stack, kind: AdapterKind) -> Sequence[str]:
    """Return the targets of a kind in a stack, each once, with the stack's own entries in the place of `ALL`."""
    listed: list[str] = []
    for target in kind.targets:
        listed.extend(_paths(stack, kind.acts_on(target)) if target == ALL else [target])
    return list(dict.fromkeys(listed))


def _sizes(present: Mapping[str, nn.Module], path: str, stack: Stack, place: Place) -> tuple[int, int]:
    """Return the widths of a site's input and of the adapted tensor."""
    if place == "norms":
        width = _norm_width(present[path])
        return width, width
    if place in ("keys", "values"):
        return _key_sizes(present, stack, place)
    linear: Any = present[path]
    return linear.in_features, linear.in_features if place == "inputs" else linear.out_features


def _key_sizes(present: Mapping[str, nn.Module], stack: Stack, place: Place) -> tuple[int, int]:
    """Return the widths of what makes keys (or values) and of all their heads together."""
    if FUSED_QKV in stack.projections:
        fused: Any = present[stack.projections[FUSED_QKV]]
        output: Any = present[stack.projections["o"]]  # as wide as the queries
        return fused.in_features, (fused.out_features - output.in_features) // 2
    linear: Any = present[stack.projections[place[0]]]
    return linear.in_features, linear.out_features


def _norm_width(norm: nn.Module) -> int:
    return whole_shape(norm.get_parameter("weight"))[0]


def _check_norms(backbone: nn.Module, architecture: Architecture, kinds: Sequence[AdapterKind]) -> None:
    """Refuse to adapt "every norm" of a backbone whose row leaves one out, or that has a norm of another kind."""
    of_norms = [kind.name for kind in kinds if any(kind.acts_on(target) == "norms" for target in kind.targets)]
    for stack in architecture.stacks if of_norms else ():
        for block in backbone.get_submodule(stack.blocks).children():
            for path, module in block.named_modules():
                reason = _reason_against(path, module, stack, architecture) if is_norm(module) else None
                if reason:
                    raise ConfigError(f"adaptation.adapters: {of_norms[0]} adapts every norm, but {reason}")


def _reason_against(path: str, norm: nn.Module, stack: Stack, architecture: Architecture) -> str | None:
    if path not in (*stack.norms.values(), *stack.untouched):
        return (
            f"the row of the family '{architecture.model_type}' does not name '{path}'; add it to the norms of the row"
        )
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return f"'{path}' is torch's own {type(norm).__name__}, which takes one weight for all samples of a batch"
    return None


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer norm of any kind: its class says so, and it has one vector as weight."""
    weight = module._parameters.get("weight")
    return "Norm" in type(module).__name__ and weight is not None and len(whole_shape(weight)) == 1


def _check_targets(sites: Sequence[Site], kind: AdapterKind, architecture: Architecture) -> None:
    used = {site.position for site in sites if site.kind == kind.name}
    named = [target for target in kind.targets if target != ALL]
    missing = [target for target in named if target not in used and kind.acts_on(target) in CHOSEN]
    if missing:
        place = kind.acts_on(missing[0])
        known = list(dict.fromkeys(name for stack in architecture.stacks for name in _paths(stack, place)))
        is_known = missing[0] in known
        reason = "this backbone has no such layer" if is_known else f"known: {', '.join(known)}"
        is_frozen = missing[0] in _OF_EXPERTS and any(stack.experts for stack in architecture.stacks)
        if is_frozen:
            reason = f"its experts and their router are frozen; adapt attention: {', '.join(known) or 'q, k, v, o'}"
        hint = "" if is_known or is_frozen else nearest(missing[0], known)
        raise ConfigError(
            f"adaptation.adapters: {kind.name} target '{missing[0]}' cannot be used on a "
            f"{architecture.model_type} backbone ({reason}).{hint}"
        )
