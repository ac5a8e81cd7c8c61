"""The one assembly of an adapted model: adapter kinds, sites, generator, injection.

Workers, plans, exports, bundles and tests all build through `Blueprint`, so they cannot disagree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hyperscale.config.adaptation import AdaptationSettings, AdapterSettings
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.adapters.kinds import AdapterKind
from hyperscale.model.adapters.registry import build_kinds
from hyperscale.model.architectures import Architecture, architecture_of
from hyperscale.model.generators.registry import build_generator
from hyperscale.model.injection import Injection
from hyperscale.model.sites import SiteMap, find_sites


@dataclass(frozen=True)
class Blueprint:
    """Which adapters act where in a backbone. It holds no weights."""

    architecture: Architecture
    kinds: tuple[AdapterKind, ...]
    site_map: SiteMap

    @staticmethod
    def of_backbone(
        backbone: nn.Module, architecture: Architecture, adapters: Sequence[AdapterSettings]
    ) -> "Blueprint":
        """Find the sites of a backbone, whose parameters may be on the meta device or partitioned.

        Raises:
            ConfigError: the backbone has no layer that an adapter targets.
        """
        kinds = build_kinds(adapters)
        return Blueprint(architecture, kinds, find_sites(backbone, architecture, kinds))

    @staticmethod
    def of_sites(
        sites: Sequence[Mapping[str, Any]], model_type: str, adapters: Sequence[AdapterSettings]
    ) -> "Blueprint":
        """Read the sites that a checkpoint or a bundle has stored; no backbone is needed."""
        return Blueprint(architecture_of(model_type), build_kinds(adapters), SiteMap.from_json(sites))

    def build_generator(
        self, settings: AdaptationSettings, num_tasks: int, seed: int, task_features: Tensor | None = None
    ) -> nn.Module:
        """Build a generator for these sites; see `registry.build_generator`."""
        return build_generator(settings, self.site_map, self.kinds, num_tasks, seed, task_features)

    def inject(self, backbone: nn.Module) -> Injection:
        """Attach the hooks of these sites to a backbone; its outputs do not change until weights are active."""
        return Injection(backbone, self.site_map, self.kinds)

    def adapt(self, backbone: nn.Module, generator: nn.Module, site_by_site: bool = False) -> AdaptedModel:
        """Join a backbone and a generator.

        `site_by_site`: generate inside the blocks, for adapters that are too large to hold all at once.
        """
        return AdaptedModel(backbone, generator, self.inject(backbone), self.site_map, self.architecture, site_by_site)
