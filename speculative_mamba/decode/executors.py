"""Who runs the rounds of ``generate``: at once, or queued ahead."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .round import Round, RoundResult


class Same:
    """A key that an object is equal to itself by, and that keeps it: no later object can have its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Executor(Protocol):
    """Runs rounds in their order.

    lag: how many rounds may be waiting to be collected while others are queued. With ``fixed`` only lookaheads that
    ``open`` was told may be launched, and rounds are not re-run as Python: what a round reads must be on the device.
    """

    lag: int
    fixed: bool

    def open(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        """A round for a call of ``generate``, all of whose rows are left out; it may be that of an earlier call with
        the same key. entries: tokens that the longest text will have."""

    def launch(self, drafts: int) -> None:
        """Queues a round."""

    @property
    def waiting(self) -> int:
        """Rounds that were launched and not collected."""

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        """The oldest round that waits, its record read back, and its seconds."""

    def close(self) -> None:
        """The call has ended; rounds that wait are forgotten."""


class EagerExecutor:
    """Runs each round when it is launched, kernel by kernel."""

    lag, fixed = 0, False

    def __init__(self) -> None:
        self._results: deque[tuple[RoundResult, float]] = deque()
        self._round: Round | None = None

    def open(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        if self._round is not None:
            raise ValueError("this executor runs another call of generate; give each call one of its own")
        self._round = make()
        return self._round

    def launch(self, drafts: int) -> None:
        began = time.perf_counter()
        self._results.append((self._round.run(drafts), began))

    @property
    def waiting(self) -> int:
        return len(self._results)

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        result, began = self._results.popleft()
        record = result.record.tolist()
        return result, record, time.perf_counter() - began

    def close(self) -> None:
        self._results.clear()
        self._round = None
