"""How many tokens to draft in the next round."""

import functools
import statistics
from collections import deque
from collections.abc import Hashable, Sequence

AUTO_LOOKAHEADS = (0, 1, 2, 3, 4, 5, 7, 10)
AUTO_AT_MOST = AUTO_LOOKAHEADS[-1]


def as_lookahead(lookahead: int | str, limit: int, costs: Hashable = None) -> "AdaptiveLookahead | FixedLookahead":
    """What chooses K for ``generate``: a number or "auto", at most ``limit``.

    costs: what those of rounds are remembered by, so that with "auto" a later call knows what an earlier one has
    measured; None for none.
    """
    if lookahead != "auto":
        return FixedLookahead(min(int(lookahead), limit))
    allowed = [k for k in AUTO_LOOKAHEADS if k <= limit]
    if len(allowed) < 2:
        return FixedLookahead(0)
    return AdaptiveLookahead(allowed, None if costs is None else remembered_costs(costs))


@functools.lru_cache(maxsize=64)
def remembered_costs(costs: Hashable) -> dict[int, deque[float]]:
    return {}


class FixedLookahead:
    """The same K in every round."""

    dropped = False

    def __init__(self, lookahead: int) -> None:
        self.all = (lookahead,)

    def next(self) -> int:
        return self.all[0]

    def observe(self, drafts: int, tested: int, accepted: int, seconds: float) -> None: ...


class AdaptiveLookahead:
    """Of a few lookaheads K the one that promises most tokens per second, from running acceptance and measured costs.

    With acceptance rate α, K drafted tokens give (1 - α^(K+1)) / (1 - α) tokens a round. Rounds cost what they took in
    this run or in earlier ones; the first of a K in a run takes longer (memory, caches, compilers), so it is no
    evidence. Those of a K not yet measured lie on a line through the others, behind the longest of which it rises half
    as fast: the more tokens a pass has, the fewer are the experts that one token more adds. To draw it where nothing is
    known, two rounds are plain decoding, after the first of three that draft, one of which may be disturbed. When these
    plans are measured and even a hopeful estimate of α promises less than plain decoding, the draft is ``dropped`` for
    the rest of the run and ``next`` is 0.

    lookaheads: in rising order, from 0 on. costs: seconds of the last rounds of each K, added to. ``observe`` may come
    a few rounds after ``next``.
    """

    _FIRST = 3
    _MEMORY = 0.99  # weight of a tested token after each further one: about a hundred count
    _HOPE = 1.5  # standard errors

    def __init__(self, lookaheads: Sequence[int], costs: dict[int, deque[float]] | None = None) -> None:
        self.all = tuple(lookaheads)
        self.dropped = False
        self._first = max(k for k in self.all if k <= self._FIRST)
        self._costs = {} if costs is None else costs
        self._cold = set(self.all)  # K of which no round has run
        self._to_try = deque([] if self._measured() else [self._first, 0, 0, self._first, self._first])
        self._tested, self._accepted = 2.0, 1.4  # before anything is known

    def _measured(self) -> bool:
        return len(self._costs.get(0, ())) > 0 and len(self._costs.get(self._first, ())) > 1

    def next(self) -> int:
        if self.dropped:
            return 0
        if self._to_try:
            return self._to_try.popleft()
        if not self._measured():
            return self._first
        known = {k: statistics.median_low(times) for k, times in self._costs.items()}
        rate = self._accepted / self._tested
        error = (max(rate * (1 - rate), 0.04) / self._tested) ** 0.5
        hope = min(rate + self._HOPE * error, 1.0)
        self.dropped = max(self._speed(k, hope, known) for k in self.all[1:]) < self._speed(0, hope, known)
        return 0 if self.dropped else max(self.all[1:], key=lambda k: self._speed(k, rate, known))

    def observe(self, drafts: int, tested: int, accepted: int, seconds: float) -> None:
        """One round: ``drafts`` proposed per row; ``tested``, ``accepted`` of all rows; what it took."""
        fade = self._MEMORY**tested
        self._tested, self._accepted = self._tested * fade + tested, self._accepted * fade + accepted
        if drafts in self._cold:
            self._cold.remove(drafts)
        else:
            self._costs.setdefault(drafts, deque(maxlen=8)).append(seconds)

    def _speed(self, drafts: int, rate: float, known: dict[int, float]) -> float:
        tokens = sum(rate**k for k in range(drafts + 1))
        if drafts in known:
            return tokens / known[drafts]
        slope, intercept = statistics.linear_regression(*zip(*known.items(), strict=True))
        longest = min(drafts, max(known))
        return tokens / max(intercept + slope * (longest + drafts) / 2, min(known.values()))
