"""Loading a backbone under ZeRO-3: every rank reads only its own slices, and nothing ever holds the whole model.

A partitioned parameter is the rank's share of the flattened tensor, and safetensors stores tensors flat: a shard is
one byte range.
"""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from hyperscale.engine.shared_shards import ShardFile
from hyperscale.engine.slices import StoredTensor, index_tensors, slice_reader
from hyperscale.errors import BackboneError
from hyperscale.model.backbone import BackboneFolder


def load_sharded(
    backbone: nn.Module,
    folder: BackboneFolder,
    ds_config: Mapping[str, Any],
    device: torch.device,
    file: ShardFile | None = None,
) -> None:
    """Turn the meta parameters of `backbone` into ZeRO-3 partitions, filled from `folder`; every rank must call this.

    Args:
        file: where the shards are to lie; None leaves them where DeepSpeed puts them.

    Raises:
        BackboneError: a tensor is missing or has another shape; named with its file.
    """
    stored = index_tensors(folder.files)
    sources = [(names, _source(names, parameter, stored, folder)) for parameter, names in _names(backbone)]
    partitioner = Init(config_dict_or_path=dict(ds_config), enabled=False)
    regather = int(ds_config["zero_optimization"].get("zero_hpz_partition_size", 1)) > 1
    with slice_reader() as reader:
        for names, source in sources:
            parameter = _partition_empty(partitioner, backbone, names, device)
            if file is not None:
                file.take(parameter)
            share = parameter.ds_tensor
            share.zero_()
            reader.read_into(share, source, parameter.ds_zero_partition_rank * share.numel())
            if regather:  # the secondary shards within a node are cut from the whole tensor
                parameter.all_gather([parameter])
                parameter.partition([parameter], has_been_updated=True)


def _names(backbone: nn.Module) -> list[tuple[Any, list[str]]]:
    """List every parameter once, with all its names: tied weights have several, of which a file may hold any."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def _source(
    names: list[str], parameter: nn.Parameter, stored: Mapping[str, StoredTensor], folder: BackboneFolder
) -> StoredTensor:
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise BackboneError(
            f"backbone.name: no file of {folder.path} holds the tensor '{names[0]}'; the checkpoint is incomplete"
        )
    if stored[name].shape != tuple(parameter.shape):
        raise BackboneError(
            f"backbone.name: tensor '{name}' in {stored[name].file} has shape {list(stored[name].shape)}, "
            f"but config.json makes it {list(parameter.shape)}"
        )
    return stored[name]


def _partition_empty(partitioner: Init, backbone: nn.Module, names: list[str], device: torch.device) -> Any:
    """Put an empty partitioned parameter in place of a meta one under all its names, without any communication.

    DeepSpeed's public ways fill the whole tensor on rank 0 and broadcast it. These are the two calls that they make
    around the broadcast; the uninitialised storage is never touched beyond this rank's share, so it costs no memory
    on Linux.
    """
    meta = backbone.get_parameter(names[0])
    parameter: Any = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device), requires_grad=False)
    for name in names:
        owner, _, key = name.rpartition(".")
        backbone.get_submodule(owner).register_parameter(key, parameter)
    partitioner._convert_to_deepspeed_param(parameter)
    parameter.partition()
    return parameter
