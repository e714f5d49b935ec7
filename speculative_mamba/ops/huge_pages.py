"""Memory for weights that a pass reads from end to end, in the large pages of the system where it has them.

A step reads every weight once, and with pages of 4 KiB looks up another page every 64 lines of a cache.
"""

import contextlib
import math
import mmap
import threading
import weakref

import torch

_ARENA = 16 << 20  # bytes mapped at a time: small tensors share huge pages
_ALIGNMENT = 64  # bytes
_SMALLEST = 1 << 20  # bytes of a tensor that is worth it; what lives shortly should be smaller


class _Arena(threading.local):
    """Of each thread, so that nobody waits: the mapping that has room, held by its tensors alone."""

    memory: weakref.ref[mmap.mmap] | None = None
    used = 0  # bytes


_arena = _Arena()


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor, not initialised, as of ``torch.empty``. What nobody writes takes no memory.

    On Linux tensors of a CPU share mappings that ask for huge pages (``madvise``), which the system may not have. A
    mapping, of 16 MiB or as large as its one tensor, is given back with its last tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory, offset = _part(-(-size // _ALIGNMENT) * _ALIGNMENT)
    except (OSError, OverflowError):  # so that a lack of memory is said as PyTorch says it
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)


def copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy on the same device in such memory."""
    return empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _part(size: int) -> tuple[mmap.mmap, int]:
    """So many bytes of a mapping from an offset on."""
    if size > _ARENA // 2:
        return _mapping(size), 0
    memory = _arena.memory and _arena.memory()
    if memory is None or _arena.used + size > _ARENA:
        memory = _mapping(_ARENA)
        _arena.memory, _arena.used = weakref.ref(memory), 0
    _arena.used += size
    return memory, _arena.used - size


def _mapping(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
