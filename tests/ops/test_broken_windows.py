"""Windows that speculative_accept cannot decide: which row and position is named, and what does not matter."""

import pytest
import torch
from test_speculative_accept import FILTERS, GREEDY, NATURAL, B, make, p_value, probs_of

from speculative_mamba.ops import speculative_accept
from speculative_mamba.ops.sampling import raise_for
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.testing.sampling import rng_keys_of, tensors

OP = "speculative_accept"


def window(tokens: list[list[int]], vocabulary: int = 5) -> torch.Tensor:
    """Logits of a target that is certain of these tokens."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float().log()


def accept(logits: torch.Tensor, drafted: list[list[int]], backend: str, params=NATURAL, **options) -> tuple:
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    draft_probs = options.pop("draft_probs", None)
    rows, _, vocabulary = logits.shape
    return speculative_accept(
        logits, torch.tensor(drafted), draft_probs, tensors(params, rows, vocabulary), rng_keys_of(rows), zeros,
        backend=backend, **options,
    )  # fmt: skip


MODES = [(NATURAL, False), (NATURAL, True), (GREEDY, False), (SamplingParams(temperature=1.0, top_p=0.9), False)]


@pytest.mark.parametrize(("params", "coupled"), MODES, ids=["rejection", "coupled", "greedy", "top-p"])
def test_broken_logits_are_named_only_where_they_matter(params: SamplingParams, coupled: bool, backend: str) -> None:
    logits = window([[1, 2, 3]] * 3)
    right, wrong = [[1, 2]] * 3, [[1, 2], [4, 2], [1, 2]]
    broken = [(torch.nan, "NaN"), (-torch.inf, "every token has probability 0")]
    for value, what in broken + ([] if params.greedy else [(torch.inf, "infinite")]):
        for at in range(3):
            logits = window([[1, 2, 3]] * 3)
            logits[1, at] = value
            with pytest.raises(ValueError, match=f"^row 1, position {at} of the window: .*{what}") as caught:
                accept(logits, right, backend, params, coupled=coupled)
            assert "\n" not in str(caught.value)
            if at:  # the first token is refused, and what is behind it is never looked at
                accepted, next_token = accept(logits, wrong, backend, params, coupled=coupled)
                assert accepted.tolist() == [2, 0, 2] and next_token.tolist() == [3, 1, 3]


@pytest.mark.parametrize(("turn", "column"), list(enumerate([0, 16, 76])))
def test_one_nan_is_enough(turn: int, column: int, backend: str) -> None:
    for params in list(FILTERS.values())[turn::3] if backend == "triton" else FILTERS.values():
        arguments = make(params)
        arguments["logits"][4, 0, column] = torch.nan
        with pytest.raises(ValueError, match=r"row 4, position 0 .*NaN"):
            speculative_accept(**arguments, backend=backend)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -0.5])
def test_a_row_that_gives_its_own_token_no_probability_is_named(value: float, backend: str) -> None:
    logits = window([[1, 2, 3]] * 2)
    draft_probs = window([[1, 2]] * 2).exp()
    draft_probs[1, 1, 2] = value
    with pytest.raises(
        ValueError, match=r"row 1, position 1 .*draft_probs give the drafted token no probability"
    ) as caught:
        accept(logits, [[1, 2]] * 2, backend, draft_probs=draft_probs)
    assert "\n" not in str(caught.value)
    draft_probs[1, 0, :2] = 0.5  # a refused token before it, and the broken row matters no more
    accepted, _ = accept(logits, [[1, 2], [0, 2]], backend, draft_probs=draft_probs)
    assert accepted.tolist() == [2, 0]


def test_an_empty_residual_is_an_error_that_names_the_row(backend: str) -> None:
    """Probabilities twice as large as they can be: every second token is refused, and nothing is left to draw."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(30, 2, 4)
    draft_probs = 2 * probs_of(logits[:, 0], NATURAL)[:, None]
    with pytest.raises(ValueError, match=r"^row \d+, position 0 of the window: the residual .* is empty") as caught:
        accept(logits, [[0]] * 30, backend, draft_probs=draft_probs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_residual_that_is_not_finite_is_an_error(value: float, backend: str) -> None:
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(3, 2, 4)
    draft_probs = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(3, 1, 1)
    draft_probs[2, 0, 2] = value
    with pytest.raises(ValueError, match=r"row 2, position 0 .*residual.* not finite"):
        accept(logits, [[0]] * 3, backend, draft_probs=draft_probs)


def test_a_residual_that_only_rounding_leaves_empty_is_that_of_the_target(backend: str) -> None:
    rows, probs = 12 if backend == "triton" else 300, torch.tensor([0.0, 0.5, 0.5])
    logits = probs.log().expand(rows, 2, 3)
    draft_probs = (probs + torch.tensor([5e-7, 0, 0])).expand(rows, 1, 3)
    accepted, next_token = accept(logits, [[0]] * rows, backend, draft_probs=draft_probs)
    assert not accepted.any() and p_value(next_token, probs) > 1e-6
    with pytest.raises(ValueError, match="residual"):
        accept(logits, [[0]] * rows, backend, draft_probs=draft_probs + torch.tensor([2e-6, 0, 0]))


def test_row_status_can_be_read_later(backend: str) -> None:
    arguments = make(NATURAL)
    expected = speculative_accept(**arguments, backend=backend)
    arguments["logits"][1, 0, 5], arguments["logits"][4, 0, 7] = torch.nan, torch.inf
    arguments["draft_probs"][3, 0] = 0
    row_status = torch.full((B,), 9, dtype=torch.int32)
    accepted, next_token = speculative_accept(**arguments, row_status=row_status, backend=backend)
    assert row_status.tolist() == [0, 1, 0, 4, 2, 0]
    assert not accepted[[1, 3, 4]].any() and not next_token[[1, 3, 4]].any()
    fine = row_status == 0
    assert torch.equal(accepted[fine], expected[0][fine]) and torch.equal(next_token[fine], expected[1][fine])
    with pytest.raises(ValueError, match=r"^row 1, position 0 of the window: logits are NaN") as now:
        speculative_accept(**arguments, backend=backend)
    with pytest.raises(ValueError) as later:
        raise_for(row_status, accepted)
    assert str(now.value) == str(later.value)
