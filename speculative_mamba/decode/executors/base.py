"""What runs the rounds of a batch."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ...models.runner import LanguageModel
from ..round import Round, RoundResult


class PendingRound(Protocol):
    """A round that was launched."""

    def wait(self) -> tuple[RoundResult, list[list[int]], float]:
        """When it has run: its result, the record read back, and its seconds."""


class Executor(ABC):
    """Runs rounds in their order, of one batch at a time: ``with executor:`` waits for other threads.

    queue_depth: how many rounds may be pending while others are queued. captures: only lookaheads that ``prepare`` was
    told may be launched, and rounds are not re-run as Python: what a round reads must be on the device.
    """

    queue_depth: int
    captures: bool

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._pending: deque[PendingRound] = deque()
        self._current: object = None  # what rounds of the present batch run on

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

    def check(self, models: Sequence[LanguageModel], processor: object) -> None:  # noqa: B027 - eager runs all
        """
        Raises:
            ValueError: rounds of these models, target first, or with this ``logits_processor`` cannot run here.
        """

    @abstractmethod
    def prepare(self, key: tuple, make: Callable[[], Round], entries: int, lookaheads: Sequence[int]) -> Round:
        """A round, all of whose rows are left out; it may be an earlier one with the same key, and what a call that
        broke off left behind is forgotten. entries: tokens that the longest text may have."""

    def fits(self, entries: int) -> bool:
        """Whether the longest text may have so many tokens."""
        return True

    def grow(self, entries: int) -> None:
        """Makes memory for so many, while no round is pending."""
        raise NotImplementedError

    @abstractmethod
    def launch(self, lookahead: int, output_logits: bool) -> None:
        """Queues a round. output_logits: its logits are still there when it is collected."""

    @property
    def pending(self) -> int:
        """Rounds that were launched and not collected."""
        return len(self._pending)

    def collect(self) -> tuple[RoundResult, list[list[int]], float]:
        """The oldest pending round, its record read back, and its seconds."""
        return self._pending.popleft().wait()

    def keep(self) -> None:  # noqa: B027 - not every executor keeps rounds
        """All rounds of a call are done and nothing went wrong: what it ran on may serve a later one."""

    def close(self) -> None:
        """No more rounds of this batch; those that are pending are forgotten."""
        self._pending.clear()
        self._current = None
