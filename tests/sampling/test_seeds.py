"""Seeds: reproducible, all different, rows on their own, and no global generator touched."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel

WAYS = [(None, "rejection"), ("other", "rejection"), ("other", "coupled")]
ways = pytest.mark.parametrize(("draft", "acceptance"), WAYS)


@pytest.fixture
def text(make_table, make_draft):
    """text(seed, draft, acceptance, prompts): texts of 30 new tokens."""

    def run(seed, draft, acceptance, prompts=((0,), (0,)), tokens: int = 30) -> list[list[int]]:
        result = sm.generate(
            TableModel(make_table(0)), prompts, draft=make_draft(draft, [], len(prompts)), lookahead=3,
            max_new_tokens=tokens, acceptance=acceptance, sampling=sm.SamplingParams(temperature=1.0, seed=seed),
        )  # fmt: skip
        return [row.tolist() for row in result.sequences]

    return run


@ways
def test_the_same_seed_gives_the_same_text_and_twenty_seeds_twenty_texts(text, draft, acceptance) -> None:
    texts = [text(seed, draft, acceptance) for seed in range(20)]
    assert text(7, draft, acceptance) == texts[7]
    assert len({str(rows) for rows in texts}) == 20
    assert len({str(row) for rows in texts for row in rows}) == 40, "rows draw on their own"


@ways
def test_large_seeds_are_seeds_of_their_own(text, draft, acceptance) -> None:
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
    assert len({str(text(seed, draft, acceptance)) for seed in seeds}) == len(seeds)


@ways
def test_the_global_generator_is_left_alone(text, draft, acceptance) -> None:
    before = torch.get_rng_state()
    expected = text(0, draft, acceptance)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert text(0, draft, acceptance) == expected


@ways
def test_a_list_of_one_seed_is_that_seed(text, draft, acceptance) -> None:
    assert text([6], draft, acceptance, [[0]]) == text(6, draft, acceptance, [[0]])
    first, second = text([6, 6], draft, acceptance)
    assert first == second == text(6, draft, acceptance, [[0]])[0]


def test_rejection_in_a_batch_equals_the_row_alone(text) -> None:
    """Also in the last rounds, in which a longer row sets the window."""
    prompts, seeds = [[0], [5, 5], [3], [1, 2, 3]], [4, 5, 6, 7]
    rows = text(seeds, "other", "rejection", prompts)
    for prompt, seed, row in zip(prompts, seeds, rows, strict=True):
        alone = text([seed], "other", "rejection", [prompt])[0]
        assert row == alone


@pytest.mark.parametrize("draft", ["equal", "other"])
def test_seeds_are_uncorrelated(text, draft) -> None:
    """Rows of one seed agree with those of the next no more often than two draws of the same distribution do."""
    prompts = [[0]] * 3000
    first, second = (torch.tensor(text(seed, draft, "coupled", prompts, tokens=1))[:, 1] for seed in (0, 1))
    shares = torch.bincount(torch.cat([first, second]), minlength=6).double() / 6000
    chance = (shares**2).sum().item()
    agreeing = (first == second).double().mean().item()
    assert abs(agreeing - chance) < 5 * (chance * (1 - chance) / 3000) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, True, None, "1", [1, -1], [[0]]], ids=str)
def test_what_is_no_seed_is_refused(seed) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 2") as caught:
        sm.SamplingParams(temperature=1.0, seed=seed)
    assert "\n" not in str(caught.value)


def test_as_many_seeds_as_rows(text) -> None:
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        text([1, 2, 3], None, "rejection")
