"""A whole round as one CUDA graph, and rounds queued ahead of the host."""

import contextlib
import functools
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...models.identity import options_of, weights_of
from ...models.language_model import MambaLM
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


class PendingRound:
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

    def __init__(self, max_captured: int = 4) -> None:
        if not is_int(max_captured) or max_captured < 1:
            raise ValueError(f"max_captured must be a whole number of at least 1, got {max_captured!r}")
        super().__init__()
        self._max_captured = max_captured
        self._captured: OrderedDict[tuple, CapturedRound] = OrderedDict()
        self._pending: deque[PendingRound] = deque()
        self._current: CapturedRound | None = None

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

    def prepare(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        self._pending.clear()
        self._output_logits = output_logits
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
        if captured is None or captured.fingerprint != _fingerprint(captured.round):
            captured = None  # frees its memory before more is asked for
            while len(self._captured) >= self._max_captured:
                self._captured.popitem(last=False)
            round = make()
            captured = CapturedRound(key, round, _fingerprint(round))
        captured.round.retire_all()
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

    def launch(self, lookahead: int) -> None:
        with current_device(self._current.round.state.last):
            self._pending.append(self._send(self._current.replays[lookahead]))

    def _send(self, replay: Callable[[], RoundResult]) -> PendingRound:
        return PendingRound(replay, self._output_logits)

    @property
    def pending(self) -> int:
        return len(self._pending)

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        result, record, seconds = self._pending.popleft().wait()
        return replace(result, draft_s=0.0, verify_s=0.0), record, seconds  # a whole round is one call

    def close(self) -> None:
        self._pending.clear()
        self._current = None


def _replay(graph: torch.cuda.CUDAGraph, result: RoundResult) -> RoundResult:
    graph.replay()
    return result


def _fingerprint(round: Round) -> list:
    """Of the models, what a captured round takes for granted: where weights lie and how, and options of a cache. Their
    memory is kept, as rounds that wait would read it."""
    models = [model for model in (round.target, round.draft and round.draft.model) if isinstance(model, MambaLM)]
    tensors = [tensor for model in models for tensor in weights_of(model)]
    return [*map(options_of, models), *map(_Memory.of, tensors)]


@dataclass
class _Memory:
    """Where a tensor lies, and how; keeps that memory."""

    layout: tuple
    storage: torch.UntypedStorage = field(compare=False)

    @staticmethod
    def of(tensor: torch.Tensor) -> "_Memory":
        layout = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        return _Memory(layout, tensor.untyped_storage())
