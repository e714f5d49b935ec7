"""How many tokens to draft in the next round."""

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence

AUTO_LOOKAHEADS = (0, 1, 2, 3, 4, 5, 7, 10)
AUTO_AT_MOST = AUTO_LOOKAHEADS[-1]


def as_lookahead(lookahead: int | str, limit: int) -> "AdaptiveLookahead | FixedLookahead":
    """What chooses K for ``generate``: a number or "auto", at most ``limit``."""
    if lookahead != "auto":
        return FixedLookahead(min(int(lookahead), limit))
    allowed = [k for k in AUTO_LOOKAHEADS if k <= limit]
    return AdaptiveLookahead(allowed) if len(allowed) > 1 else FixedLookahead(0)


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
    this run; the first of a K takes longer (memory, caches, compilers), so it is no evidence. Those of a K not yet
    measured lie on a line through the others, behind the longest of which it rises half as fast: the more tokens a pass
    has, the fewer are the experts that one token more adds. To draw it, two rounds are plain decoding, after the first
    of three that draft, one of which may be disturbed. When these plans are measured and even a hopeful estimate of α
    promises less than plain decoding, the draft is ``dropped`` for the rest of the run and ``next`` is 0.

    lookaheads: in rising order, from 0 on. ``observe`` may come a few rounds after ``next``.
    """

    _FIRST = 3
    _MEMORY = 0.99  # weight of a tested token after each further one: about a hundred count
    _HOPE = 1.5  # standard errors

    def __init__(self, lookaheads: Sequence[int]) -> None:
        self.all = tuple(lookaheads)
        self.dropped = False
        self._first = max(k for k in self.all if k <= self._FIRST)
        self._to_try = deque([self._first, 0, 0, self._first, self._first])
        self._tested, self._accepted = 2.0, 1.4  # before anything is known
        self._rounds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=9))

    def next(self) -> int:
        if self.dropped:
            return 0
        if self._to_try:
            return self._to_try.popleft()
        if len(self._rounds[0]) < 2 or len(self._rounds[self._first]) < 3:
            return self._first
        known = {k: statistics.median_low([*times][1:]) for k, times in self._rounds.items() if len(times) > 1}
        rate = self._accepted / self._tested
        error = (max(rate * (1 - rate), 0.04) / self._tested) ** 0.5
        hope = min(rate + self._HOPE * error, 1.0)
        self.dropped = max(self._speed(k, hope, known) for k in self.all[1:]) < self._speed(0, hope, known)
        return 0 if self.dropped else max(self.all[1:], key=lambda k: self._speed(k, rate, known))

    def observe(self, drafts: int, tested: int, accepted: int, seconds: float) -> None:
        """One round: ``drafts`` proposed per row; ``tested``, ``accepted`` of all rows; what it took."""
        fade = self._MEMORY**tested
        self._tested, self._accepted = self._tested * fade + tested, self._accepted * fade + accepted
        self._rounds[drafts].append(seconds)

    def _speed(self, drafts: int, rate: float, known: dict[int, float]) -> float:
        tokens = sum(rate**k for k in range(drafts + 1))
        if drafts in known:
            return tokens / known[drafts]
        slope, intercept = statistics.linear_regression(*zip(*known.items(), strict=True))
        longest = min(drafts, max(known))
        return tokens / max(intercept + slope * (longest + drafts) / 2, min(known.values()))
