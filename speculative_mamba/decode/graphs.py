"""A whole round as one CUDA graph, and rounds queued ahead of the host."""

import contextlib
import functools
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..models.language_model import MambaLM
from ..ops.backend import current_device
from ..ops.filters import is_whole
from .cache import options_of, weights_of
from .executors import EagerExecutor, Executor
from .proposers import draft_model, is_ngram, is_told_the_text
from .round import Round, RoundResult
from .sampling import LogitsProcessor

_POLL_S = 20e-6


@dataclass
class Kind:
    """A round, its replays by lookahead, and what they rely on."""

    key: tuple
    round: Round
    reliances: list
    entries: int = 0  # tokens that a text may have
    replays: dict[int, Callable[[], RoundResult]] = field(default_factory=dict)
    without: set[int] = field(default_factory=set)  # lookaheads for whose graphs there was no memory
    graph_bytes: int = 0


class Arrival:
    """A record on its way to the host, and the time of its round."""

    def __init__(self, replay: Callable[[], RoundResult], output_logits: bool) -> None:
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._began.record()
        self.result = replay()
        self._record = torch.empty(self.result.record.shape, dtype=torch.int64, pin_memory=True)
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
    behind the last token change nothing. A kind is models, batch, lookaheads, sampling parameters but for the seed, and
    acceptance. Texts may have any length; memory follows them. Graphs are captured anew when it has to move, or when a
    weight or an option of a model is another. Calls from several threads take turns.

    keep: kinds whose graphs and caches stay in memory (``nbytes``) after a call; ``clear`` frees them. If there is no
    memory for a graph, one line on stderr says so and its rounds run kernel by kernel.
    """

    lag, fixed = 2, True
    device_type = "cuda"

    def __init__(self, keep: int = 4) -> None:
        if not is_whole(keep) or keep < 1:
            raise ValueError(f"keep must be a whole number of at least 1, got {keep!r}")
        super().__init__()
        self._keep = keep
        self._kinds: OrderedDict[tuple, Kind] = OrderedDict()
        self._arrivals: deque[Arrival] = deque()
        self._kind: Kind | None = None  # that it runs

    def __reduce__(self) -> tuple:
        return type(self), (self._keep,)

    @property
    def nbytes(self) -> int:
        """Memory of all captured kinds: caches, texts of n-gram drafts, what lies between kernels, and the graphs."""
        rounds = [kind.round for kind in self._kinds.values()]
        tensors = [tensor for round in rounds for tensor in round.tensors()]
        return sum(tensor.nbytes for tensor in tensors) + sum(kind.graph_bytes for kind in self._kinds.values())

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        self.refuse_callbacks()
        with self._turn:
            self._kinds.clear()

    def open(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        self._arrivals.clear()
        self._output_logits = output_logits
        self._kind = self._prepared_somehow(key, make, entries, lookaheads)
        return self._kind.round

    def _prepared_somehow(self, *arguments: object) -> Kind:
        """A second time without other kinds, if there is no memory beside them."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._prepared(*arguments)
        self._kinds.clear()
        torch.cuda.empty_cache()
        return self._prepared(*arguments)

    def _prepared(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> Kind:
        kind = self._kinds.pop(key, None)
        if kind is None or kind.reliances != _reliances(kind.round):
            kind = None  # frees its memory before more is asked for
            while len(self._kinds) >= self._keep:
                self._kinds.popitem(last=False)
            round = make()
            kind = Kind(key, round, _reliances(round))
        kind.round.reset()
        self._reserve(kind, entries, lookaheads)
        self._kinds[key] = kind  # complete: what fails half way is not kept
        return kind

    def _reserve(self, kind: Kind, entries: int, lookaheads: Iterable[int]) -> None:
        """Memory for texts of so many tokens, and replays that work on it."""
        with current_device(kind.round.places.last):
            if kind.round.reserve(entries):
                kind.replays.clear()
                kind.graph_bytes = 0
            kind.entries = entries
            for drafts in lookaheads:
                if drafts not in kind.replays or drafts in kind.without:
                    with kind.round.held():
                        kind.replays[drafts] = self._capture(kind, drafts)

    def fits(self, entries: int) -> bool:
        return entries <= self._kind.entries

    def grow(self, entries: int) -> None:
        kind = self._kind
        self._kinds.pop(kind.key)  # until it is complete again
        self._reserve(kind, entries, tuple(kind.replays))
        self._kinds[kind.key] = kind

    def _capture(self, kind: Kind, drafts: int) -> Callable[[], RoundResult]:
        eagerly = functools.partial(kind.round.run, drafts)
        free = torch.cuda.mem_get_info()[0]
        try:
            eagerly()  # compiles kernels and sets up libraries, which a capture could not hold
            graph = torch.cuda.CUDAGraph()
            pool = next((replay.args[0].pool() for replay in kind.replays.values() if replay.func is _replay), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = eagerly()
            graph.replay()  # the first time it is also brought to the device
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            print(f"speculative_mamba: no memory for a CUDA graph, so rounds run without: {reason}", file=sys.stderr)
            kind.without.add(drafts)
            return eagerly
        kind.without.discard(drafts)
        kind.graph_bytes += max(0, free - torch.cuda.mem_get_info()[0])
        return functools.partial(_replay, graph, result)

    def launch(self, drafts: int) -> None:
        with current_device(self._kind.round.places.last):
            self._arrivals.append(self._send(self._kind.replays[drafts]))

    def _send(self, replay: Callable[[], RoundResult]) -> Arrival:
        return Arrival(replay, self._output_logits)

    @property
    def waiting(self) -> int:
        return len(self._arrivals)

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        result, record, seconds = self._arrivals.popleft().wait()
        return replace(result, draft_s=0.0, verify_s=0.0), record, seconds  # a whole round is one call

    def close(self) -> None:
        self._arrivals.clear()
        self._kind = None


def _replay(graph: torch.cuda.CUDAGraph, result: RoundResult) -> RoundResult:
    graph.replay()
    return result


def _reliances(round: Round) -> list:
    """Of the models, what a captured round takes for granted: where weights lie and how, and options of a cache. Their
    memory is kept, as rounds that wait would read it."""
    models = [round.target, round.proposer and round.proposer.model]
    known = [model for model in models if isinstance(model, MambaLM)]
    tensors = [tensor for model in known for tensor in weights_of(model)]
    return [*map(options_of, known), *map(_Memory.of, tensors)]


@dataclass
class _Memory:
    """Where a tensor lies, and how; keeps that memory."""

    known: tuple
    storage: torch.UntypedStorage = field(compare=False)

    @staticmethod
    def of(tensor: torch.Tensor) -> "_Memory":
        how = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        return _Memory((tensor.data_ptr(), *how), tensor.untyped_storage())


def as_executor(executor: Executor | str, target: object, draft: object, processor: LogitsProcessor | None) -> Executor:
    """The executor of that name, if it can run this.

    Raises:
        ValueError: there is none of that name, or it cannot.
    """
    if executor == "eager":
        return EagerExecutor()
    if executor != "graph" and not isinstance(executor, Executor):
        raise ValueError(f"unknown executor {executor!r}; choose from: eager, graph")
    chosen = GraphExecutor(keep=1) if executor == "graph" else executor
    if not chosen.fixed:
        return chosen
    if isinstance(chosen, GraphExecutor) and target.device.type != chosen.device_type:
        raise ValueError(f"executor 'graph' needs a CUDA device, and the model is on {target.device}; use 'eager'")
    backends = [getattr(model, "backend", None) for model in (target, draft_model(draft))]
    if target.device.type == "cuda" and "reference" in backends:
        raise ValueError("executor 'graph' needs backend cuda or triton; 'reference' reads values on the host")
    if processor is not None:
        raise ValueError("a logits_processor is Python and cannot be in a CUDA graph; use executor='eager'")
    if is_told_the_text(draft) and not is_ngram(draft):
        name = type(draft).__name__
        raise ValueError(f"the drafter {name} is Python and cannot be in a CUDA graph; use executor='eager'")
    return chosen
