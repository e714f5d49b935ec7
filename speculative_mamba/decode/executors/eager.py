"""Rounds kernel by kernel."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..round import Round, RoundResult
from .base import Executor


class EagerExecutor(Executor):
    """Runs each round when it is launched."""

    queue_depth = 0
    captures = False

    def prepare(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> Round:
        self._pending.clear()
        self._current = make()
        return self._current

    def launch(self, lookahead: int, output_logits: bool) -> None:
        self._pending.append(_Done(time.perf_counter(), self._current.run(lookahead)))


class _Done(NamedTuple):
    """A round that was run, and when it began."""

    began: float
    result: RoundResult

    def wait(self) -> tuple[RoundResult, list[list[int]], float]:
        record = self.result.record.tolist()
        return self.result, record, time.perf_counter() - self.began
