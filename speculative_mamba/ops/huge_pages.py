"""Memory for weights that a pass reads from end to end, in the large pages of the system where it has them.

A step reads every weight once, and with pages of 4 KiB looks up another page every 64 lines of a cache.
"""

import contextlib
import math
import mmap
import threading
import weakref

import torch

_ARENA = 64 << 20  # bytes mapped at a time: small tensors share huge pages
_ALIGNMENT = 64  # bytes
_SMALLEST = 1 << 16  # bytes of a tensor that is worth it
_lock = threading.Lock()
_arena: weakref.ref[mmap.mmap] | None = None  # the mapping that has room; only its tensors hold it
_used = 0  # bytes of it


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor, not initialised, as of ``torch.empty``. What nobody writes takes no memory.

    On Linux tensors of a CPU share mappings that ask for huge pages (``madvise``), which the system may not have. A
    mapping is given back with its last tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory, offset = _part(-(-size // _ALIGNMENT) * _ALIGNMENT)
    except OSError:  # so that a lack of memory is said as PyTorch says it
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)


def copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy on the same device in such memory."""
    return empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _part(size: int) -> tuple[mmap.mmap, int]:
    """So many bytes of a mapping from an offset on."""
    global _arena, _used
    if size > _ARENA // 2:
        return _mapping(size), 0
    with _lock:
        memory = _arena and _arena()
        if memory is None or _used + size > _ARENA:
            memory = _mapping(_ARENA)
            _arena, _used = weakref.ref(memory), 0
        _used += size
        return memory, _used - size


def _mapping(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
