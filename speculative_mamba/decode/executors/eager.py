"""Rounds kernel by kernel."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from ..round import Round, RoundResult
from .base import Executor


class EagerExecutor(Executor):
    """Runs each round when it is launched."""

    queue_depth = 0
    captures = False

    def __init__(self) -> None:
        super().__init__()
        self._results: deque[tuple[RoundResult, float]] = deque()
        self._round: Round | None = None

    def prepare(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        self._results.clear()
        self._round = make()
        return self._round

    def launch(self, lookahead: int) -> None:
        began = time.perf_counter()
        self._results.append((self._round.run(lookahead), began))

    @property
    def pending(self) -> int:
        return len(self._results)

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        result, began = self._results.popleft()
        record = result.record.tolist()
        return result, record, time.perf_counter() - began

    def close(self) -> None:
        self._results.clear()
        self._round = None
