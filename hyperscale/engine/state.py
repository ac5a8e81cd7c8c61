"""The part of an engine that a checkpoint keeps: the generator and its optimizer, never the backbone."""

from collections.abc import Mapping

from torch import Tensor

from hyperscale.engine.step import TrainingStep
from hyperscale.errors import CheckpointError


def state_tensors(step: TrainingStep) -> Mapping[str, Mapping[str, Tensor]]:
    """Return CPU copies of the generator's and the optimizer's tensors."""
    generator = {name: tensor.detach().cpu().clone() for name, tensor in step.model.generator.state_dict().items()}
    return {"generator": generator, "optimizer": step.optimizer.tensors()}


def load_tensors(step: TrainingStep, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restore what `state_tensors` returned.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    try:
        step.model.generator.load_state_dict(dict(tensors["generator"]), strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint's generator does not fit this recipe: {details}") from error
    step.optimizer.load_tensors(tensors["optimizer"])
