"""A whole round as one CUDA graph, and rounds queued ahead of the host."""

import contextlib
import functools
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...models.identity import backend_of, memory_of
from ...models.runner import LanguageModel
from ...ops.backend import current_device
from ...ops.values import is_int
from ..round import Round, RoundResult
from .base import Executor

_POLL_S = 20e-6


@dataclass
class CapturedRound:
    """A round, its replays by lookahead, and what they rely on."""

    key: tuple
    round: Round
    fingerprint: list
    entries: int = 0  # tokens that a text may have
    replays: dict[int, Callable[[], RoundResult]] = field(default_factory=dict)
    uncaptured: set[int] = field(default_factory=set)  # lookaheads for whose graphs there was no memory
    graph_bytes: int = 0


class SentRound:
    """A record on its way to the host, and the time of its round."""

    def __init__(self, replay: Callable[[], RoundResult], output_logits: bool) -> None:
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._began.record()
        self.result = replay()
        self._record = torch.empty(self.result.record.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        self._record.copy_(self.result.record, non_blocking=True)
        if output_logits:  # the next round writes over them
            self.result = replace(self.result, logits=self.result.logits.clone())
        self._ended.record()

    def wait(self) -> tuple[RoundResult, list[list[int]], float]:
        """Result, record and seconds, when the round has run; the device has others to go on with."""
        while not self._ended.query():
            time.sleep(_POLL_S)
        return self.result, self._record.tolist(), self._began.elapsed_time(self._ended) / 1e3


class GraphExecutor(Executor):
    """Captures each kind of round once as a CUDA graph, and launches it two rounds ahead of the host.

    Nothing a round depends on is read by the host: tokens come back through pinned memory, and rounds that were queued
    behind the last token change nothing. A kind is models, batch, lookaheads and acceptance; sampling parameters are
    data. Texts may have any length; memory follows them. Graphs are captured anew when it has to move, or when a weight
    or an option of a model is another. Calls from several threads take turns.

    max_captured: kinds whose graphs, caches and models stay in memory (``nbytes``) after a call; ``clear`` frees them.
    If there is no memory for a graph, one line on stderr says so and its rounds run kernel by kernel.
    """

    queue_depth = 2
    captures = True
    device_type = "cuda"
    _sent: type = SentRound

    def __init__(self, max_captured: int = 4) -> None:
        if not is_int(max_captured) or max_captured < 1:
            raise ValueError(f"max_captured must be a whole number of at least 1, got {max_captured!r}")
        super().__init__()
        self._max_captured = max_captured
        self._captured: OrderedDict[tuple, CapturedRound] = OrderedDict()

    def __reduce__(self) -> tuple:
        return type(self), (self._max_captured,)

    @property
    def nbytes(self) -> int:
        """Memory of all captured kinds: caches, texts of n-gram drafts, what lies between kernels, and the graphs."""
        captured = self._captured.values()
        return sum(t.nbytes for one in captured for t in one.round.tensors()) + sum(one.graph_bytes for one in captured)

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        self.refuse_callbacks()
        with self._turn:
            self._captured.clear()

    def check(self, models: Sequence[LanguageModel], processor: object) -> None:
        device = models[0].device
        if device.type != self.device_type:
            raise ValueError(f"executor 'graph' needs a CUDA device, and the model is on {device}; use 'eager'")
        if device.type == "cuda" and "reference" in map(backend_of, models):
            raise ValueError("executor 'graph' needs backend cuda or triton; 'reference' reads values on the host")
        if processor is not None:
            raise ValueError("a logits_processor is Python and cannot be in a CUDA graph; use executor='eager'")

    def prepare(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> Round:
        self._pending.clear()
        self._current = self._prepare_or_evict(key, make, entries, lookaheads)
        return self._current.round

    def _prepare_or_evict(self, *arguments: object) -> CapturedRound:
        """A second time without other kinds, if there is no memory beside them."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._prepare(*arguments)
        self._captured.clear()
        torch.cuda.empty_cache()
        return self._prepare(*arguments)

    def _prepare(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> CapturedRound:
        captured = self._captured.pop(key, None)
        if captured is None or captured.fingerprint != list(map(memory_of, captured.round.models)):
            captured = None  # frees its memory before more is asked for
            while len(self._captured) >= self._max_captured:
                self._captured.popitem(last=False)
            round = make()
            captured = CapturedRound(key, round, list(map(memory_of, round.models)))
        captured.round.state.leave_out()
        self._reserve(captured, entries, lookaheads)
        self._captured[key] = captured  # complete: what fails half way is not kept
        return captured

    def _reserve(self, captured: CapturedRound, entries: int, lookaheads: Iterable[int]) -> None:
        """Memory for texts of so many tokens, and replays that work on it."""
        with current_device(captured.round.state.last):
            if captured.round.reserve(entries):
                captured.replays.clear()
                captured.graph_bytes = 0
            captured.entries = entries
            for lookahead in lookaheads:
                if lookahead not in captured.replays or lookahead in captured.uncaptured:
                    with captured.round.held():
                        captured.replays[lookahead] = self._capture(captured, lookahead)

    def fits(self, entries: int) -> bool:
        return entries <= self._current.entries

    def grow(self, entries: int) -> None:
        captured = self._current
        self._captured.pop(captured.key)  # until it is complete again
        self._reserve(captured, entries, tuple(captured.replays))
        self._captured[captured.key] = captured

    def _capture(self, captured: CapturedRound, lookahead: int) -> Callable[[], RoundResult]:
        eagerly = functools.partial(captured.round.run, lookahead)
        free = torch.cuda.mem_get_info()[0]
        try:
            eagerly()  # compiles kernels and sets up libraries, which a capture could not hold
            graph = torch.cuda.CUDAGraph()
            pool = next((replay.args[0].pool() for replay in captured.replays.values() if replay.func is _replay), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = eagerly()
            graph.replay()  # the first time it is also brought to the device
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            print(f"speculative_mamba: no memory for a CUDA graph, so rounds run without: {reason}", file=sys.stderr)
            captured.uncaptured.add(lookahead)
            return eagerly
        captured.uncaptured.discard(lookahead)
        captured.graph_bytes += max(0, free - torch.cuda.mem_get_info()[0])
        return functools.partial(_replay, graph, result)

    def launch(self, lookahead: int, output_logits: bool) -> None:
        with current_device(self._current.round.state.last):
            self._pending.append(self._sent(self._current.replays[lookahead], output_logits))

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        result, record, seconds = super().collect()
        return replace(result, draft_s=0.0, verify_s=0.0), record, seconds  # a whole round is one call


def _replay(graph: torch.cuda.CUDAGraph, result: RoundResult) -> RoundResult:
    graph.replay()
    return result
