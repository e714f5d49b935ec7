"""Who runs the rounds of ``generate``: at once, or queued ahead."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

from .round import Round, RoundResult


class Same:
    """A key that an object is equal to itself by, and that keeps it: no later object can have its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Executor(ABC):
    """Runs rounds in their order, of one call of ``generate`` at a time: ``with executor:`` waits for other threads.

    lag: how many rounds may be waiting to be collected while others are queued. With ``fixed`` only lookaheads that
    ``open`` was told may be launched, and rounds are not re-run as Python: what a round reads must be on the device.
    """

    lag: int
    fixed: bool

    def __init__(self) -> None:
        self._turn = threading.RLock()

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copy has rounds of its own

    # ``with`` calls the lock's own functions, which are not Python: no signal can come between taking it and the block,
    # nor between the block and giving it back.
    @property
    def __enter__(self) -> Callable:
        self.refuse_callbacks()
        return self._turn.__enter__

    @property
    def __exit__(self) -> Callable:
        return self._turn.__exit__

    def refuse_callbacks(self) -> None:
        """
        Raises:
            ValueError: this thread is within a call that runs here.
        """
        if self._turn._is_owned():
            raise ValueError("a callback of generate cannot use the same executor; give it an executor of its own")

    @abstractmethod
    def open(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        """A round for a call of ``generate``, all of whose rows are left out; it may be that of an earlier call with
        the same key, and what that left behind is forgotten. entries: tokens that the longest text may have."""

    def fits(self, entries: int) -> bool:
        """Whether the longest text may have so many tokens."""
        return True

    def grow(self, entries: int) -> None:
        """Makes room for so many, while no round is waiting."""
        raise NotImplementedError

    @abstractmethod
    def launch(self, drafts: int) -> None:
        """Queues a round."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Rounds that were launched and not collected."""

    @abstractmethod
    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        """The oldest round that waits, its record read back, and its seconds."""

    @abstractmethod
    def close(self) -> None:
        """The call has ended; rounds that wait are forgotten."""


class EagerExecutor(Executor):
    """Runs each round when it is launched, kernel by kernel."""

    lag, fixed = 0, False

    def __init__(self) -> None:
        super().__init__()
        self._results: deque[tuple[RoundResult, float]] = deque()
        self._round: Round | None = None

    def open(
        self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int], output_logits: bool
    ) -> Round:
        self._results.clear()
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
