"""A learned vector for each task."""

from torch import Tensor, nn

from hyperscale.config.adaptation import TaskTableSettings


class TaskTable(nn.Module):
    """Task embeddings, initialised from N(0, 1) as in HyperFormer (arXiv 2106.04489)."""

    rows = "embedding.weight"
    """Name of the tensor with a row for each task."""

    def __init__(self, settings: TaskTableSettings, num_tasks: int) -> None:
        super().__init__()
        self.dim = settings.dim
        self.embedding = nn.Embedding(num_tasks, settings.dim)
        nn.init.normal_(self.embedding.weight)

    def forward(self, task_index: Tensor) -> Tensor:
        """Return codes [K, E] of task ids [K] int64."""
        codes: Tensor = self.embedding(task_index)
        return codes
