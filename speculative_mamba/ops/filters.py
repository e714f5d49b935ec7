"""What is done to logits before a token is drawn from them."""

from dataclasses import dataclass

from .values import is_number, is_whole, shown

GREEDY_BELOW = 1e-5  # a temperature this small is greedy: dividing by it would overflow


@dataclass(frozen=True)
class Filters:
    """From logits to a law, in this order. The defaults are greedy.

    repetition_penalty: logits of tokens that the text holds already, prompt included, are divided by it if positive,
    else multiplied (Keskar et al. 2019, arXiv 1909.05858); above 1 repeats less, 1 changes nothing.
    temperature: 0 (or up to 1e-5) is greedy, 1 the model's own law. top_k: keep the k likeliest tokens, 0 keeps all;
    1 is greedy. top_p: keep the fewest tokens whose probability reaches p. min_p: keep tokens of at least p times the
    probability of the likeliest, 0 keeps all. Filters see the law that the one before them leaves, renormalised; of
    equally likely tokens the lower id comes first. Bounds are met up to 1e-6, the rounding of float32.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature <= 1e30:
            raise ValueError(f"temperature must be from 0 (greedy) to 1e30, got {shown(self.temperature)}")
        if not is_whole(self.top_k) or not 0 <= self.top_k < 2**63:
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

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW or self.top_k == 1

    def fields(self) -> dict[str, float]:
        """As ``Filters`` of csrc/params.h has them: temperature is 0 where the choice is greedy."""
        return {
            "repetition_penalty": self.repetition_penalty,
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
        }
