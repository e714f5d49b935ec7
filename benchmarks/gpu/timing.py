"""Seconds per call inside a CUDA graph, and the card's own copy bandwidth."""

import statistics
from collections.abc import Callable

import torch

Call = Callable[[], object]

_BEYOND_L2 = 2**28  # bytes; more than twice the L2 cache of any card so far


class GraphTimer:
    """Medians over several replays of a graph of the calls, each on its own buffers.

    Graphs take turns, so that a slow moment of the card meets all of them. Before a turn as much other memory is read
    as no L2 cache holds: a call finds nothing of its buffers there unless a call before it in the graph used them.
    Calls of a graph depend on each other as calls on a stream do.
    """

    def __init__(self, rounds: int = 9) -> None:
        self._rounds = rounds
        self._other = torch.zeros(_BEYOND_L2, dtype=torch.int8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._stream = torch.cuda.Stream()  # the default one cannot be captured

    def __call__(self, contenders: dict[str, list[Call]]) -> dict[str, float]:
        pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for calls in contenders.values():  # compiles, and sets up libraries, before anything is captured
                for call in calls:
                    call()
            graphs = {name: _captured(calls, pool) for name, calls in contenders.items()}
            for graph in graphs.values():
                graph.replay()  # the first time it is also brought to the card
            times: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(self._rounds):
                for name, graph in graphs.items():
                    times[name].append(self._seconds(graph.replay) / len(contenders[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def _seconds(self, call: Call) -> float:
        self._other.max()
        begin, end = self._events
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_bandwidth_gb_per_s(self, size: int = 2**30) -> float:
        """Best rate of copying a large tensor on the card: 10⁹ bytes per second, read and written ones counted."""
        source, target = (torch.zeros(size, dtype=torch.int8, device="cuda") for _ in range(2))
        target.copy_(source)
        return 2 * size / min(self._seconds(lambda: target.copy_(source)) for _ in range(self._rounds)) / 1e9


def _captured(calls: list[Call], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    return graph
