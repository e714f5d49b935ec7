"""Rounds kernel by kernel."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...models.identity import memory_of
from ...ops.values import is_int
from ..round import Round, RoundResult
from .base import Executor


class EagerExecutor(Executor):
    """Runs each round when it is launched.

    max_recorded: kinds of rounds that stay in memory after a call that came to its end outside of
    ``torch.inference_mode``, with caches and models, so that a later call finds them recorded; ``clear`` frees them. A
    kind is models, batch, lookaheads, acceptance, and which of sampling, penalties and biases there are. A round is
    recorded anew when a weight or an option of a model is another. "eager", by its name, keeps none.
    """

    queue_depth = 0
    captures = False

    def __init__(self, max_recorded: int = 2) -> None:
        if not is_int(max_recorded) or max_recorded < 0:
            raise ValueError(f"max_recorded must be a whole number of at least 0, got {max_recorded!r}")
        super().__init__()
        self._max_recorded = max_recorded
        self._recorded: OrderedDict[tuple, tuple[Round, list]] = OrderedDict()  # and what they rely on
        self._candidate: tuple | None = None  # is recorded if the call comes to its end

    def __reduce__(self) -> tuple:
        return type(self), (self._max_recorded,)

    def clear(self) -> None:
        """Frees the rounds and their memory."""
        self.refuse_callbacks()
        with self._turn:
            self._recorded.clear()

    def prepare(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> Round:
        self._pending.clear()
        round, fingerprint = self._recorded.pop(key, (None, None))
        if round is None or fingerprint != list(map(memory_of, round.models)):
            round = None  # frees its memory before more is asked for
            round = make()
            fingerprint = list(map(memory_of, round.models)) if self._max_recorded and round.recorded else None
        round.state.leave_out()
        self._candidate = None if fingerprint is None else (key, round, fingerprint)
        self._current = round
        return round

    def keep(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is None or torch.is_inference_mode_enabled():  # what grew in there cannot be used outside
            return
        key, *kept = candidate
        self._recorded[key] = tuple(kept)
        if len(self._recorded) > self._max_recorded:
            self._recorded.popitem(last=False)

    def close(self) -> None:
        super().close()
        self._candidate = None

    def launch(self, lookahead: int, output_logits: bool) -> None:
        self._pending.append(_Done(time.perf_counter(), self._current.run(lookahead)))


class _Done(NamedTuple):
    """A round that was run, and when it began."""

    began: float
    result: RoundResult

    def wait(self) -> tuple[RoundResult, list[list[int]], float]:
        record = self.result.record.tolist()
        return self.result, record, time.perf_counter() - self.began
