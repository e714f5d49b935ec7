"""Interleaved medians, and the machine's own bandwidth."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

_SPIN_S = 0.025

T = TypeVar("T")


def interleaved_medians(functions: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed_turn(function))
    return {name: statistics.median(values) for name, values in times.items()}


def timed_turn(function: Callable[[], object]) -> float:
    """Seconds of a call after untimed ones: after a call to PyTorch its OpenMP threads keep spinning for some
    milliseconds, which takes cores from whatever comes next."""
    spun = time.perf_counter() + _SPIN_S
    while time.perf_counter() < spun:
        function()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class MemoryReader:
    """Reads a large float32 tensor with all threads, in the faster of two ways: the limit of a kernel that reads."""

    def __init__(self) -> None:
        self._data = torch.ones(64 * 1024 * 1024, dtype=torch.float32, device="cpu")
        ways = {"sum": self._data.sum, "dot": lambda: torch.dot(self._data, self._data)}
        times = interleaved_medians(ways, rounds=5)
        self._read = ways[min(times, key=times.__getitem__)]

    def __call__(self) -> None:
        self._read()

    def gb_per_s(self, seconds: float) -> float:
        """10⁹ bytes per second of a call that took so long."""
        return self._data.nbytes / seconds / 1e9


def read_bandwidth_gb_per_s(rounds: int = 9) -> float:
    """Best rate at which this machine reads memory with all threads, in 10⁹ bytes per second."""
    reader = MemoryReader()
    return reader.gb_per_s(min(timed_turn(reader) for _ in range(rounds)))


def rotate(weights: list[T]) -> Callable[[], T]:
    """Each call gives the next weight, so that no timed call finds its weights in a cache."""
    state = {"next": 0}

    def next_weight() -> T:
        state["next"] = (state["next"] + 1) % len(weights)
        return weights[state["next"]]

    return next_weight
