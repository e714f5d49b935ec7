"""Plain and speculative decoding, timed in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_FEWEST, _MOST = 5, 31  # pairs of runs
_FEWEST_OF_SLOW, _SLOW_S = 3, 30.0  # fewer pairs are enough when they have taken so long
_SPREAD = 0.05  # of the middle half of the ratios, over their median: narrow enough


@dataclass
class Comparison:
    """Tokens per second of pairs of runs, the first of which was made right before the second."""

    plain: list[float]
    drafted: list[float]

    @property
    def ratios(self) -> list[float]:
        return [drafted / plain for plain, drafted in zip(self.plain, self.drafted, strict=True)]

    @property
    def converged(self) -> bool:
        """Whether the spread of the ratios is known and narrow."""
        if len(self.ratios) < _FEWEST:
            return False
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return high - low <= _SPREAD * middle


def compare(plain: Callable[[], float], drafted: Callable[[], float]) -> Comparison:
    """Times two kinds of runs, which return tokens per second, in turn until the spread of their ratio is known.

    Before that each runs once untimed: first runs allocate, record and fill caches.
    """
    plain(), drafted()
    comparison, started = Comparison([], []), time.perf_counter()
    while len(comparison.plain) < _MOST and not comparison.converged:
        comparison.plain.append(plain())
        comparison.drafted.append(drafted())
        if time.perf_counter() - started > _SLOW_S and len(comparison.plain) >= _FEWEST_OF_SLOW:
            break
    return comparison
