"""Kernel calls recorded once and run again without Python between them."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .backend import compiled, current_device

_SHARED_FROM = 32768  # elements from which PyTorch shares a copy among threads
_this_thread = threading.local()


class Recording:
    """The calls of ops on backends ``cpu`` and ``cuda`` made inside ``record()``, on the device of ``like``.

    ``run()`` makes them again on the same memory: what lies in the tensors may have changed, their addresses and shapes
    may not. Results of ops are kept alive, and shared as ``next_stage`` says; the caller keeps what it passed.
    PyTorch's own operations are not recorded.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like.new_empty(0)
        self._program = compiled(like)[0].Program()
        self._stages: tuple[list[torch.Tensor], ...] = ([], [])
        self._used = 0  # results of the current stage so far

    @contextmanager
    def record(self) -> Iterator[None]:
        self._program.record(self._program)
        _this_thread.recording = self
        try:
            yield
        finally:
            self._program.record(None)
            _this_thread.recording = None

    def run(self) -> None:
        with current_device(self._like):
            self._program.run(compiled(self._like)[1])

    def next_stage(self) -> None:
        self._stages, self._used = self._stages[::-1], 0

    def new_result(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        results, at = self._stages[0], self._used
        self._used += 1
        if at == len(results) or results[at].shape != shape or results[at].dtype != dtype:
            results.insert(at, like.new_empty(shape, dtype=dtype))
        return results[at]


class ResultPool:
    """Copies of one tensor in memory that is used again once nothing refers to an earlier copy.

    Fresh memory costs a page fault for every 4 KiB, and PyTorch's own copy would share the work with threads that
    then spin for a while on the cores that the next kernel needs.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor: contiguous float32, of the same shape at every call."""
        if tensor.is_cuda or tensor.numel() < _SHARED_FROM:
            return tensor.clone()
        memory = self._free.pop() if self._free else np.empty(tensor.shape, np.float32)
        lent = memory.view()  # lives as long as the tensor's storage, whatever views of it there are
        weakref.finalize(lent, self._free.append, memory).atexit = False
        np.copyto(lent, tensor.numpy())
        return torch.from_numpy(lent)


def next_stage() -> None:
    """Inside ``record()``: results from before the last stage are no longer needed, and their memory is used again.

    Keeps the memory of a deep model's activations small enough for the caches.
    """
    if recording := getattr(_this_thread, "recording", None):
        recording.next_stage()


def new_result(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor for an op's result, of the device and, unless told otherwise, the dtype of ``like``."""
    recording = getattr(_this_thread, "recording", None)
    dtype = dtype or like.dtype
    return like.new_empty(shape, dtype=dtype) if recording is None else recording.new_result(like, shape, dtype)


def scratch(like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """What makes the scratch memory that a kernel asks for, of so many bytes."""
    return lambda size: new_result(like, size, dtype=torch.uint8)
