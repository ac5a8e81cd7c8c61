"""Memory of the machine under an engine: how much is free, and giving back what is not used."""

import ctypes
import os
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_BYTES = 1024 * 1024
_KEPT_BYTES = 32 * 1024 * 1024
"""Where glibc's own limit ends up; it trims at twice that."""


def map_large_tensors() -> None:
    """Return freed tensors of 1 MiB and more to the system at once, in this process, from now on.

    glibc raises this limit to 32 MiB as it goes and keeps what is below: with a backbone of 418 MiB and nothing
    resident, a rank stayed at 880 MiB between steps where 245 MiB were in use. It costs a tenth of the processor time
    of a step; at 256 KiB it would cost a third.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, which is its default: faster, but up to 1.7 times the memory."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def return_freed_memory() -> None:
    """Return the free pages between smaller tensors to the system. Call it between steps, when few are in use."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total bytes of a CUDA device, or of this host or container for CPUs."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available_bytes()
    limit, used = _container_bytes()
    return (free, total) if limit is None else (min(free, limit - used), min(total, limit))


def _available_bytes() -> int:
    """Return what Linux can give without swapping: free pages and caches that it can drop."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _container_bytes() -> tuple[int | None, int]:
    """Return the memory limit of this process's control group (version 2) and its use, caches not counted."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None, 0
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return int(limit), used - int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None, 0
