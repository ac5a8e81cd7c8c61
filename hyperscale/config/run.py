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
from hyperscale.config.start import StartSettings
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
    start: StartSettings | None = None
    """null = an untrained generator."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        kinds = [adapter.kind for adapter in self.adaptation.adapters]
        problems = [
            f"adaptation.adapters lists the kind '{kind}' more than once; put all its targets in one entry"
            for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1})
        ]
        if self.export.format == "peft" and not self.adaptation.has_peft_form:
            problems.append(
                f"export.format 'peft' cannot express {' + '.join(dict.fromkeys(kinds))}; use 'native' or 'auto', "
                "or keep only lora, only vera, only ia3 or only prefix adapters"
            )
        ranks = self.cluster.workers * self.training.micro_batch_size
        if self.training.batch_size % ranks:
            below, above = self.training.batch_size // ranks * ranks, -(-self.training.batch_size // ranks) * ranks
            nearest = f"{below} or {above}" if below else f"{above}"
            problems.append(
                f"training.batch_size {self.training.batch_size} is not a multiple of cluster.workers × "
                f"training.micro_batch_size = {self.cluster.workers} × {self.training.micro_batch_size}; use {nearest}"
            )
        if self.training.optimizer.warmup_steps > self.training.steps:
            problems.append(
                f"training.optimizer.warmup_steps {self.training.optimizer.warmup_steps} is more than training.steps "
                f"{self.training.steps}, so the full learning rate would never be reached; "
                f"set training.optimizer.warmup_steps={self.training.steps // 10}"
            )
        if self.engine.offload_checkpoints and not (
            self.engine.activation_checkpointing and self.cluster.gpus_per_worker
        ):
            problems.append(
                "engine.offload_checkpoints moves checkpoints from GPUs to host memory: it needs "
                "engine.activation_checkpointing=true and cluster.gpus_per_worker=1"
            )
        problems += self._problems_of_start()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_start(self) -> list[str]:
        if self.start is None:
            return []
        problems = []
        known, tasks = self.start.known_tasks, len(self.data.tasks)
        if known >= tasks:
            problems.append(f"start.known_tasks {known} leaves no new task among the {tasks} of data.tasks; add one")
        if self.start.train == "new_tasks":
            generator = self.adaptation.generator
            if not generator.tells_tasks_apart:
                problems.append(
                    f"start.train 'new_tasks' cannot be used with the generator '{generator.kind}', which has no "
                    "weights of one task alone; use start.train=everything"
                )
            if self.adaptation.reads_descriptions:
                problems.append(
                    "start.train 'new_tasks' has nothing to train with adaptation.task_encoder.kind 'text': its "
                    "description is all that a task has of its own; use start.train=everything"
                )
            if any((self.data.mixture.weights or (1.0,))[:known]):
                problems.append(
                    "start.train 'new_tasks' learns nothing from the known tasks: set their data.mixture.weights to 0"
                )
        return problems
