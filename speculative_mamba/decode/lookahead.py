"""How many tokens to draft in the next round."""

import statistics
from collections import defaultdict, deque

AUTO_AT_MOST = 10


class FixedLookahead:
    """The same K in every round."""

    def __init__(self, most: int) -> None:
        self.most = most

    def next(self) -> int:
        return self.most

    def observe(self, drafts: int, tested: int, accepted: int, draft_s: float, verify_s: float) -> None: ...


class AdaptiveLookahead:
    """K from running acceptance and measured costs: the one that promises most tokens per second.

    With acceptance rate α, K drafted tokens give (1 - α^(K+1)) / (1 - α) tokens a round. A round costs K draft steps
    and one pass over K+1 tokens, both as timed in this run; passes not yet tried lie on a line through those that were.
    ``next`` is at least 1 while the draft is in use. When even a hopeful estimate of α promises less than plain
    decoding, timed once in that case, the draft is dropped for the rest of the run and ``next`` is 0.
    """

    # Two rounds each at two lookaheads give the line two points; the first pass of a kind takes longer and is not
    # counted. The second point lies where the first rounds suggest.
    _FIRST, _SECOND_LOW, _SECOND_HIGH = 4, 2, 7
    _MEMORY = 0.99  # weight of a tested token after each further one: about a hundred count
    _SLOPE = 0.08  # cost of one more token in a pass, as a share of it, until a second point is known
    _HOPE = 1.5  # standard errors

    def __init__(self, most: int) -> None:
        self.most = most
        self._tested, self._accepted = 2.0, 1.4  # before anything is known
        self._passes: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=9))
        self._steps: deque[float] = deque(maxlen=9)
        self._to_measure = [self._FIRST, self._FIRST]
        self._second_point = False
        self._plain_rounds = 0
        self._dropped = False

    def next(self) -> int:
        if self._dropped or self._plain_rounds:
            return 0
        if not self._steps:
            return min(self._FIRST, self.most)
        rate = self._accepted / self._tested
        error = (max(rate * (1 - rate), 0.04) / self._tested) ** 0.5
        hope = 1.0 if self._to_measure else min(rate + self._HOPE * error, 1.0)
        if max(self._speed(k, hope) for k in range(1, self.most + 1)) * self._pass_s(1) < 1:
            self._dropped = len(self._passes[1]) > 1
            self._plain_rounds = 0 if self._dropped else 2
            return 0
        if self._to_measure:
            return min(self._to_measure[0], self.most)
        return max(range(1, self.most + 1), key=lambda k: self._speed(k, rate))

    def observe(self, drafts: int, tested: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """One round: ``drafts`` proposed per row; ``tested``, ``accepted`` of all rows; seconds of draft and rest."""
        fade = self._MEMORY**tested
        self._tested, self._accepted = self._tested * fade + tested, self._accepted * fade + accepted
        self._passes[drafts + 1].append(verify_s)
        if drafts:
            self._steps.append(draft_s / drafts)
            self._to_measure = self._to_measure[1:]
            if not self._to_measure and not self._second_point:
                self._second_point = True
                high = self._accepted / self._tested > 0.8
                self._to_measure = [self._SECOND_HIGH if high else self._SECOND_LOW] * 2
        else:
            self._plain_rounds = max(0, self._plain_rounds - 1)

    def _speed(self, drafts: int, rate: float) -> float:
        tokens = sum(rate**k for k in range(drafts + 1))
        return tokens / (drafts * statistics.median(self._steps) + self._pass_s(drafts + 1))

    def _pass_s(self, tokens: int) -> float:
        """Seconds of a pass over ``tokens`` tokens."""
        known = {t: statistics.median([*times][1:]) for t, times in self._passes.items() if len(times) > 1}
        known = known or {t: times[0] for t, times in self._passes.items() if times}
        if tokens in known:
            return known[tokens]
        if len(known) == 1:
            [(t, seconds)] = known.items()
            return seconds * (1 + self._SLOPE * (tokens - t))
        slope, intercept = statistics.linear_regression(*zip(*known.items(), strict=True))
        return max(intercept + slope * tokens, min(known.values()) / 2)
