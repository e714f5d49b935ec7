"""How a row's tokens are chosen: the user's parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from .values import is_int, is_number, shown

GREEDY_BELOW = 1e-5  # a temperature this small is greedy: dividing by it would overflow
MAX_BIAS = 1e30
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy. Logits become probabilities in this order:

    logit_bias: token id -> number that is added to its logit; -inf forbids the token. Kept as sorted pairs.
    repetition_penalty: logits of tokens that the text holds already, prompt included, are divided by it if positive,
    else multiplied (Keskar et al. 2019, arXiv 1909.05858); above 1 repeats less, 1 changes nothing.
    frequency_penalty, presence_penalty: from -2 to 2, as OpenAI defines them. A logit loses the first times the number
    of its token in the generated text, and the second if there is at least one. The prompt does not count.
    temperature: 0 (or up to 1e-5) is greedy, 1 the model's own probabilities. top_k: keep the k likeliest tokens, 0
    keeps all; 1 is greedy. top_p: keep the fewest tokens whose probability reaches p. min_p: keep tokens of at least p
    times the probability of the likeliest, 0 keeps all. Each sees the probabilities that the one before it leaves,
    renormalised; of equally likely tokens the lower id comes first. Bounds are met up to 1e-6, the rounding of float32.
    seed: a whole number from 0 to 2^63-1, or one per row. Random numbers are a function of (seed, row, position in the
    text, token), so a row's numbers depend neither on other rows nor on the draft, and no global generator is touched.
    With a seed per row, a row uses the numbers that it would use alone with that seed.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature <= 1e30:
            raise ValueError(f"temperature must be from 0 (greedy) to 1e30, got {shown(self.temperature)}")
        if not is_int(self.top_k) or not 0 <= self.top_k < 2**63:
            raise ValueError(
                f"top_k must be a whole number of at least 0 (0 keeps all tokens), got {shown(self.top_k)}"
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps all tokens), got {shown(self.top_p)}")
        if not is_number(self.min_p) or not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1) (0 keeps all tokens), got {shown(self.min_p)}")
        if not is_number(self.repetition_penalty) or not 1e-30 <= self.repetition_penalty <= 1e30:
            raise ValueError(
                f"repetition_penalty must be from 1e-30 to 1e30 (1 is none), got {shown(self.repetition_penalty)}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not is_number(value) or not -2 <= value <= 2:
                raise ValueError(f"{name} must be from -2 to 2 (0 is none), got {shown(value)}")
        for name in _FLOATS:  # a large int would be none that a tensor takes
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if isinstance(self.seed, (list, tuple)):
            object.__setattr__(self, "seed", tuple(self.seed))
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if not is_int(seed) or not 0 <= seed < 2**63:
                raise ValueError(
                    f"seed must be a whole number from 0 to 2^63-1, or one per row, got {shown(self.seed)}"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens of the text."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def of_rows(sampling: object, rows: int) -> list[tuple[SamplingParams, tuple[int, int]]]:
    """Parameters of each row, with its seed and stream. sampling: one ``SamplingParams``, or a list of one per row, of
    which each has one seed.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(sampling, SamplingParams):
        if not isinstance(sampling.seed, tuple):
            return [(sampling, (sampling.seed, row)) for row in range(rows)]
        if len(sampling.seed) != rows:
            raise ValueError(f"there are {len(sampling.seed)} seeds for {rows} rows; give one seed, or one per row")
        return [(sampling, (seed, 0)) for seed in sampling.seed]
    is_list = isinstance(sampling, list | tuple) and len(sampling) > 0
    if not is_list or not all(isinstance(params, SamplingParams) for params in sampling):
        raise ValueError(f"sampling must be SamplingParams, or a list of one per row; got {shown(sampling)}")
    if len(sampling) != rows:
        raise ValueError(f"sampling is {len(sampling)} SamplingParams for {rows} rows; give one, or one per row")
    for row, params in enumerate(sampling):
        if isinstance(params.seed, tuple):
            raise ValueError(f"in a list of sampling parameters each has one seed, got {params.seed!r} for row {row}")
    return [(params, (params.seed, 0)) for params in sampling]


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """Token ids and numbers in the order of ids, each id once."""
    try:
        pairs = [(token, value) for token, value in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias must be a dict from token ids to numbers, got {shown(bias)}") from None
    for token, value in pairs:
        if not is_int(token) or token < 0:
            raise ValueError(f"logit_bias must be a dict from token ids to numbers, got the id {shown(token)}")
        if not (is_number(value) and abs(value) <= MAX_BIAS) and not (isinstance(value, Real) and value == -math.inf):
            raise ValueError(f"logit_bias must be a number up to 1e30, or -inf; got {shown(value)} for token {token}")
    ids = [token for token, _ in pairs]
    if len(set(ids)) != len(ids):
        raise ValueError("logit_bias names a token twice")
    return tuple(sorted((int(token), float(value)) for token, value in pairs))
