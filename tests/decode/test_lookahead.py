"""Adaptive lookahead: near the best fixed K, never far below plain decoding, and the same text as ever.

Its choices are tested on simulated costs, since a clock would make them a matter of luck.
"""

import itertools
import random
from collections import deque

import pytest

import speculative_mamba as sm
from speculative_mamba.decode.lookahead import (
    AUTO_AT_MOST,
    AUTO_LOOKAHEADS,
    AdaptiveLookahead,
    FixedLookahead,
    remembered_costs,
)
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate

TOKENS, RUNS = 512, 8
# Seconds of a pass over T tokens, one token taking 1; the first pass of each kind takes 0.3 longer.
PASSES = {
    "gentle": lambda tokens: 1 + 0.03 * (tokens - 1) + 0.08 * max(0, tokens - 6),
    "flat": lambda tokens: 1 + 0.01 * (tokens - 1),
    # of which 0.6 or 0.8 are experts: those that any token chooses, if each chooses 6 of 64, or 2 of 16, at random
    "experts": lambda tokens: 0.4 + 0.6 * 64 / 6 * (1 - (58 / 64) ** tokens),
    "few experts": lambda tokens: 0.2 + 0.8 * 16 / 2 * (1 - (14 / 16) ** tokens),
}


def simulate(chooser, rate, draft_s, pass_s, seed):
    """Seconds for ``TOKENS`` tokens, with 5 % of noise on every time; and the lookaheads chosen."""
    source, seconds, tokens, chosen = random.Random(seed), 0.0, 0, []

    def noisy(value):
        return value * (1 + abs(source.gauss(0, 0.05)))

    while tokens < TOKENS:
        drafts = min(chooser.next(), TOKENS - tokens - 1)
        accepted = next((k for k in range(drafts) if source.random() >= rate), drafts)
        draft, rest = noisy(drafts * draft_s), noisy(pass_s(drafts + 1)) + (0.3 if drafts not in chosen else 0)
        chooser.observe(drafts, min(accepted + 1, drafts), accepted, draft + rest)
        seconds, tokens = seconds + draft + rest, tokens + accepted + 1
        chosen.append(drafts)
    return seconds, chosen


def total(make, *arguments):
    return sum(simulate(make(), *arguments, seed)[0] for seed in range(RUNS))


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_close_to_the_best_fixed_lookahead(rate, passes):
    arguments = rate, 0.05, PASSES[passes]
    best = min(total(lambda k=k: FixedLookahead(k), *arguments) for k in range(1, AUTO_AT_MOST + 1))
    assert total(lambda: AdaptiveLookahead(AUTO_LOOKAHEADS), *arguments) < 1.05 * best


@pytest.mark.parametrize("passes", ["gentle", "flat"])
@pytest.mark.parametrize(("rate", "draft_s"), [(0.0, 0.05), (0.1, 0.15), (0.3, 0.4), (0.3, 1.0), (0.8, 2.0)])
def test_a_draft_that_loses_is_dropped(rate, draft_s, passes):
    arguments = rate, draft_s, PASSES[passes]
    plain = total(lambda: FixedLookahead(0), *arguments)
    assert total(lambda: AdaptiveLookahead(AUTO_LOOKAHEADS), *arguments) < 1.03 * plain
    _, chosen = simulate(AdaptiveLookahead(AUTO_LOOKAHEADS), *arguments, seed=0)
    assert chosen[-100:] == [0] * 100


def test_costs_are_measured_once_for_a_pair(pair, prompt, monkeypatch):
    """A later call has no rounds for measuring alone, unless the batch is another."""
    models, chosen, choose = pair(), [], AdaptiveLookahead.next
    monkeypatch.setattr(AdaptiveLookahead, "next", lambda self: chosen.append(choose(self)) or chosen[-1])
    monkeypatch.setattr(AdaptiveLookahead, "_speed", lambda self, k, rate, known: k)
    options = {"draft": models.drafts["near"], "lookahead": "auto", "max_new_tokens": 40, "stop_token_ids": ()}
    for prompts, measures in (([prompt(3)], True), ([prompt(5)], False), ([prompt(3)] * 2, True)):
        chosen.clear()
        sm.generate(models.target, prompts, **options)
        assert (chosen[:5] == [3, 0, 0, 3, 3]) == (0 in chosen) == measures


def test_known_costs_choose_at_once():
    costs = {k: deque([1 + 0.1 * k] * 2) for k in AUTO_LOOKAHEADS}
    chooser = AdaptiveLookahead(AUTO_LOOKAHEADS, costs)
    assert chooser.next() == max(AUTO_LOOKAHEADS[1:], key=lambda k: sum(0.7**i for i in range(k + 1)) / (1 + 0.1 * k))
    for _ in range(3):
        chooser.observe(1, 1, 1, 9.0)  # the first is cold
    assert list(costs[1]) == [1.1, 1.1, 9.0, 9.0]
    assert AdaptiveLookahead(AUTO_LOOKAHEADS, {k: deque([1 + 9.0 * k] * 2) for k in AUTO_LOOKAHEADS}).next() == 0


@pytest.mark.parametrize(("passes", "gains"), [("flat", True), ("experts", False), ("few experts", False)])
def test_a_pass_over_more_tokens_reads_more_experts(passes, gains):
    """At an acceptance that pays where a pass costs the same whatever its length."""
    _, chosen = simulate(AdaptiveLookahead(AUTO_LOOKAHEADS), 0.5, 0.03, PASSES[passes], seed=0)
    assert all(drafts > 0 for drafts in chosen[-100:-1]) if gains else chosen[-100:] == [0] * 100


def test_a_draft_that_gains_is_left_out_twice():
    """To learn what plain decoding costs."""
    for rate in (0.5, 0.8, 0.95):
        _, chosen = simulate(AdaptiveLookahead(AUTO_LOOKAHEADS), rate, 0.05, PASSES["gentle"], seed=1)
        assert chosen[:-1].count(0) == 2 and set(chosen) <= set(AUTO_LOOKAHEADS)


@pytest.mark.parametrize("late", [0, 2], ids=["at once", "late"])
@pytest.mark.parametrize("cold", [(3,), (0,), (0, 3), AUTO_LOOKAHEADS], ids=str)
@pytest.mark.parametrize("factor", [4, 1000])
def test_the_first_round_of_a_lookahead_is_no_evidence(cold, factor, late):
    """A draft that is always right and nearly free is kept, however long they take and whenever that is known."""
    chooser, seen, waiting = AdaptiveLookahead(AUTO_LOOKAHEADS), set(), []
    for _ in range(60):
        drafts = chooser.next()
        slow = factor if drafts in cold and drafts not in seen else 1
        seen.add(drafts)
        waiting.append((drafts, drafts, drafts, slow * (1 + 0.1 * drafts)))
        if len(waiting) > late:
            chooser.observe(*waiting.pop(0))
    assert not chooser.dropped and chooser.next() == AUTO_AT_MOST


@pytest.mark.parametrize("late", [0, 2], ids=["at once", "late"])
def test_nothing_is_dropped_before_all_is_measured(late):
    """Not even a draft that costs a hundred rounds: three rounds with and two without are planned."""
    chooser, waiting, measured = AdaptiveLookahead(AUTO_LOOKAHEADS), [], []
    while (drafts := chooser.next()) or not chooser.dropped:
        waiting.append(drafts)
        if len(waiting) > late:
            measured.append(waiting.pop(0))
            chooser.observe(measured[-1], measured[-1], 0, 1.0 + 100 * measured[-1])
    assert measured.count(0) == 2 and measured.count(3) >= 3


def test_a_dropped_draft_is_in_the_statistics(pair, prompt, monkeypatch):
    models, options = pair(), {"lookahead": "auto", "max_new_tokens": 40, "stop_token_ids": ()}
    for drops in (False, True):
        monkeypatch.setattr(
            AdaptiveLookahead, "_speed", lambda self, k, rate, known, d=drops: 1 if (k == 0) == d else 0
        )
        remembered_costs.cache_clear()
        stats = sm.generate(models.target, [prompt(3)], draft=models.drafts["near"], **options).stats
        assert (stats.draft_dropped_at == 5) if drops else stats.draft_dropped_at is None
        assert stats.as_dict()["draft_dropped_at"] == stats.draft_dropped_at


@pytest.mark.parametrize("most", [1, 2, 3, 15])
def test_never_more_than_allowed(most):
    allowed = [drafts for drafts in AUTO_LOOKAHEADS if drafts <= most]
    _, chosen = simulate(AdaptiveLookahead(allowed), 0.95, 0.02, PASSES["flat"], seed=2)
    assert max(chosen) <= most


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "coupled"])
def test_same_text_as_ever(pair, prompt, rate, sampling):
    target, prompts = pair().target, [prompt(3), prompt(9)]
    options = {"sampling": sm.SamplingParams(**sampling), "acceptance": "coupled", "stop_token_ids": ()}
    plain = sm.generate(target, prompts, max_new_tokens=60, **options).sequences
    draft = ScriptedDraft([text.tolist() for text in plain], target.vocab_size, agree_at_rate(rate))
    for budget in (1, 2, 3, 5, 60):
        result = sm.generate(target, prompts, draft=draft, lookahead="auto", max_new_tokens=budget, **options)
        assert [text.tolist() for text in result.sequences] == [
            text[: len(p) + budget].tolist() for text, p in zip(plain, prompts, strict=True)
        ]


def test_a_dropped_draft_model_can_come_back_with_the_cache(pair, prompt):
    models, cache, parts = pair(), sm.GenerationCache(), []
    whole = sm.generate(models.target, [prompt(5)], max_new_tokens=90, stop_token_ids=()).sequences[0]
    for tokens in (40, 30, 20):
        parts = sm.generate(
            models.target, cache.sequences or [prompt(5)], draft=models.drafts["random"], lookahead="auto",
            max_new_tokens=tokens, stop_token_ids=(), cache=cache,
        ).sequences[0]  # fmt: skip
    assert parts.tolist() == whole.tolist()


@pytest.mark.parametrize("pattern", [(0, 3), (2, 0, 0, 4), (1, 0, 5, 0)], ids=str)
def test_a_draft_model_catches_up_after_rounds_without_it(pair, prompt, monkeypatch, pattern):
    """An equal draft is always right, so a state that lacks a token shows. Catches: a draft that does not catch up."""
    target = pair().target
    rounds = itertools.cycle(pattern)
    monkeypatch.setattr(FixedLookahead, "next", lambda self: next(rounds))
    prompts = [prompt(1), prompt(2), prompt(30)]
    options = {"max_new_tokens": 31, "stop_token_ids": ()}
    stats = sm.generate(target, prompts, draft=target, lookahead=5, **options).stats
    assert stats.accepted == stats.tested > 20
