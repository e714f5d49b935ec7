"""From logits to a law over tokens, and from a law to a token."""

import math
from dataclasses import dataclass

import torch

GREEDY_BELOW = 1e-5  # a temperature this small is greedy: dividing by it would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The defaults are greedy.

    temperature: 0 (or up to 1e-5) is greedy, 1 the model's own law. top_k: keep the k likeliest tokens, 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p. Filters apply in that order, each to the
    renormalised law before it; of equally likely tokens the lower id comes first. seed: any whole number from 0 to
    2^63-1; rows of a batch draw from generators of their own, and no global generator is touched.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of at least 0 (0 keeps all tokens), got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps all tokens), got {self.top_p!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63-1, got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW or self.top_k == 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def filtered_probabilities(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The law that is sampled: logits (..., V) float32 → probabilities (..., V) float32, exact zeros where filtered."""
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    vocabulary = logits.shape[-1]
    if not 0 < sampling.top_k < vocabulary and sampling.top_p == 1:
        return probabilities
    kept, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < vocabulary:
        kept[..., sampling.top_k :] = 0
        kept = kept / kept.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        before = kept.double().cumsum(-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p, 0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def draw(weights: torch.Tensor, generator: torch.Generator) -> int:
    """One token from a row of unnormalised probabilities (V), by inversion: never one of weight 0.

    Raises:
        ValueError: the weights are empty, not finite, or sum to 0.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[-1].item()
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"the probabilities sum to {total}; there is no token to draw")
    threshold = uniform(generator) * total
    index = int(torch.searchsorted(cumulative, torch.tensor(threshold, dtype=torch.float64), right=True))
    # Rounding may put the threshold at the very end: the last token of positive weight is meant.
    return index if index < len(weights) and weights[index] > 0 else int(weights.nonzero()[-1])


def uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """One generator per row, whose numbers depend on the seed and the row's index alone."""
    # torch seeds its Mersenne twister from the low 32 bits alone, so all bits of the seed are folded into those.
    start = (seed * 0x9E3779B97F4A7C15 % 2**64) >> 32
    generators = []
    for row in range(rows):
        generators.append(torch.Generator().manual_seed((start + row * 0x85EBCA6B) % 2**32))
    return generators


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, the lowest id among equals: logits (..., V) → (...) int64."""
    return logits.argmax(-1)
