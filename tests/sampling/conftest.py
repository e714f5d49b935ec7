"""Models of six tokens whose probabilities are tables, the same by hand in float64, and a chi-square test of what is
drawn.

A row of a table holds weights, e to the power of the logits. They sum to 3, so that logits of both signs occur.
"""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch

from speculative_mamba.decode import Drafter, NgramDrafter
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.sampling import probs_by_hand
from speculative_mamba.testing.scripted import ScriptedDraft

VOCABULARY = 6
FIRST = 3  # tokens that are tested together
DRAFTS = {  # seed, sharpness and share of zeros of the draft's table
    "equal": (0, 1.5, 0.2),
    "sharper": (0, 3.0, 0.2),
    "other": (1, 1.5, 0.0),
    "narrow": (2, 1.5, 0.7),
}


def table(seed: int, sharpness: float = 1.5, zeros: float = 0.0, support: slice = slice(None)) -> torch.Tensor:
    """Row t weighs the tokens after t; ``zeros`` of them, though never all, and those outside ``support`` weigh 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64) * sharpness
    dropped = torch.rand(VOCABULARY, VOCABULARY, generator=generator) < zeros
    dropped[torch.arange(VOCABULARY), logits.argmax(-1)] = False
    outside = torch.ones(VOCABULARY, dtype=torch.bool)
    outside[support] = False
    return 3 * torch.softmax(logits.masked_fill(dropped | outside, -torch.inf), -1)


def filter_by_hand(
    weights: list[float], prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **params: object
) -> list[float]:
    """Probabilities of tokens with these weights, after a text."""
    logits = [math.log(weight) if weight > 0 else -math.inf for weight in weights]
    return probs_by_hand(logits, SamplingParams(**{"temperature": 1.0, **params}), prompt, generated)


def joint_probs_by_hand(rows: torch.Tensor, prompt: list[int], **params: object) -> torch.Tensor:
    """Probability (6, 6, 6) of the first three tokens after ``prompt``."""
    weights = rows.tolist()
    given = tuple(prompt) if SamplingParams(**params).penalised else ()

    @functools.cache
    def probs(last: int, generated: tuple[int, ...]) -> list[float]:
        return filter_by_hand(weights[last], given, generated, **params)

    joint = torch.zeros((VOCABULARY,) * FIRST, dtype=torch.float64)
    for path in itertools.product(range(VOCABULARY), repeat=FIRST):
        probability, last = 1.0, prompt[-1]
        for at, token in enumerate(path):
            probability *= probs(last, tuple(sorted(path[:at])) if given else ())[token]
            last = token
        joint[path] = probability
    return joint


def chi_square_p_value(drawn: torch.Tensor, joint: torch.Tensor) -> float:
    """How likely a sample at least this far from the probabilities is. Cells that expect fewer than 5 count as one.

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


def target_table_for(draft: str | None) -> torch.Tensor:
    """The target's weights; against a disjoint draft they are on tokens 0 to 2."""
    return table(0, support=slice(3)) if draft == "disjoint" else table(*DRAFTS["equal"])


def draft_named(name: str | None, prompt: list[int], rows: int) -> TableModel | Drafter | None:
    if name is None:
        return None
    if name == "scripted":  # certain of tokens that the target finds likely, unlikely and impossible
        texts = [[*prompt, row % 6, row // 6 % 6, row // 36 % 6, 0, 1, 2, 3] for row in range(rows)]
        return ScriptedDraft(texts, VOCABULARY, lambda row, position: True)
    if name == "ngram":  # certain of what followed before; rows that have nothing to copy repeat a token
        return NgramDrafter(VOCABULARY, shortest=1)
    if name == "disjoint":
        return TableModel(table(3, support=slice(3, None)))
    return TableModel(table(*DRAFTS[name]))


@pytest.fixture
def make_table() -> Callable[..., torch.Tensor]:
    """make_table(seed, sharpness, zeros, support)"""
    return table


@pytest.fixture
def by_hand() -> Callable[..., list[float]]:
    """by_hand(weights, prompt, generated, **params)"""
    return filter_by_hand


@pytest.fixture
def joint_probs() -> Callable[..., torch.Tensor]:
    """joint_probs(rows, prompt, **params)"""
    return joint_probs_by_hand


@pytest.fixture
def p_value() -> Callable[..., float]:
    """p_value(drawn, joint)"""
    return chi_square_p_value


@pytest.fixture
def target_table() -> Callable[..., torch.Tensor]:
    """target_table(name of the draft)"""
    return target_table_for


@pytest.fixture
def make_draft() -> Callable[..., object]:
    """make_draft(name, prompt, rows); names: equal, sharper, other, narrow, disjoint, scripted, ngram, None"""
    return draft_named
