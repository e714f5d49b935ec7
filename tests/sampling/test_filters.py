"""What the loop makes of its filters: greedy limits, refused values, and logits that give no probabilities."""

import itertools
from fractions import Fraction

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.scripted import ScriptedDraft

ACCEPTANCES = ("rejection", "coupled")


class NaNModel(TableModel):
    """NaN logits in row 1 once the last token is 4."""

    def verify(self, tokens, *args, **options):
        logits = super().verify(tokens, *args, **options).clone()
        if len(tokens) > 1:
            logits[1][(tokens == 4)[1, -logits.shape[1] :]] = torch.nan
        return logits


def params(temperature: float = 1.0, **options: float) -> sm.SamplingParams:
    return sm.SamplingParams(temperature=temperature, **options)


@pytest.mark.parametrize("options", [{"temperature": 1e-7}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-4}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_what_is_as_good_as_greedy_is_greedy(make_table, options, acceptance) -> None:
    target, draft = TableModel(make_table(0)), TableModel(make_table(1))
    expected = sm.generate(target, [[0], [5]], max_new_tokens=9).sequences
    for seed, drafted in itertools.product(range(3), (None, draft)):
        result = sm.generate(
            target, [[0], [5]], draft=drafted, max_new_tokens=9, sampling=params(**options, seed=seed),
            acceptance=acceptance,
        )  # fmt: skip
        assert all(map(torch.equal, result.sequences, expected))


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    """A target of three equally likely tokens, with drafts that propose each of them."""
    rows = torch.tensor([[0.0, 1, 1, 1, 0, 0]]).expand(6, 6)
    for proposal in range(6):
        draft = ScriptedDraft([[0] + [proposal] * 9] * 2, 6, lambda row, position: True)
        for sampling in (params(0.0), params(top_k=1)):
            result = sm.generate(TableModel(rows), [[0], [3]], draft=draft, max_new_tokens=6, sampling=sampling)
            assert [row.tolist()[1:] for row in result.sequences] == [[1] * 6] * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, -1e-9, float("nan"), float("inf"), True, "1", None, 10**400]),
        ("top_k", [-1, 1.0, True, 2**63, None, 10**5000]),
        ("top_p", [0, -0.1, 1.1, float("nan"), None, Fraction(10**400)]),
        ("min_p", [-0.1, 1, float("nan"), None, -(10**400)]),
        ("repetition_penalty", [0, -1, float("nan"), float("inf"), None, 1e40, 1e-46, 10**5000]),
    ],
)
def test_values_out_of_range_are_refused(name, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be") as caught:
            sm.SamplingParams(**{name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_unknown_acceptance(make_table) -> None:
    with pytest.raises(ValueError, match="unknown acceptance 'typical'; choose from: rejection, coupled"):
        sm.generate(TableModel(make_table(0)), [[0]], sampling=params(), acceptance="typical")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_nan_from_the_target_names_the_row(make_table, temperature, acceptance) -> None:
    target = NaNModel(make_table(0))
    for draft in (None, TableModel(make_table(1))):
        with pytest.raises(ValueError, match=r"row 1, position 0 of the window: logits are NaN"):
            sm.generate(
                target, [[0], [4], [0]], draft=draft, max_new_tokens=5, sampling=params(temperature),
                acceptance=acceptance,
            )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_nan_behind_a_refused_token_concerns_nobody(make_table, temperature, acceptance) -> None:
    """The target's logits are NaN only after token 4, which its filters exclude and a draft proposes all the same."""
    table = make_table(0)
    table[:, 4] = 0
    draft = ScriptedDraft([[4] * 20] * 2, 6, lambda row, position: True)
    result = sm.generate(
        NaNModel(table), [[0], [0]], draft=draft, max_new_tokens=9, sampling=params(temperature), acceptance=acceptance
    )
    assert len(result.sequences[1]) == 10 and result.stats.accepted == 0


def test_nan_in_a_row_that_has_ended_concerns_nobody(make_table) -> None:
    """Row 1 ends with token 4, after which its logits are NaN, while the other row goes on."""
    target, without = NaNModel(make_table(0)), make_table(1)
    without[:, 4] = 0
    draft = TableModel(without)
    for acceptance, drafted in itertools.product(ACCEPTANCES, (None, draft)):
        went_on = 0
        for seed in range(5):
            first, second = sm.generate(
                target, [[0], [0]], draft=drafted, max_new_tokens=60, sampling=params(seed=seed),
                acceptance=acceptance, stop_token_ids=(4,),
            ).sequences  # fmt: skip
            went_on += len(first) > len(second) + 5
        assert went_on


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_nan_from_the_draft(make_table, acceptance) -> None:
    target, draft = TableModel(make_table(0)), NaNModel(make_table(0))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"the draft cannot propose a token: row 1: logits are NaN") as caught:
            sm.generate(
                target, [[0], [4], [0]], draft=draft, max_new_tokens=8, sampling=params(temperature),
                acceptance=acceptance,
            )  # fmt: skip
        assert "\n" not in str(caught.value)
