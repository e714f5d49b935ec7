"""Temperature, top-k and top-p; seeds; and what happens when there is no law to draw from."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode import accept, sampling
from speculative_mamba.decode.sampling import draw, filtered_probabilities, greedy_tokens, row_generators
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.scripted import ScriptedDraft

LAW = torch.tensor([0.4, 0.3, 0.2, 0.1])


class NaNModel(TableModel):
    """NaN logits in row 1 once the last token is 4."""

    def verify(self, tokens, *args, **options):
        logits = super().verify(tokens, *args, **options).clone()
        if len(tokens) > 1:
            logits[1][(tokens == 4)[1, -logits.shape[1] :]] = torch.nan
        return logits


def params(temperature=1.0, top_k=0, top_p=1.0, seed=0):
    return sm.SamplingParams(temperature, top_k, top_p, seed)


def kept(law, **filters):
    probabilities = filtered_probabilities(law.log(), params(**filters))
    assert abs(probabilities.sum().item() - 1) < 1e-6
    return probabilities.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.1, [0]), (0.39, [0]), (0.41, [0, 1]), (0.5, [0, 1]), (0.69, [0, 1]), (0.71, [0, 1, 2]), (0.8, [0, 1, 2]),
     (0.999, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (1e-9, [0])],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    assert kept(LAW, top_p=top_p) == expected
    shuffle = torch.tensor([2, 0, 3, 1])
    assert kept(LAW[shuffle], top_p=top_p) == sorted(i for i in range(4) if shuffle[i] in expected)


def test_top_p_that_is_reached_exactly_adds_no_further_token():
    exact = torch.tensor([0.5, 0.25, 0.125, 0.125])  # sums without rounding
    assert kept(exact, top_p=0.5) == [0] and kept(exact, top_p=0.75) == [0, 1] and kept(exact, top_p=0.875) == [0, 1, 2]


@pytest.mark.parametrize("top_p", [0.4, 0.5, 0.7, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_any_shape_gives_the_same_law(by_hand, temperature, top_k, top_p):
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    chosen = params(temperature, top_k, top_p)
    whole = filtered_probabilities(logits, chosen)
    assert whole.dtype == torch.float32 and whole.shape == logits.shape
    for position in range(4):
        row = logits[0, position]
        alone = filtered_probabilities(row, chosen)
        assert torch.equal(whole[0, position], alone)
        assert torch.equal(filtered_probabilities(torch.stack([row, row.flip(0)]), chosen)[0], alone)
        law = by_hand(torch.softmax(row.double(), -1).tolist(), temperature, top_k, top_p)
        torch.testing.assert_close(alone.double(), torch.tensor(law, dtype=torch.float64), atol=1e-6, rtol=0)
        assert (alone > 0).tolist() == [p > 0 for p in law], "filtered tokens are exact zeros, others are not"


@pytest.mark.parametrize("top_k", range(1, 7))
def test_ties_at_rank_k_keep_the_lowest_ids(top_k):
    tied = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.2, 0.2])
    expected = sorted([1, 3, 4, 5, 0, 2][:top_k])
    assert kept(tied, top_k=top_k) == expected
    assert kept(tied.half().float(), top_k=top_k) == expected


def test_top_p_sees_the_law_that_top_k_leaves():
    """Of 0.4, 0.3, 0.2 the law is 0.44, 0.33, 0.22: two tokens reach 0.75, of the whole law it takes three."""
    assert kept(LAW, top_k=3, top_p=0.75) == [0, 1] and kept(LAW, top_p=0.75) == [0, 1, 2]


def test_top_k_sees_the_temperature_and_top_p_too():
    assert kept(LAW, temperature=0.25, top_p=0.7) == [0] and kept(LAW, temperature=4, top_p=0.7) == [0, 1, 2]


@pytest.mark.parametrize("options", [{"temperature": 1e-7}, {"temperature": 0.0}, {"top_k": 1}], ids=str)
def test_what_is_as_good_as_greedy_is_greedy(make_table, options):
    target, draft = TableModel(make_table(0)), TableModel(make_table(1))
    expected = sm.generate(target, [[0], [5]], max_new_tokens=9).sequences
    for seed in range(3):
        result = sm.generate(target, [[0], [5]], draft=draft, max_new_tokens=9, sampling=params(**options, seed=seed))
        assert all(map(torch.equal, result.sequences, expected))


def test_small_temperature_does_not_overflow():
    logits = torch.tensor([1000.0, -1000.0, 999.0])
    assert filtered_probabilities(logits, params(2e-5)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("draft_seed", [None, 1])
def test_seeds(make_table, draft_seed):
    target = TableModel(make_table(0))
    draft = None if draft_seed is None else TableModel(make_table(draft_seed))
    before = torch.get_rng_state()

    def text(seed):
        return torch.stack(
            sm.generate(target, [[0], [0]], draft=draft, max_new_tokens=30, sampling=params(seed=seed)).sequences
        )

    texts = [text(seed) for seed in range(20)]
    assert torch.equal(text(7), texts[7]), "same seed, same text"
    assert len({str(t.tolist()) for t in texts}) == 20, "another seed, another text"
    assert not any(torch.equal(t[0], t[1]) for t in texts), "rows draw on their own"
    assert torch.equal(torch.get_rng_state(), before), "the global generator is nobody's business"


def test_plain_sampling_of_a_row_depends_on_seed_and_index_only(make_table):
    target = TableModel(make_table(0))
    alone = sm.generate(target, [[3]], max_new_tokens=20, sampling=params(seed=4)).sequences[0]
    batch = sm.generate(target, [[3], [1], [2, 2]], max_new_tokens=20, sampling=params(seed=4)).sequences[0]
    assert torch.equal(alone, batch)


def test_large_seeds_are_seeds_of_their_own():
    numbers = {sampling.uniform(g) for seed in (0, 1, 2**40, 2**63 - 1) for g in row_generators(seed, 3)}
    assert len(numbers) == 12


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_token_the_target_gives_nothing_is_never_accepted_nor_drawn(monkeypatch, u):
    """Also when the uniform number is exactly 0, where u·q <= p would accept it."""
    monkeypatch.setattr(accept, "uniform", lambda generator: u)
    monkeypatch.setattr(sampling, "uniform", lambda generator: u)
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(1, 2, 4)
    laws = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
    accepted, following = accept.accept_rejection(
        logits, torch.tensor([[0]]), laws, params(), row_generators(0, 1), [0]
    )
    assert accepted.tolist() == [0] and following.tolist() == [2], "the residual is all on token 2"
    certain, _ = accept.accept_rejection(logits, torch.tensor([[0]]), None, params(), row_generators(0, 1), [0])
    assert certain.tolist() == [0]
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(weights, row_generators(0, 1)[0]) == (1 if u == 0 else 3)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]], ids=str)
def test_no_law_no_token(weights):
    with pytest.raises(ValueError, match="no token to draw"):
        draw(torch.tensor(weights), torch.Generator())


def test_an_empty_residual_is_an_error_that_names_the_row(monkeypatch):
    """p = q and yet a rejection: only broken numbers can do that, and then no token is right."""
    monkeypatch.setattr(accept, "uniform", lambda generator: 1.0)
    logits = LAW.log().expand(2, 3, 4)
    laws = filtered_probabilities(logits, params())[:, :2]
    with pytest.raises(ValueError, match="row 0, position 0"):
        accept.accept_rejection(
            logits, torch.zeros(2, 2, dtype=torch.long), laws, params(), row_generators(0, 2), [0, 1]
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_from_the_target_names_the_row(make_table, temperature):
    target = NaNModel(make_table(0))
    for draft in (None, TableModel(make_table(1))):
        with pytest.raises(ValueError, match="NaN in row 1"):
            sm.generate(
                target, [[0], [4], [0]], draft=draft, max_new_tokens=5, sampling=params(temperature)
            )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_behind_a_rejected_token_concerns_nobody(make_table, temperature):
    """The target's logits are NaN only after token 4, which its law excludes and a draft proposes all the same."""
    table = make_table(0)
    table[:, 4] = 0
    target = NaNModel(table / table.sum(-1, keepdim=True))
    draft = ScriptedDraft([[4] * 20] * 2, 6, lambda row, position: True)
    result = sm.generate(target, [[0], [0]], draft=draft, max_new_tokens=9, sampling=params(temperature))
    assert len(result.sequences[1]) == 10 and result.stats.accepted == 0


def test_nan_from_the_draft(make_table):
    """Greedy text does not depend on the draft, so it comes out right; a law cannot be drawn from NaN."""
    target, draft = TableModel(make_table(0)), NaNModel(make_table(0))
    prompts = [[0], [4], [0]]
    plain = sm.generate(target, prompts, max_new_tokens=8).sequences
    assert all(map(torch.equal, sm.generate(target, prompts, draft=draft, max_new_tokens=8).sequences, plain))
    with pytest.raises(ValueError, match=r"draft.*row 1"):
        sm.generate(target, prompts, draft=draft, max_new_tokens=8, sampling=params())


def test_nan_in_a_law_that_a_drafter_hands_over():
    laws = torch.tensor([[[float("nan"), 0.5, 0.5, 0.0]]])
    with pytest.raises(ValueError, match="row 0"):
        accept.accept_rejection(
            LAW.log().expand(1, 2, 4), torch.tensor([[0]]), laws, params(), row_generators(0, 1), [0]
        )


def test_the_lowest_id_of_equal_logits():
    assert greedy_tokens(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]
    assert greedy_tokens(torch.full((2, 3, 50280), 1.0)).unique().tolist() == [0]
