"""Ranks of one machine that train on its CPUs read each other's shards from memory instead of through sockets.

A frozen backbone's shards never change, so that a gather needs no message: every rank keeps its shards in a memory file
(`memfd`), and the others read from it what they lack. NCCL does the like between the GPUs of a node. Measured on 2 gloo
ranks: a block of 7 MB takes 16 ms through DeepSpeed's flat buffers and the loopback, an embedding of 57 MB 180 ms.
Nothing is mapped but a rank's own shards, and nothing is left behind when a rank is killed. With
`HYPERSCALE_SHARED_SHARDS=0` in the environment gathers go through DeepSpeed all the same.
"""

import mmap
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from hyperscale.engine.collective import Collective

_ALIGNMENT = 64
"""Bytes at whose multiples shards begin: a cache line."""


def share_shards(backbone: nn.Module, collective: Collective) -> bool:
    """Move this rank's shards into shared memory and gather from there, if all ranks can; every rank must call this.

    Returns:
        Whether it was done, the same on every rank. It is not where the ranks are on several machines or in
        containers that do not see each other's processes, where shards lie elsewhere than in the CPU's memory, or where
        they are quantized or kept twice (hpZ): then DeepSpeed's own gathers stay.
    """
    parameters: list[Any] = list(backbone.parameters())
    wanted = os.environ.get("HYPERSCALE_SHARED_SHARDS", "1") != "0"
    if collective.world_size == 1 or collective.anyone(not (wanted and all(map(_is_plain, parameters)))):
        return False
    offsets, size = _layout(parameters)
    own = os.memfd_create("hyperscale-shards")
    os.ftruncate(own, size)
    places = collective.gather((_machine(), os.getpid(), own))
    files = _open_all(places, collective.rank, size)
    if collective.anyone(len(files) < collective.world_size):
        _close(files)
        return False
    _move(parameters, own, offsets, size)
    collective.barrier()  # nobody reads before all have written
    gather = _SharedGather(files, offsets)
    for parameter in parameters:
        parameter.all_gather_coalesced = gather
    return True


def _is_plain(parameter: Any) -> bool:
    share = parameter.ds_tensor
    return bool(
        not parameter.requires_grad
        and share.device.type == parameter.device.type == "cpu"
        and share.final_location is None
        and parameter.ds_secondary_tensor is None
        and not hasattr(share, "ds_quant_scale")
    )


def _machine() -> tuple[str, str]:
    """Return what processes have in common that see each other in /proc: the kernel's boot and the PID namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), str(
        Path("/proc/self/ns/pid").readlink()
    )


def _layout(parameters: Sequence[Any]) -> tuple[dict[int, int], int]:
    """Lay the shards one after the other, alike on all ranks: ds_id -> first byte, and the size of the whole."""
    offsets, size = {}, 0
    for parameter in parameters:
        offsets[parameter.ds_id] = size
        share = parameter.ds_tensor
        size += -(-share.numel() * share.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def _open_all(places: Sequence[tuple[tuple[str, str], int, int]], rank: int, size: int) -> list[int]:
    """Open every rank's memory file, by way of /proc; fewer than all where one cannot be reached."""
    found = [places[rank][2]]
    if len({machine for machine, _, _ in places}) > 1:
        return found
    try:
        for number, (_, process, descriptor) in enumerate(places):
            if number != rank:
                found.insert(number, os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY))
                if os.fstat(found[number]).st_size != size:
                    return found[:1]
    except OSError:
        return found
    return found


def _move(parameters: Iterable[Any], file: int, offsets: Mapping[int, int], size: int) -> None:
    """Put the shards into the memory file, one by one, so that no two of them lie in memory twice."""
    mapped = mmap.mmap(file, size)
    for parameter in parameters:
        share = parameter.ds_tensor
        place = torch.frombuffer(mapped, dtype=share.dtype, count=share.numel(), offset=offsets[parameter.ds_id])
        place.copy_(share)
        share.data = place


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


class _Done:
    """A finished gather, as DeepSpeed's coordinator waits for it: once for each of its parameters.

    Only the first time counts, since a parameter may have been let go before the coordinator asks for the last.
    """

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._waiting = parameters

    def wait(self, **_options: Any) -> None:
        for parameter in self._waiting:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._waiting = ()


class _SharedGather:
    """Stands in for the `all_gather_coalesced` of DeepSpeed's parameters; closes the files when they are gone."""

    def __init__(self, files: Sequence[int], offsets: Mapping[int, int]) -> None:
        self._files = files
        self._offsets = offsets
        weakref.finalize(self, _close, files)

    def __call__(self, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> _Done:
        parameters = list(params)
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT
            parameter.data = self._read(parameter)
        return _Done(parameters)

    def _read(self, parameter: Any) -> Tensor:
        whole = torch.empty(parameter.ds_shape, dtype=parameter.dtype)
        bytes_left = memoryview(whole.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        share_bytes = parameter.ds_tensor.numel() * whole.element_size()
        for file in self._files:
            part, bytes_left = bytes_left[:share_bytes], bytes_left[share_bytes:]
            _read_into(part, file, self._offsets[parameter.ds_id])
        return whole


def _read_into(target: memoryview, file: int, offset: int) -> None:
    done = 0
    while done < len(target):
        done += os.preadv(file, [target[done:]], offset + done)
