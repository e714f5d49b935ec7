"""Guarantee 2: with any draft the text follows the target's own probabilities, by chi-square on the first three tokens.

Filters, drafts, lookahead and both ways of accepting, in 61 cases of 4000 texts, and six acceptance rates. Seeds are
fixed, so a test that passes always passes; were they drawn anew, one run of all cases in a million would raise a false
alarm.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode import sampling
from speculative_mamba.ops import sample_tokens
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.sampling import adjust_logits, probs_from_logits
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.sampling import tensors

SAMPLES, ROWS, PROMPT = 4000, 1000, [4, 2]  # texts of a case, and of a call
FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.15},
    "penalty": {"repetition_penalty": 1.6},
    "reward": {"repetition_penalty": 0.6, "temperature": 1.3},
    "top-k top-p": {"top_k": 4, "top_p": 0.7, "temperature": 0.8},
    "top-p min-p": {"top_p": 0.9, "min_p": 0.2, "temperature": 1.5},
    "top-k penalty": {"top_k": 3, "repetition_penalty": 2.0},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.9, "presence_penalty": -0.5, "top_p": 0.95},
    "bias": {"logit_bias": {0: 1.5, 2: -100, 4: -0.7}},
    "all": {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.4},
}
ACCEPTANCES = ("rejection", "coupled")
CASES = [
    *[(name, "other", 1 + (number + coupled) % 4, ACCEPTANCES[coupled])
      for number, name in enumerate(FILTERS) for coupled in (0, 1)],
    *[(filters, draft, 1 + (number + start) % 4, acceptance)
      for start, filters in enumerate(("plain", "top-k top-p", "all"))
      for number, draft in enumerate(("equal", "sharper", "narrow", "disjoint"))
      for acceptance in ACCEPTANCES if (filters, acceptance) != ("top-k top-p", "coupled")],
    *[(filters, draft, lookahead, acceptance) for draft in ("scripted", "ngram")
      for filters, lookahead in (("plain", 1), ("all", 3)) for acceptance in ACCEPTANCES],
    *[(filters, None, 1, "rejection") for filters in ("plain", "penalty", "all")],
]  # fmt: skip
RATES = [(filters, draft, acceptance) for filters, draft in (("plain", "other"), ("plain", "narrow"), ("all", "other"))
         for acceptance in ACCEPTANCES]  # fmt: skip
RIGHT = [("all", "rejection"), ("all", "coupled")]
DRAFT_TABLES = {"other": (1, 1.5, 0.0), "narrow": (2, 1.5, 0.7)}
MIX = ("plain", "top-k top-p", "penalty", "presence", "frequency", "bias", "min-p", "all")
THRESHOLD = 1e-6 / (len(CASES) + len(RATES) + len(RIGHT) + len(ACCEPTANCES) * len(MIX))


class Drawn(NamedTuple):
    """tokens: (SAMPLES, new tokens). tested, accepted: drafted tokens of all texts."""

    tokens: torch.Tensor
    tested: int
    accepted: int


@pytest.fixture
def draw(target_table, make_draft) -> Callable[..., Drawn]:
    """draw(filters, draft, lookahead, acceptance, tokens): continues the prompt many times."""

    def run(filters: str, draft: str | None, lookahead: int, acceptance: str, tokens: int = 3) -> Drawn:
        results = [
            sm.generate(
                TableModel(target_table(draft)), [PROMPT] * ROWS, draft=make_draft(draft, PROMPT, ROWS),
                lookahead=lookahead, max_new_tokens=tokens, acceptance=acceptance,
                sampling=sm.SamplingParams(**{"temperature": 1.0, **FILTERS[filters]}, seed=seed),
            )
            for seed in range(SAMPLES // ROWS)
        ]  # fmt: skip
        return Drawn(
            torch.stack([row for result in results for row in result.sequences])[:, len(PROMPT) :],
            sum(result.stats.tested for result in results), sum(result.stats.accepted for result in results),
        )  # fmt: skip

    return run


@pytest.fixture
def measure(draw, joint_probs, p_value, target_table) -> Callable[..., tuple[float, Drawn]]:
    """measure(filters, draft, lookahead, acceptance): p-value of the first three tokens, and what was drawn."""

    def run(filters: str, draft: str | None, lookahead: int, acceptance: str = "rejection") -> tuple[float, Drawn]:
        drawn = draw(filters, draft, lookahead, acceptance, tokens=max(3, lookahead + 1))
        return p_value(drawn.tokens[:, :3], joint_probs(target_table(draft), PROMPT, **FILTERS[filters])), drawn

    return run


def test_the_numbers_in_the_docstring(draw) -> None:
    assert (len(CASES), len(RATES), SAMPLES) == (61, 6, 4000) and len(set(CASES)) == len(CASES)
    assert draw("plain", None, 1, "rejection").tokens.shape == (SAMPLES, 3)
    assert {case[2] for case in CASES} == {1, 2, 3, 4}


@pytest.mark.parametrize(("filters", "draft", "lookahead", "acceptance"), CASES)
def test_joint_probs(measure, filters, draft, lookahead, acceptance) -> None:
    value, drawn = measure(filters, draft, lookahead, acceptance)
    assert value > THRESHOLD, f"p-value {value:.2e}"
    if draft == "equal":
        assert drawn.accepted == drawn.tested, "a draft with the target's probabilities is always right"
    if draft == "disjoint":
        assert drawn.accepted == 0
    if draft == "ngram":
        assert 0 < drawn.accepted < drawn.tested


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_rows_of_every_kind_in_one_batch(joint_probs, p_value, make_draft, target_table, acceptance) -> None:
    """A batch in which rows take turns with the parameters: each kind follows its own probabilities, and a greedy row
    among them is greedy."""
    kinds = [sm.SamplingParams(**{"temperature": 1.0, **FILTERS[name]}) for name in MIX]
    target, drawn = TableModel(target_table("other")), []
    greedy = sm.generate(target, [PROMPT], max_new_tokens=4).sequences[0]
    for first in range(0, 2 * SAMPLES, ROWS):
        rows = [dataclasses.replace(kinds[row % len(MIX)], seed=row) for row in range(first, first + ROWS)]
        *sequences, last = sm.generate(
            target, [PROMPT] * (ROWS + 1), draft=make_draft("other", PROMPT, ROWS + 1), lookahead=3, max_new_tokens=4,
            sampling=[*rows, sm.SamplingParams()], acceptance=acceptance,
        ).sequences  # fmt: skip
        assert torch.equal(last, greedy)
        drawn += sequences
    drawn = torch.stack(drawn)[:, len(PROMPT) :]
    for kind, name in enumerate(MIX):
        expected = joint_probs(target_table("other"), PROMPT, **FILTERS[name])
        value = p_value(drawn[kind :: len(MIX), :3], expected)
        assert value > THRESHOLD, f"{name}: p-value {value:.2e}"


def rate_by_hand(p: list[float], q: list[float], acceptance: str) -> float:
    """Rejection keeps sum(min(p, q)). Coupled: token i must win two races with the same numbers, of rates p and q."""
    if acceptance == "rejection":
        return sum(map(min, p, q))
    both = [i for i in range(len(p)) if p[i] > 0 and q[i] > 0]
    return sum(1 / sum(max(pj / p[i], qj / q[i]) for pj, qj in zip(p, q, strict=True)) for i in both)


@pytest.fixture
def deviation(draw, by_hand, target_table, make_table) -> Callable[..., float]:
    """deviation(filters, draft, acceptance): p-value of how many of the first drafted tokens were accepted."""

    def run(filters: str, draft: str, acceptance: str) -> float:
        drawn = draw(filters, draft, 1, acceptance, tokens=2)
        assert drawn.tested == SAMPLES
        tables = target_table(draft), make_table(*DRAFT_TABLES[draft])
        p, q = (by_hand(rows[PROMPT[-1]].tolist(), tuple(PROMPT), **FILTERS[filters]) for rows in tables)
        rate = rate_by_hand(p, q, acceptance)
        deviation = abs(drawn.accepted - SAMPLES * rate) / (SAMPLES * rate * (1 - rate)) ** 0.5
        return math.erfc(deviation / 2**0.5)

    return run


@pytest.mark.parametrize(("filters", "draft", "acceptance"), RATES)
def test_acceptance_rate(deviation, filters, draft, acceptance) -> None:
    """Catches: noise one position off, in draft or target."""
    assert deviation(filters, draft, acceptance) > THRESHOLD


def test_rejection_keeps_more_than_coupling() -> None:
    p, q = [0.5, 0.3, 0.2, 0.0], [0.2, 0.4, 0.3, 0.1]
    assert rate_by_hand(p, q, "rejection") > rate_by_hand(p, q, "coupled") > 0.28


# Acceptors in a few lines of PyTorch, with random numbers of their own, right and wrong.


def target_probs(logits, drafted, sampling, prompt_mask, output_counts, window) -> torch.Tensor:
    """(B, K+1, V): position j sees the text and the drafted tokens before it."""
    probs = []
    for at in range(logits.shape[1]):
        counts = output_counts
        if counts is not None:
            before = window(drafted, at)
            counts = counts.scatter_add(1, before, torch.ones_like(before, dtype=torch.int32))
        probs.append(probs_from_logits(adjust_logits(logits[:, at], sampling, prompt_mask, counts), sampling))
    return torch.stack(probs, 1)


def rejection(
    stands=lambda u, q, p: u * q < p,
    residual=lambda p, q: (p - q).clamp(min=0),
    probs_of_draft=lambda probs: probs,
    window=lambda drafted, at: drafted[:, :at],
) -> Callable:
    generator = torch.Generator().manual_seed(1)

    def accept(
        logits, drafted, draft_probs, sampling, keys, positions, *, prompt_mask, output_counts, active, **options
    ) -> tuple:
        p = target_probs(logits, drafted, sampling, prompt_mask, output_counts, window)
        if draft_probs is None:
            draft_probs = torch.nn.functional.one_hot(drafted, p.shape[-1]).float()
        draft_probs = probs_of_draft(draft_probs)
        rows, lookahead = drafted.shape
        u = torch.rand(rows, lookahead, generator=generator, dtype=torch.float64)
        of_draft, of_target = (probs.gather(2, drafted[..., None])[..., 0] for probs in (draft_probs, p[:, :-1]))
        accepted = stands(u, of_draft, of_target).int().cumprod(1).sum(1)
        last = torch.arange(rows), accepted
        q = torch.cat([draft_probs, torch.zeros_like(p[:, :1])], 1)[last]
        weights = torch.where((accepted == lookahead)[:, None], p[last], residual(p[last], q))
        if active is not None:
            weights[~active] = 1  # whatever is drawn for a row that has ended is dropped
        return accepted.int(), torch.multinomial(weights, 1, generator=generator)[:, 0]

    return accept


def coupled(purpose: Purpose = Purpose.TOKEN, redraws: bool = False) -> Callable:
    generator = torch.Generator().manual_seed(1)

    def accept(
        logits, drafted, draft_probs, sampling, keys, positions, *, prompt_mask, output_counts, **options
    ) -> tuple:
        (rows, lookahead), still = drafted.shape, torch.ones(len(drafted), dtype=torch.bool)
        accepted, next_token = torch.zeros(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int64)
        p = target_probs(logits, drafted, sampling, prompt_mask, output_counts, lambda drafted, at: drafted[:, :at])
        natural = tensors(SamplingParams(temperature=1.0), rows, p.shape[-1])
        for at in range(lookahead + 1):
            choice = sample_tokens(p[:, at].log(), natural, keys, positions + at, purpose)
            agrees = choice == drafted[:, at] if at < lookahead else torch.zeros_like(still)
            if redraws and at < lookahead:
                choice = torch.multinomial(p[:, at], 1, generator=generator)[:, 0]
            next_token[still & ~agrees] = choice[still & ~agrees]
            still &= agrees
            accepted += still
        return accepted, next_token

    return accept


def keeps_everything(u, q, p):
    return torch.ones_like(p, dtype=torch.bool)


BROKEN = {  # an acceptor, and the filters, draft, lookahead, acceptance that show it
    "residual is p": (lambda: rejection(residual=lambda p, q: p), "plain", "other", 2, "rejection"),
    "residual is |p - q|": (lambda: rejection(residual=lambda p, q: (p - q).abs()), "plain", "other", 2, "rejection"),
    "keeps everything": (lambda: rejection(keeps_everything, lambda p, q: p), "plain", "other", 2, "rejection"),
    "keeps what q exceeds": (lambda: rejection(lambda u, q, p: u * p < q), "plain", "other", 2, "rejection"),
    "probs of another token": (lambda: rejection(probs_of_draft=lambda probs: probs.roll(1, -1)), "plain", "other", 2,
                             "rejection"),
    "probs of another position": (lambda: rejection(probs_of_draft=lambda probs: probs.roll(1, 1)), "plain", "other", 2,
                                "rejection"),
    "penalty forgets drafted tokens": (lambda: rejection(window=lambda drafted, at: drafted[:, :0]), "penalty",
                                       "equal", 3, "rejection"),
    "draws again after a mismatch": (lambda: coupled(redraws=True), "plain", "other", 2, "coupled"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_acceptor_is_caught(measure, monkeypatch, broken) -> None:
    acceptor, *case = BROKEN[broken]
    monkeypatch.setattr(sampling, "speculative_accept", acceptor())
    assert measure(*case)[0] < THRESHOLD


@pytest.mark.parametrize(("filters", "acceptance"), RIGHT)
def test_the_stand_ins_are_right_when_not_broken(measure, monkeypatch, filters, acceptance) -> None:
    monkeypatch.setattr(sampling, "speculative_accept", (rejection if acceptance == "rejection" else coupled)())
    assert measure(filters, "other", 3, acceptance)[0] > THRESHOLD


def test_draft_probs_from_before_the_filters_are_caught(measure, monkeypatch) -> None:
    """The draft draws from its filtered probabilities, but hands over the unfiltered one."""

    def unfiltered(logits, *args, probs=None, **options) -> torch.Tensor:
        tokens = sample_tokens(logits, *args, probs=probs, **options)
        if probs is not None:
            probs.copy_(torch.softmax(logits, -1))
        return tokens

    monkeypatch.setattr(sampling, "sample_tokens", unfiltered)
    assert measure("top-k top-p", "other", 2)[0] < THRESHOLD


def test_other_noise_in_the_target_is_caught(draw, deviation, monkeypatch) -> None:
    """The probabilities stay right, but text and acceptance rate do not."""
    expected = draw("plain", None, 1, "coupled").tokens
    monkeypatch.setattr(sampling, "speculative_accept", coupled())
    assert torch.equal(draw("plain", "other", 2, "coupled").tokens, expected)
    assert deviation("plain", "other", "coupled") > THRESHOLD
    monkeypatch.setattr(sampling, "speculative_accept", coupled(Purpose.TEST))
    assert not torch.equal(draw("plain", "other", 2, "coupled").tokens, expected)
    assert deviation("plain", "other", "coupled") < THRESHOLD


@pytest.mark.parametrize("filters", ["top-k", "top-p", "all"])
def test_the_draft_proposes_by_the_law_it_hands_over(draw, monkeypatch, filters) -> None:
    """Every drafted token has a probability in the row it is tested with, and filtered tokens have exactly none."""
    whole, smallest, supports = sampling.speculative_accept, [], set()

    def watch(logits, drafted, draft_probs, *args, active, **options) -> tuple:
        rows = slice(None) if active is None else active
        if draft_probs is not None:
            smallest.append(draft_probs.gather(2, drafted[..., None])[rows].min().item())
            supports.update((draft_probs[rows] > 0).sum(-1).flatten().tolist())
            assert ((draft_probs[rows].double().sum(-1) - 1).abs() < 1e-6).all()
        return whole(logits, drafted, draft_probs, *args, active=active, **options)

    monkeypatch.setattr(sampling, "speculative_accept", watch)
    draw(filters, "other", 3, "rejection")
    assert smallest and min(smallest) > 0
    assert supports == {3} if filters == "top-k" else max(supports) < 6
