"""The sharded engine: DeepSpeed ZeRO-3 over the frozen backbone, the generator outside it, whole on every rank.

The backbone's engine has no optimizer and is called through its module; gradients pass through the gathered blocks
into the generated weights. Checked against the local engine in tests/test_zero_matches_local.py.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.training import TrainingSettings
from hyperscale.data.collate import Batch
from hyperscale.engine.base import StepResult
from hyperscale.engine.collective import Collective, TorchCollective
from hyperscale.engine.deepspeed_names import (
    DeepSpeedEngine,
    check_engine,
    check_version,
    hold,
    leave_shared_memory_reduce_unbuilt,
    release,
    remove_hooks,
)
from hyperscale.engine.ds_config import complete_ds_config, read_ds_config
from hyperscale.engine.frozen_experts import forget_expert_weights
from hyperscale.engine.frozen_linear import forget_linear_inputs
from hyperscale.engine.host_memory import map_large_tensors, return_freed_memory
from hyperscale.engine.prefetch import prefetch_whole_parts
from hyperscale.engine.sharded_load import load_sharded
from hyperscale.engine.shared_shards import ShardFile, share_shards
from hyperscale.engine.state import load_tensors, state_tensors
from hyperscale.engine.step import TrainingStep, evaluation_mode
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.architectures import Architecture
from hyperscale.model.backbone import BackboneFolder, build_empty, set_activation_checkpointing
from hyperscale.planning.parts import Part


def shard_backbone(
    folder: BackboneFolder,
    settings: BackboneSettings,
    engine: EngineSettings,
    training: TrainingSettings,
    device: torch.device,
    world_size: int,
) -> tuple[nn.Module, DeepSpeedEngine]:
    """Build and load this rank's share of a backbone; torch.distributed must be up, and every rank must call this.

    Returns:
        The partitioned module and the DeepSpeed engine that gathers it.

    Raises:
        EngineError: the DeepSpeed JSON contradicts the recipe.
        BackboneError: a tensor is missing or has another shape.
    """
    check_version()
    _quiet_deepspeed()
    if keeps_host_memory_small(engine.resident, device):
        map_large_tensors()
    backbone = build_empty(folder, settings)
    if engine.activation_checkpointing:
        set_activation_checkpointing(backbone, engine.offload_checkpoints)
    raw = read_ds_config(engine.ds_config)
    config = complete_ds_config(raw, training, settings, world_size, *_numels(backbone, folder.architecture))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    file = ShardFile(backbone, world_size) if device.type == "cpu" else None
    load_sharded(backbone, folder, config, device, file)
    set_z3_leaf_modules(backbone, list({type(block) for block in _blocks(backbone, folder.architecture)}))
    deepspeed_engine: DeepSpeedEngine = deepspeed.initialize(model=backbone, config=config)[0]
    check_engine(deepspeed_engine)
    if raw.get("zero_optimization", {}).get("stage3_prefetch_bucket_size", "auto") == "auto":
        prefetch_whole_parts(deepspeed_engine)
    forget_linear_inputs(backbone)
    if not engine.activation_checkpointing:
        forget_expert_weights(backbone, folder.architecture)
    if file is not None:
        share_shards(backbone, file, TorchCollective(device))
    return backbone, deepspeed_engine


def keeps_host_memory_small(resident: str, device: torch.device) -> bool:
    """Return whether a CPU rank keeps its memory at the plan's. `engine.resident: all` asks for speed instead.

    `auto` may choose speed once the shards are loaded (engine/residency.py). Mapping what is large and clearing its
    pages costs 15 to 18 % of a step; without it the peak was 1.7 times as high (docs/performance.md).
    """
    return device.type == "cpu" and resident != "all"


def _blocks(backbone: nn.Module, architecture: Architecture) -> list[nn.Module]:
    return [block for stack in architecture.stacks for block in backbone.get_submodule(stack.blocks).children()]


def _numels(backbone: nn.Module, architecture: Architecture) -> tuple[int, int]:
    """Return the elements of the largest block, and of everything outside the blocks together."""
    blocks = [_numel(block.parameters()) for block in _blocks(backbone, architecture)]
    return max(blocks), _numel(backbone.parameters()) - sum(blocks)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed's start-up messages below WARNING, and one warning of torch's that its users cannot act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls a collective by the name that torch 2.13 deprecates, at every gather of a run.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.all_gather_into_tensor` is deprecated",
        category=FutureWarning,
        module=r"(torch\.distributed|deepspeed\.comm)\.",
    )
    leave_shared_memory_reduce_unbuilt()


@dataclass(frozen=True)
class ZeroEngine:
    """Runs `TrainingStep` over a partitioned backbone; keeps the resident parts gathered and releases the others."""

    step: TrainingStep
    deepspeed_engine: DeepSpeedEngine
    parts: tuple[Part, ...]
    resident: frozenset[str]
    """Names of the parts that stay gathered; the same on every rank."""
    returns_memory: bool
    """Whether what a step frees goes back to the system."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.name in self.resident:
                hold(list(self.model.backbone.get_submodule(part.name).parameters()))
        if len(self.resident) == len(self.parts):
            # Nothing is left to fetch or to release: the hooks that would look for it cost a tenth of a step on CPUs.
            remove_hooks(self.deepspeed_engine)

    @property
    def model(self) -> AdaptedModel:
        return self.step.model

    @property
    def collective(self) -> Collective:
        return self.step.collective

    @property
    def device(self) -> torch.device:
        return self.step.device

    def train_step(self, batches: Sequence[Batch], step: int, is_last: bool = False) -> StepResult:
        result = self.step.run(batches, step, is_last)
        self._release()
        return result

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        try:
            with evaluation_mode(self.model.backbone):
                yield
        finally:
            self._release()

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return state_tensors(self.step)

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        load_tensors(self.step, tensors)

    def _release(self) -> None:
        """Partition what is still gathered and not resident.

        The first block's input needs no gradient, so its post-backward hook never fires and DeepSpeed would keep it
        gathered; with checkpointing the embedding likewise.
        """
        for part in self.parts:
            if part.name not in self.resident:
                release(self.deepspeed_engine, self.model.backbone.get_submodule(part.name))
        if self.returns_memory:
            return_freed_memory()
