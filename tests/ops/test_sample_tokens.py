"""Probabilities against a hand computation in float64, and tokens that depend on nothing but their own row."""

import itertools

import pytest
import torch

from speculative_mamba.ops import sample_tokens
from speculative_mamba.ops.sampling import raise_for
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.testing.sampling import assert_probs, probs_by_hand, rng_keys_of, sample, tensors, text_of
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "speculative_accept"  # of which this is a special case
NATURAL = SamplingParams(temperature=1.0)
PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])


def kept(given: torch.Tensor, backend: str, **filters: float) -> list[int]:
    _, probs = sample(given.log()[None], SamplingParams(**{"temperature": 1.0, **filters}), backend)
    assert abs(probs.double().sum().item() - 1) < 1e-6
    return probs[0].nonzero().flatten().tolist()


COMBINATIONS = [
    SamplingParams(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.5, 1.0, 2.0), (0, 3, 9), (0.6, 0.9, 1.0), (0.0, 0.2), (0.8, 1.0, 1.5)
    )
]


@pytest.mark.parametrize("vocabulary", [5, 16, 17, 77])
def test_every_combination_of_filters_equals_the_hand_computation(vocabulary: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(3, vocabulary, generator=generator) * 1.5
    logits[1] -= 9  # all negative
    logits[2, 1] = -torch.inf
    seen = torch.rand(3, vocabulary, generator=generator) < 0.4
    recent = torch.tensor([[0, 2], [1, 1], [4, 0]])
    every = {"cpu": 1, "triton": 16}.get(backend, 4)
    combinations = COMBINATIONS[vocabulary % every :: every]
    for params in combinations:
        tokens, probs = sample(logits, params, backend, seen=seen, draft_tokens=recent)
        for row in range(3):
            prompt = seen[row].nonzero().flatten().tolist()
            assert_probs(probs[row], probs_by_hand(logits[row].tolist(), params, prompt, recent[row].tolist()), params)
            assert probs[row, tokens[row]] > 0


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, 1),
        (0.4, 1),
        (0.4000005, 1),
        (0.400003, 2),
        (0.401, 2),
        (0.5, 2),
        (0.7, 2),
        (0.701, 3),
        (0.8, 3),
        (0.9, 3),
        (0.999, 4),
        (1, 4),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, expected: int, backend: str) -> None:
    assert kept(PROBS, backend, top_p=top_p) == list(range(expected))
    shuffle = torch.tensor([2, 0, 3, 1])
    assert kept(PROBS[shuffle], backend, top_p=top_p) == [at for at in range(4) if shuffle[at] < expected]


def test_top_p_sees_the_probs_that_top_k_leaves(backend: str) -> None:
    """Of 0.4, 0.3, 0.2 the probabilities are 0.44, 0.33, 0.22: two tokens reach 0.75, of all of them it takes three.

    Catches: no renormalisation after top-k.
    """
    assert kept(PROBS, backend, top_k=3, top_p=0.75) == [0, 1]
    assert kept(PROBS, backend, top_p=0.75) == [0, 1, 2]


def test_top_p_sees_the_temperature(backend: str) -> None:
    assert kept(PROBS, backend, temperature=0.25, top_p=0.7) == [0]
    assert kept(PROBS, backend, temperature=4, top_p=0.7) == [0, 1, 2]


@pytest.mark.parametrize("top_k", range(1, 8))
def test_ties_at_rank_k_keep_the_lowest_ids(top_k: int, backend: str) -> None:
    """Catches: ties that keep the highest ids."""
    tied = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.2, 0.2])
    expected = sorted([1, 3, 4, 5, 0, 2][:top_k])
    assert kept(tied, backend, top_k=top_k) == expected
    assert kept(tied.half().float(), backend, top_k=top_k) == expected


@pytest.mark.parametrize("top_k", [2999, 6006, 6007])
def test_ties_keep_the_lowest_ids_up_to_the_end_of_the_vocabulary(top_k: int, backend: str) -> None:
    _, probs = sample(torch.zeros(1, 6008), SamplingParams(temperature=1.0, top_k=top_k), backend)
    assert probs[0].nonzero().flatten().tolist() == list(range(top_k))


def test_zeros_of_both_signs_are_tied(backend: str) -> None:
    for few in (3, 1500):
        logits = torch.full((1, 2000), -0.0)
        logits[0, ::2] = 0.0
        _, probs = sample(logits, SamplingParams(temperature=1.0, top_k=few), backend)
        assert probs[0].nonzero().flatten().tolist() == list(range(few))


def test_ties_at_the_edge_of_the_nucleus_keep_the_lowest_ids(backend: str) -> None:
    assert kept(torch.full((8,), 0.125), backend, top_p=0.5) == [0, 1, 2, 3]
    assert kept(torch.tensor([0.125, 0.25, 0.125, 0.25, 0.125, 0.125]), backend, top_p=0.6) == [0, 1, 3]


def test_min_p_is_relative_to_the_largest_probability(backend: str) -> None:
    """Catches: min-p relative to 1."""
    probs = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.02, 0.04, 0.04, 0.9]])
    for shift in (0.0, -50.0, 50.0):
        _, probs = sample(probs.log() + shift, SamplingParams(temperature=1.0, min_p=0.28), backend)
        assert [row.nonzero().flatten().tolist() for row in probs] == [[1, 2, 3], [3]]
    assert kept(PROBS, backend, min_p=0.5) == [0, 1, 2], "a probability of exactly the bound stays"
    assert kept(PROBS, backend, min_p=0.5, top_k=2) == [0, 1]
    assert kept(PROBS, backend, min_p=0.8) == [0]


def test_min_p_sees_the_temperature(backend: str) -> None:
    assert kept(PROBS, backend, min_p=0.6, temperature=2) == [0, 1, 2]
    assert kept(PROBS, backend, min_p=0.6, temperature=0.5) == [0]


def test_the_penalty_lowers_positive_and_negative_logits_once(backend: str) -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, -2.0, 0.0]])
    seen = torch.tensor([[True, False, True, False, True]])
    recent = torch.tensor([[3, 3, 0, 3]])  # 0 is also in seen, 3 comes three times
    _, probs = sample(
        logits, SamplingParams(temperature=1.0, repetition_penalty=2.0), backend, seen=seen, draft_tokens=recent
    )
    assert_probs(probs[0], torch.softmax(torch.tensor([1.0, 1.0, -2.0, -4.0, 0.0]).double(), -1).tolist())
    unchanged = sample(logits, NATURAL, backend, seen=seen, draft_tokens=recent)
    assert_bitwise_equal(unchanged[1], sample(logits, NATURAL, backend)[1], "without a penalty")


def test_greedy_sees_the_penalty(backend: str) -> None:
    logits, seen = torch.tensor([[2.0, 1.5, 1.0], [-1.0, -1.1, -9.0]]), torch.eye(3, dtype=torch.bool)[[0, 0]]
    tokens, probs = sample(logits, SamplingParams(repetition_penalty=2.0), backend, seen=seen)
    assert tokens.tolist() == [1, 1] and probs.tolist() == [[0, 1, 0]] * 2


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1e-5), SamplingParams(temperature=0.7, top_k=1)], ids=str
)
def test_greedy_takes_the_lowest_id_of_equal_logits(params: SamplingParams, backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-torch.inf, -7.0, -9.0, -7.0]])
    tokens, probs = sample(logits, params, backend)
    assert tokens.tolist() == [1, 0, 1] and probs.tolist() == torch.eye(4)[[1, 0, 1]].tolist()
    long = torch.zeros(2, 50280)
    long[1, [50001, 50270]] = 1
    assert sample(long, params, backend)[0].tolist() == [0, 50001]
    infinite = torch.tensor([[0.0, torch.inf, torch.inf]])
    assert sample(infinite, params, backend)[0].tolist() == [1]


def test_impossible_tokens_stay_impossible(backend: str) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(100 if backend == "cpu" else 12, 5)
    for params in (NATURAL, SamplingParams(temperature=1.0, top_k=4), SamplingParams(temperature=9.0, top_p=0.999)):
        tokens, probs = sample(logits, params, backend)
        assert set(tokens.tolist()) == {1, 3}
        assert (probs[:, [0, 2, 4]] == 0).all()
    one = torch.full((1, 50), -torch.inf)
    one[0, 49] = -1e30
    tokens, probs = sample(one, NATURAL, backend)
    assert tokens.tolist() == [49] and probs[0, 49] == 1


@pytest.mark.parametrize(
    ("values", "temperature", "expected"),
    [
        ([1000.0, -1000.0, 999.0], 2e-5, [1, 0, 0]),
        ([0.0, -1e-5, -1.0], 2e-5, [0.6224593, 0.3775407, 0]),
        ([3e38, -3e38, 3e38], 1.0, [0.5, 0, 0.5]),
        ([-3e38, -3e38, -3.4e38], 1.0, [0.5, 0.5, 0]),
        ([1e-38, -1e-38, 0.0], 1.0, [1 / 3] * 3),
        ([20000.0, 19999.0, 0.0], 1.0, [0.7310586, 0.2689414, 0]),
        ([0.0, -86.0, -88.0], 1.0, [1, 4.4737793e-38, 0]),
        ([8.0, -8.0, 0.0], 1e4, [0.3336, 0.3330668, 0.3333333]),
    ],
    ids=str,
)
def test_extreme_logits_and_temperatures(values: list, temperature: float, expected: list, backend: str) -> None:
    for options in ({}, {"top_k": 2}, {"top_p": 0.9999}) if expected.count(0) else ({},):
        _, probs = sample(torch.tensor([values]), SamplingParams(temperature=temperature, **options), backend)
        torch.testing.assert_close(probs[0], torch.tensor(expected).float(), atol=1e-6, rtol=0)
        assert ((probs[0] == 0) <= (torch.tensor(expected) < 1e-37)).all()


LARGE = [
    (4.0, SamplingParams(temperature=1.0)),
    (1.0, SamplingParams(temperature=1.0, top_p=0.5)),  # more than 1024 tokens reach it
    (0.0, SamplingParams(temperature=1.0, top_p=0.3)),  # flat: the lowest ids
    (4.0, SamplingParams(temperature=0.8, top_k=50, top_p=0.8)),
    (1.0, SamplingParams(temperature=0.8, top_k=50)),  # of many equals some
    (0.0, SamplingParams(temperature=1.0, top_k=50, top_p=0.9)),
    (1.0, SamplingParams(temperature=0.8, top_k=512, min_p=0.05)),
    (1.0, SamplingParams(temperature=0.8, top_k=1024)),
    (1.0, SamplingParams(temperature=0.8, top_k=1025)),
    (1.0, SamplingParams(temperature=0.8, top_k=3000, top_p=0.9)),
    (0.0, SamplingParams(temperature=1.0, top_k=3000)),
    (4.0, SamplingParams(temperature=1.0, top_p=0.9)),
    (3.0, SamplingParams(temperature=1.0, top_k=2000, min_p=0.01)),
    (1.0, SamplingParams(temperature=1.0, top_p=0.8, min_p=0.05)),
    (1.0, SamplingParams(temperature=1.0, min_p=0.02)),
    (2.0, SamplingParams(temperature=1.3, top_p=0.95, repetition_penalty=1.2)),
    (0.0, SamplingParams(temperature=1.0, top_k=10**12, top_p=0.9)),
]


@pytest.mark.parametrize("vocabulary", [1025, 6007])
@pytest.mark.parametrize(("spread", "params"), LARGE, ids=[f"{s}-{f.top_k}-{f.top_p}-{f.min_p}" for s, f in LARGE])
def test_large_vocabularies(spread: float, params: SamplingParams, vocabulary: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, vocabulary, generator=generator) * spread * 8).round() / 8  # with many ties
    seen = torch.rand(2, vocabulary, generator=generator) < 0.1
    tokens, probs = sample(logits, params, backend, seen=seen)
    for row in range(2):
        text = seen[row].nonzero().flatten().tolist()
        assert_probs(probs[row], probs_by_hand(logits[row].tolist(), params, text), row)
        assert probs[row, tokens[row]] > 0


def test_tokens_follow_the_probs(backend: str) -> None:
    """By chi-square, at one false alarm in a million."""
    rows = {"cpu": 20_000, "triton": 60}.get(backend, 800)
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.95)
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4, 0.9])
    tokens, _ = sample(logits.expand(rows, 6), params, backend)
    expected = torch.tensor(probs_by_hand(logits.tolist(), params)).double() * rows
    observed = torch.bincount(tokens, minlength=6)
    possible = expected > 0
    assert not observed[~possible].any()
    statistic = ((observed - expected) ** 2 / expected)[possible].sum()
    freedom = torch.tensor((possible.sum().item() - 1) / 2).double()
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-6


SIX_FILTERS = [NATURAL, SamplingParams(), SamplingParams(temperature=0.7, top_k=9),
               SamplingParams(temperature=1.0, top_p=0.9),
               SamplingParams(temperature=1.0, top_k=40, top_p=0.99, min_p=0.01, repetition_penalty=1.3),
               SamplingParams(temperature=3.0, min_p=0.1)]  # fmt: skip


@pytest.mark.parametrize("params", SIX_FILTERS, ids=range(6))
def test_a_row_does_not_depend_on_its_neighbours(params: SamplingParams, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 77, generator=generator) * 2
    seen, recent = torch.rand(7, 77, generator=generator) < 0.2, torch.randint(0, 77, (7, 3), generator=generator)
    keys, positions = torch.randint(0, 2**40, (7, 2), generator=generator), torch.arange(7) * 5
    probs = torch.empty(7, 77)
    tokens = sample_tokens(
        logits, tensors(params, 7, 77), keys, positions, probs=probs, **text_of(seen), draft_tokens=recent,
        backend=backend,
    )  # fmt: skip
    for row in range(7):
        at, alone = slice(row, row + 1), torch.empty(1, 77)
        token = sample_tokens(
            logits[at],
            tensors(params, 1, 77),
            keys[at],
            positions[at],
            probs=alone,
            **text_of(seen[at]),
            draft_tokens=recent[at],
            backend=backend,
        )
        assert token.item() == tokens[row].item()
        assert_bitwise_equal(alone[0], probs[row], f"probs of row {row}")


def test_threads_do_not_change_a_bit(cpu: str) -> None:
    logits = torch.randn(9, 20_011, generator=torch.Generator().manual_seed(0)) * 3
    for params in SIX_FILTERS:
        seen = torch.zeros(9, 20_011, dtype=torch.bool)
        torch.set_num_threads(1)
        tokens, probs = sample(logits, params, cpu, seen=seen)
        torch.set_num_threads(2)
        again, probs_again = sample(logits, params, cpu, seen=seen)
        assert_bitwise_equal(again, tokens, "tokens")
        assert_bitwise_equal(probs_again, probs, "probs")


def test_views_with_gaps_between_rows(backend: str) -> None:
    wide = torch.full((4, 3, 90), torch.nan)
    view = wide[:, 1, 5:82]
    view[:] = torch.randn(4, 77, generator=torch.Generator().manual_seed(0))
    probs = torch.full((4, 5, 100), -7.0)
    for params in SIX_FILTERS[:4]:
        tokens, expected = sample(view.contiguous(), params, backend)
        out = probs[:, 2, 9:86]
        positions = torch.arange(4) + 3
        assert_bitwise_equal(
            sample_tokens(view, tensors(params, 4, 77), rng_keys_of(4), positions, probs=out, backend=backend),
            tokens,
            "tokens",
        )
        assert_bitwise_equal(out.contiguous(), expected, "probs")
    probs[:, 2, 9:86] = -7
    assert (probs == -7).all(), "written outside of its view"


def test_inactive_rows_are_not_looked_at(backend: str) -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    expected, expected_probs = sample(logits, NATURAL, backend)
    active = torch.tensor([True, False, True, False])
    logits[1], logits[3] = torch.nan, -torch.inf
    probs = torch.full((4, 33), -7.0)
    tokens = sample_tokens(
        logits,
        tensors(NATURAL, 4, 33),
        rng_keys_of(4),
        torch.arange(4) + 3,
        probs=probs,
        active=active,
        backend=backend,
    )
    assert tokens.tolist() == [expected[0], 0, expected[2], 0]
    assert_bitwise_equal(probs[::2], expected_probs[::2], "probs of active rows")
    assert (probs[1::2] == -7).all()


def test_no_rows(backend: str) -> None:
    tokens, probs = sample(torch.empty(0, 5), NATURAL, backend)
    assert tokens.shape == (0,) and probs.shape == (0, 5)


@pytest.mark.parametrize("column", [0, 15, 16, 76])
@pytest.mark.parametrize(
    ("value", "params", "match"),
    [
        (torch.nan, NATURAL, "row 1.*NaN"),
        (torch.nan, SamplingParams(), "row 1.*NaN"),
        (torch.nan, SamplingParams(temperature=1.0, top_k=3, top_p=0.5), "row 1.*NaN"),
        (torch.inf, NATURAL, "row 1.*infinite"),
        (torch.inf, SamplingParams(temperature=1.0, top_k=3), "row 1.*infinite"),
    ],
    ids=str,
)
def test_a_broken_row_is_named(value: float, params: SamplingParams, match: str, column: int, backend: str) -> None:
    logits = torch.randn(3, 77, generator=torch.Generator().manual_seed(0))
    logits[1, column] = value
    with pytest.raises(ValueError, match=match) as caught:
        sample(logits, params, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("params", [NATURAL, SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)], ids=str)
def test_a_row_without_a_possible_token_is_named(params: SamplingParams, backend: str) -> None:
    logits = torch.zeros(3, 33)
    logits[2] = -torch.inf
    with pytest.raises(ValueError, match=r"row 2: every token has probability 0"):
        sample(logits, params, backend)


def test_row_status_can_be_read_later(backend: str) -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(5))
    expected, row_status = sample(logits, NATURAL, backend)[0], torch.full((4,), 9, dtype=torch.int32)
    logits[1, 4], logits[2] = torch.nan, -torch.inf
    tokens, _ = sample(logits, NATURAL, backend, row_status=row_status)
    assert row_status.tolist() == [0, 1, 3, 0]
    assert tokens.tolist() == [expected[0], 0, 0, expected[3]]
    with pytest.raises(ValueError, match=r"^row 1: logits are NaN"):
        raise_for(row_status)


def test_a_long_tail_is_summed_whole(backend):
    logits = torch.full((1, 50280), -16.6)
    logits[0, 0] = 0
    probs = sample(logits, NATURAL, backend)[1]
    torch.testing.assert_close(probs.double(), torch.softmax(logits.double(), -1), rtol=1e-5, atol=0)
