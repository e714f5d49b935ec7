"""Kernel calls recorded once and run again without Python between them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .backend import extension

_this_thread = threading.local()


class Recording:
    """The calls of ops on backend ``cpu`` made inside ``record()``.

    ``run()`` makes them again on the same memory: what lies in the tensors may have changed, their addresses and shapes
    may not. Tensors that ops returned are kept alive; the caller keeps those it passed. PyTorch's own operations are
    not recorded.
    """

    def __init__(self) -> None:
        self._program = extension()[0].Program()
        self._results: list[torch.Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        self._program.record(self._program)
        _this_thread.results = self._results
        try:
            yield
        finally:
            self._program.record(None)
            _this_thread.results = None

    def run(self) -> None:
        self._program.run(torch.get_num_threads())


def new_result(*shape: int) -> torch.Tensor:
    """An uninitialised float32 tensor for an op's result."""
    result = torch.empty(*shape)
    results = getattr(_this_thread, "results", None)
    if results is not None:
        results.append(result)
    return result
