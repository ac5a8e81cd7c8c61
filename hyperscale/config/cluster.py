"""What the run asks of the Ray cluster."""

from pydantic import Field, field_validator

from hyperscale.config.section import Section


class ClusterSettings(Section):
    """Workers and what each one gets. One worker is one rank."""

    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """1 for CUDA; 0 runs on the CPU. A worker is one rank and uses exactly one GPU."""
    address: str | None = None
    """Ray cluster to join (`auto`, `host:port`, `ray://…`); null = join the one of RAY_ADDRESS or start one here."""
    max_failures: int = Field(default=2, ge=0)
    """How often a run may lose a worker and continue from its last checkpoint."""
    wait_minutes: float = Field(default=5.0, gt=0)
    """How long to wait for resources that exist but are in use."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_one_rank(cls, value: float) -> float:
        if value not in (0, 1):
            reason = (
                "NCCL allows one rank per GPU, so workers cannot share one"
                if value < 1
                else "a worker uses one GPU and would leave the others idle; raise cluster.workers for more"
            )
            raise ValueError(f"{value:g} is not allowed: must be 1, or 0 for CPUs ({reason})")
        return value
