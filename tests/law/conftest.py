"""Laws of six tokens, computed by hand in float64, and a chi-square test of what the loop draws from them."""

import itertools
from collections.abc import Callable

import pytest
import torch

VOCABULARY = 6
FIRST = 3  # tokens whose joint law is tested


def table(seed: int, sharpness: float = 1.5, zeros: float = 0.0) -> torch.Tensor:
    """Row t is the law of the token after t; ``zeros`` of the entries, at least one short of all, are exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64) * sharpness
    dropped = torch.rand(VOCABULARY, VOCABULARY, generator=generator) < zeros
    dropped[torch.arange(VOCABULARY), logits.argmax(-1)] = False
    return torch.softmax(logits.masked_fill(dropped, -torch.inf), -1)


def filter_by_hand(law: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then the k likeliest, renormalised, then the smallest set that reaches p; ties: lowest id first."""
    powered = [p ** (1 / temperature) for p in law]
    order = sorted(range(len(law)), key=lambda token: (-powered[token], token))
    kept = order[: top_k or None]
    total = sum(powered[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= top_p:
            break
        nucleus.append(token)
        reached += powered[token] / total
    total = sum(powered[token] for token in nucleus)
    return [powered[token] / total if token in nucleus else 0.0 for token in range(len(law))]


def joint_law(rows: torch.Tensor, prompt: int, **filters: float) -> torch.Tensor:
    """Probability (6, 6, 6) of the first three tokens after ``prompt``."""
    laws = [filter_by_hand(row.tolist(), **filters) for row in rows]
    joint = torch.zeros((VOCABULARY,) * FIRST, dtype=torch.float64)
    for path in itertools.product(range(VOCABULARY), repeat=FIRST):
        probability, last = 1.0, prompt
        for token in path:
            probability, last = probability * laws[last][token], token
        joint[path] = probability
    return joint


def chi_square_p_value(drawn: torch.Tensor, joint: torch.Tensor) -> float:
    """How likely a sample at least this far from the law is. Cells that expect fewer than 5 are counted as one.

    drawn: (samples, 3). 0 if something was drawn that cannot be.
    """
    index = (drawn * torch.tensor([36, 6, 1])).sum(1)
    observed = torch.bincount(index, minlength=joint.numel()).double()
    expected = joint.flatten() * len(drawn)
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 5
    if expected[rare].sum() >= 5:
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    else:
        observed, expected = observed[~rare], expected[~rare]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(len(expected) - 1, 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.fixture
def make_table() -> Callable[..., torch.Tensor]:
    return table


@pytest.fixture
def by_hand() -> Callable[..., list[float]]:
    return filter_by_hand


@pytest.fixture
def p_value() -> Callable[..., float]:
    """p_value(drawn, rows, prompt, temperature, top_k, top_p)"""
    return lambda drawn, rows, prompt, **filters: chi_square_p_value(drawn, joint_law(rows, prompt, **filters))
