"""Loading a backbone under ZeRO-3: every rank reads only its own slices, and nothing ever holds the whole model.

A partitioned parameter is the rank's share of the flattened tensor, and safetensors stores tensors flat: a shard is
one byte range.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from hyperscale.engine.deepspeed_names import convert, cut_second_shards, shard_of, shard_start
from hyperscale.engine.shared_shards import ShardFile
from hyperscale.engine.slices import SliceReader, StoredTensor, index_tensors, slice_reader
from hyperscale.errors import BackboneError
from hyperscale.model.backbone import BackboneFolder
from hyperscale.model.quantized import SCALE, quantize
from hyperscale.model.shapes import record_whole_shape

_SAMPLE = 64
"""Elements of each shard that are compared with the file once it is filled."""
_ROWS_BYTES = 16 * 1024 * 1024
"""Of rows that are quantized at once, in fp32."""


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
    stored = index_tensors(folder.files)
    sources = [(names, _source(names, parameter, stored, folder)) for parameter, names in _names(backbone)]
    partitioner = Init(config_dict_or_path=dict(ds_config), enabled=False)
    keeps_second_shards = int(ds_config["zero_optimization"].get("zero_hpz_partition_size", 1)) > 1
    dtype = next(one.dtype for one in backbone.parameters() if one.is_floating_point())
    with slice_reader() as reader:
        for names, source in sources:
            wanted = backbone.get_parameter(names[0]).dtype
            parameter = _partition_empty(partitioner, backbone, names, device)
            if file is not None:
                file.take(parameter)
            share = shard_of(parameter)
            share.zero_()
            start = shard_start(parameter)
            _fill(share, source, start, reader, dtype)
            sample = torch.zeros(min(_SAMPLE, share.numel()), dtype=wanted)
            _fill(sample, source, start, reader, dtype)
            _check_sample(names[0], share, sample)
            if keeps_second_shards:
                cut_second_shards(parameter)


def _fill(
    share: Tensor, source: "StoredTensor | _Quantized", start: int, reader: SliceReader, dtype: torch.dtype
) -> None:
    if isinstance(source, StoredTensor):
        reader.read_into(share, source, start)
    else:
        source.fill(share, start, reader, dtype)


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


@dataclass(frozen=True)
class _Quantized:
    """The integers or the scales of a tensor that is quantized on the way."""

    stored: StoredTensor
    """[out, in]"""
    wants_scales: bool

    def fill(self, share: Tensor, start: int, reader: SliceReader, dtype: torch.dtype) -> None:
        """Fill the 1-D `share` with the flat elements from `start` on; reads the rows that it touches, whole.

        `dtype` is the backbone's: rows are rounded to it first, as where the whole model is loaded.
        """
        num_rows, width = self.stored.shape
        each = 1 if self.wants_scales else width
        end = min(start + share.numel(), num_rows * each)
        at_once = max(1, _ROWS_BYTES // (4 * width))
        for first in range(start // each, -(-end // each), at_once):
            last = min(first + at_once, -(-end // each))
            rows = torch.empty((last - first) * width, dtype=dtype)
            reader.read_into(rows, self.stored, first * width)
            integers, scales = quantize(rows.view(-1, width))
            made = scales if self.wants_scales else integers.flatten()
            low, high = max(start, first * each), min(end, last * each)
            share[low - start : high - start].copy_(made[low - first * each : high - first * each])


def _names(backbone: nn.Module) -> list[tuple[Any, list[str]]]:
    """List every parameter once, with all its names: tied weights have several, of which a file may hold any."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def _source(
    names: list[str], parameter: nn.Parameter, stored: Mapping[str, StoredTensor], folder: BackboneFolder
) -> StoredTensor | _Quantized:
    owner, _, key = names[0].rpartition(".")
    if key == SCALE:
        weight = _find([f"{owner}.weight"], None, stored, folder)
        return _Quantized(weight, wants_scales=True)
    found = _find(names, tuple(parameter.shape), stored, folder)
    return _Quantized(found, wants_scales=False) if parameter.dtype == torch.int8 else found


def _find(
    names: list[str], shape: tuple[int, ...] | None, stored: Mapping[str, StoredTensor], folder: BackboneFolder
) -> StoredTensor:
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise BackboneError(
            f"backbone.name: no file of {folder.path} holds the tensor '{names[0]}'; the checkpoint is incomplete"
        )
    if shape is not None and stored[name].shape != shape:
        raise BackboneError(
            f"backbone.name: tensor '{name}' in {stored[name].file} has shape {list(stored[name].shape)}, "
            f"but config.json makes it {list(shape)}"
        )
    return stored[name]


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
