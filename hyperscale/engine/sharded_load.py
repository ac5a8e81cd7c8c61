"""Loading a backbone under ZeRO-3: every rank reads only its own slices, and nothing ever holds the whole model.

A partitioned parameter is the rank's share of the flattened tensor, and safetensors stores tensors flat: a shard is
one byte range.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from hyperscale.engine.collective import Collective, TorchCollective
from hyperscale.engine.deepspeed_names import convert, cut_second_shards, shard_of, shard_start
from hyperscale.engine.shard_sources import (
    AbsmaxSource,
    CodeSource,
    FourBitTensor,
    Int8Source,
    PlainSource,
    ScaleSource,
    Source,
)
from hyperscale.engine.shared_shards import ShardFile
from hyperscale.engine.slices import JoinedTensor, StoredTensor, index_tensors, join_tensors, slice_reader
from hyperscale.errors import BackboneError
from hyperscale.model.backbone import BackboneFolder
from hyperscale.model.quantized import four_bits
from hyperscale.model.quantized.four_bits import FourBitWeight
from hyperscale.model.quantized.int8 import SCALE, Int8Linear
from hyperscale.model.shapes import record_whole_shape

_SAMPLE = 64
"""Elements of each shard that are compared with the file once it is filled."""


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
        BackboneError: a tensor is missing or has another shape; named with its file. Or a shard does not hold what its
            file does.
    """
    stored = index_tensors(folder.files, folder.is_used)
    sources = _sources(backbone, stored, folder, TorchCollective(device))
    partitioner = Init(config_dict_or_path=dict(ds_config), enabled=False)
    keeps_second_shards = int(ds_config["zero_optimization"].get("zero_hpz_partition_size", 1)) > 1
    dtype = next(one.dtype for one in backbone.parameters() if one.is_floating_point())
    with slice_reader() as reader:
        while sources:
            names, source = sources.popleft()  # a tensor in four bits keeps an absmax for each block until then
            dtype_of_shard = backbone.get_parameter(names[0]).dtype
            parameter = _partition_empty(partitioner, backbone, names, device)
            if file is not None:
                file.take(parameter)
            share = shard_of(parameter)
            share.zero_()
            start = shard_start(parameter)
            source.fill(share, start, reader, dtype)
            sample = torch.zeros(min(_SAMPLE, share.numel()), dtype=dtype_of_shard)
            source.fill_sample(sample, start, reader, dtype)
            _check_sample(names[0], share, sample)
            if keeps_second_shards:
                cut_second_shards(parameter)


def _check_sample(name: str, share: Tensor, sample: Tensor) -> None:
    """Raise `BackboneError` unless a shard begins with the file's numbers, in the dtype that the backbone has.

    DeepSpeed may give a shard another dtype than its parameter's, as its own quantization does: the numbers of a file
    then all round to 0, and training learns nothing without an error.
    """
    begin = share[: len(sample)].cpu()
    if share.dtype != sample.dtype or not torch.equal(begin.nan_to_num(), sample.nan_to_num()):
        raise BackboneError(
            f"backbone.name: the shard of '{name}' holds {share.dtype} {begin[:3].tolist()}…, but its file "
            f"{sample.dtype} {sample[:3].tolist()}…; check engine.ds_config for settings that change weights"
        )


def _names(backbone: nn.Module) -> list[tuple[Any, list[str]]]:
    """List every parameter once, with all its names: tied weights have several, and a file may hold any of them."""
    by_id: dict[int, tuple[Any, list[str]]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(by_id.values())


def _sources(
    backbone: nn.Module, stored: Mapping[str, StoredTensor], folder: BackboneFolder, collective: Collective
) -> deque[tuple[list[str], Source]]:
    """List every parameter's names with what fills it."""
    tensors: dict[nn.Module, FourBitTensor] = {}
    sources: deque[tuple[list[str], Source]] = deque()
    for parameter, names in _names(backbone):
        owner, _, key = names[0].rpartition(".")
        layer = backbone.get_submodule(owner)
        if key == "bias" or not isinstance(layer, Int8Linear | FourBitWeight):
            sources.append((names, PlainSource(_find(names, tuple(parameter.shape), stored, folder))))
            continue
        weights = [f"{name.rpartition('.')[0]}.weight" for name in names]
        if isinstance(layer, Int8Linear):
            weight = _find_one(weights, (layer.out_features, layer.in_features), stored, folder)
            sources.append((names, Int8Source(weight, wants_scales=key == SCALE)))
        else:
            weight = _find_one(weights, (layer.num_rows, layer.width), stored, folder)
            tensor = tensors.setdefault(layer, FourBitTensor(weight, layer.kind, collective))
            sources.append((names, _four_bit_source(key, tensor)))
    return sources


def _four_bit_source(key: str, tensor: FourBitTensor) -> Source:
    match key:
        case four_bits.ABSMAX:
            return AbsmaxSource(tensor)
        case four_bits.SCALE:
            return ScaleSource(tensor)
        case _:
            return CodeSource(tensor)


def _find(
    names: list[str], shape: tuple[int, ...], stored: Mapping[str, StoredTensor], folder: BackboneFolder
) -> StoredTensor | JoinedTensor:
    pieces = _stored_as(names, folder)
    if len(pieces) > 1:
        return join_tensors([stored[piece] for piece in pieces], shape)
    return _find_one(names, shape, stored, folder)


def _find_one(
    names: list[str], shape: tuple[int, ...], stored: Mapping[str, StoredTensor], folder: BackboneFolder
) -> StoredTensor:
    (name,) = _stored_as(names, folder)
    if stored[name].shape != shape:
        raise BackboneError(
            f"backbone.name: tensor '{name}' in {stored[name].file} has shape {list(stored[name].shape)}, "
            f"but config.json makes it {list(shape)}"
        )
    return stored[name]


def _stored_as(names: list[str], folder: BackboneFolder) -> tuple[str, ...]:
    pieces = next(filter(None, map(folder.stored_as, names)), None)
    if pieces is None:
        raise BackboneError(
            f"backbone.name: no file of {folder.path} holds the tensor '{names[0]}'; the checkpoint is incomplete"
        )
    return pieces


def _partition_empty(partitioner: Init, backbone: nn.Module, names: list[str], device: torch.device) -> nn.Parameter:
    """Put an empty partitioned parameter in place of a meta one under all its names, without any communication.

    DeepSpeed's public ways fill the whole tensor on rank 0 and broadcast it. `convert` makes the two calls around the
    broadcast; the uninitialised storage is never touched beyond this rank's share, so it costs no memory
    on Linux.
    """
    meta = backbone.get_parameter(names[0])
    parameter = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device), requires_grad=False)
    for name in names:
        owner, _, key = name.rpartition(".")
        backbone.get_submodule(owner).register_parameter(key, parameter)
    record_whole_shape(parameter, meta.shape)
    convert(partitioner, parameter)
    return parameter
