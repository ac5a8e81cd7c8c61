"""A recipe: the complete description of one run, and the checks that span its sections."""

from typing import Self

from pydantic import Field, model_validator

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.data import DataSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.export import ExportSettings
from hyperscale.config.section import Section
from hyperscale.config.tracking import TrackingSettings
from hyperscale.config.training import TrainingSettings


class Recipe(Section):
    """One YAML file describes one run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: str = Field(min_length=1)
    """The run folder: a path (relative to where the command runs), shared by all nodes, or a URI such as `s3://…`."""
    backbone: BackboneSettings
    adaptation: AdaptationSettings = AdaptationSettings()
    data: DataSettings
    training: TrainingSettings
    engine: EngineSettings = EngineSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        kinds = [adapter.kind for adapter in self.adaptation.adapters]
        problems = [
            f"adaptation.adapters lists the kind '{kind}' more than once; put all its targets in one entry"
            for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1})
        ]
        if self.export.format == "peft" and set(kinds) != {"lora"}:
            others = ", ".join(sorted(set(kinds) - {"lora"}))
            problems.append(
                f"export.format 'peft' cannot express {others}; use 'native' or 'auto', or keep only lora adapters"
            )
        ranks = self.cluster.workers * self.training.micro_batch_size
        if self.training.batch_size % ranks:
            below, above = self.training.batch_size // ranks * ranks, -(-self.training.batch_size // ranks) * ranks
            nearest = f"{below} or {above}" if below else f"{above}"
            problems.append(
                f"training.batch_size {self.training.batch_size} is no multiple of cluster.workers × "
                f"training.micro_batch_size = {self.cluster.workers} × {self.training.micro_batch_size}; use {nearest}"
            )
        if self.training.optimizer.warmup_steps > self.training.steps:
            problems.append(
                f"training.optimizer.warmup_steps {self.training.optimizer.warmup_steps} is more than training.steps "
                f"{self.training.steps}, so the full learning rate would never be reached; "
                f"set training.optimizer.warmup_steps={self.training.steps // 10}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
