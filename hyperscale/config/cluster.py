"""What the run asks of the Ray cluster."""

from pydantic import Field

from hyperscale.config.section import Section


class ClusterSettings(Section):
    """Workers and what each one gets. One worker is one rank."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """1 for CUDA; 0 runs on the CPU."""
    address: str | None = None
    """Ray cluster to join (`auto`, `host:port`, `ray://…`); null = join the one of RAY_ADDRESS or start one here."""
    max_failures: int = Field(default=2, ge=0)
    """How often a run may lose a worker and go on from its last checkpoint."""
    wait_minutes: float = Field(default=5.0, gt=0)
    """How long to wait for resources that exist but are in use."""
