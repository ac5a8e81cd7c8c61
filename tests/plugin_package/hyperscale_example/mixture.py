"""A generator: stored sets of weights, mixed by the codes of the tasks."""

from torch import Tensor, nn

from hyperscale.model.generation import EagerGeneration, Generation
from hyperscale.model.generators.independent import WeightTable
from hyperscale.model.generators.registry import GeneratorSpec
from hyperscale.model.task_encoders.registry import TaskEncoder
from hyperscale.model.weights import Weights


class Mixture(nn.Module):
    """weights(task) = Σ code(task)[e] · set[e], over the E entries of a code."""

    def __init__(self, task_encoder: TaskEncoder, sets: WeightTable) -> None:
        super().__init__()
        self.task_encoder = task_encoder
        self.sets = sets

    def forward(self, task_index: Tensor) -> Weights:
        codes = self.task_encoder(task_index)
        every = self.sets.rows(task_index.new_tensor(range(self.task_encoder.dim)))
        return {
            group: {name: (codes @ tensor.flatten(1)).unflatten(1, tensor.shape[1:]) for name, tensor in named.items()}
            for group, named in every.items()
        }

    def site_by_site(self, task_index: Tensor) -> Generation:
        return EagerGeneration(self(task_index))

    def task_parameters(self) -> tuple[str, ...]:
        return (f"task_encoder.{self.task_encoder.rows}",)


def build(spec: GeneratorSpec) -> Mixture:
    encoder = spec.task_encoder()
    return Mixture(encoder, WeightTable(spec.site_map, spec.specs, encoder.dim))
