"""Which drafted tokens stand, the token after them, and what is refused as an argument."""

import pytest
import torch

from speculative_mamba.ops import sample_tokens, speculative_accept
from speculative_mamba.ops.filters import Filters
from speculative_mamba.ops.law import raise_for
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.speculative_accept import reference
from speculative_mamba.testing.tolerance import assert_bitwise_equal

NATURAL, GREEDY = Filters(temperature=1.0), Filters()
FILTERS = {
    "greedy": GREEDY,
    "natural": NATURAL,
    "top-k": Filters(temperature=0.8, top_k=5),
    "top-p": Filters(temperature=1.0, top_p=0.9),
    "all": Filters(temperature=1.2, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
}
every_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
B, K, V = 6, 3, 77


def keys_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.full((rows,), seed), torch.arange(rows)], 1)


def law_of(logits: torch.Tensor, filters: Filters, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Laws of rows of logits (M, V), as ``test_sample_tokens`` checks them."""
    laws = torch.empty(logits.shape)
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    sample_tokens(logits, filters, keys_of(len(logits)), zeros, laws=laws, seen=seen, backend="reference")
    return laws


def make(filters: Filters, rows: int = B, tokens: int = K, vocabulary: int = V, seed: int = 0) -> dict:
    """Arguments of the op: a draft that is not far from the target, and its tokens drawn from its laws."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens + 1, vocabulary, generator=generator) * 2
    seen = torch.rand(rows, vocabulary, generator=generator) < 0.2
    keys, positions = keys_of(rows, 11), torch.arange(rows) * 100
    laws, drafted = torch.empty(rows, tokens, vocabulary), torch.empty(rows, tokens, dtype=torch.int64)
    for at in range(tokens):
        theirs = logits[:, at] + 0.5 * torch.randn(rows, vocabulary, generator=generator)
        drafted[:, at] = sample_tokens(
            theirs, filters, keys, positions + at, Purpose.DRAFT, laws=laws[:, at], seen=seen,
            recent=drafted[:, :at].contiguous(),
        )  # fmt: skip
    return {"logits": logits, "drafted": drafted, "laws": laws, "filters": filters, "keys": keys,
            "positions": positions, "seen": seen}  # fmt: skip


def rows_of(arguments: dict, rows: slice) -> dict:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def choices(arguments: dict, backend: str) -> torch.Tensor:
    """What ``sample_tokens`` chooses at each position of the window, (B, K+1)."""
    drafted, tokens = arguments["drafted"], []
    for at in range(arguments["logits"].shape[1]):
        token = sample_tokens(
            arguments["logits"][:, at], arguments["filters"], arguments["keys"], arguments["positions"] + at,
            seen=arguments["seen"], recent=drafted[:, :at].contiguous(), backend=backend,
        )  # fmt: skip
        tokens.append(token)
    return torch.stack(tokens, 1)


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """How likely tokens at least this far from the law are; 0 if one was drawn that cannot be."""
    expected = law.double() * len(tokens)
    observed, possible = torch.bincount(tokens, minlength=len(law)), expected > 0
    if observed[~possible].any():
        return 0.0
    statistic = ((observed - expected) ** 2 / expected)[possible].sum()
    freedom = torch.tensor(max(possible.sum().item() - 1, 1) / 2).double()
    return torch.special.gammaincc(freedom, statistic / 2).item()


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_the_kernels_decide_as_the_specification(filters: Filters, coupled: bool, kernels: str) -> None:
    rows = 30 if kernels == "cpu" else 10
    arguments = make(filters, rows=rows)
    if coupled:
        arguments["drafted"][:, :2] = choices(arguments, "reference")[:, :2]
    for options in ({}, {"laws": None}, {"active": torch.arange(rows) % 3 > 0}):
        expected = speculative_accept(**{**arguments, **options}, coupled=coupled, backend="reference")
        actual = speculative_accept(**{**arguments, **options}, coupled=coupled, backend=kernels)
        assert_bitwise_equal(actual[0], expected[0], "accepted")
        assert_bitwise_equal(actual[1], expected[1], "next token")
    assert len(expected[0].unique()) > 1, "windows of several lengths"


@pytest.mark.parametrize("vocabulary", [1, 16, 65, 3001])
def test_sizes(vocabulary: int, kernels: str) -> None:
    for filters in (NATURAL, Filters(temperature=1.0, top_p=0.99), Filters(temperature=1.0, top_k=1500)):
        arguments = make(filters, rows=10 if kernels == "cpu" else 3, vocabulary=vocabulary)
        expected = speculative_accept(**arguments, backend="reference")
        assert all(map(torch.equal, speculative_accept(**arguments, backend=kernels), expected))


@every_filter
def test_coupled_choices_are_those_of_sample_tokens(filters: Filters, backend: str) -> None:
    """Position by position, up to and including the first that is not the drafted token."""
    arguments = make(filters, rows=5)
    for agreeing in range(K + 1):
        for at in range(K):
            chosen = choices(arguments, backend)[:, at]
            arguments["drafted"][:, at] = chosen if at < agreeing else (chosen + 1) % V
        accepted, following = speculative_accept(**arguments, coupled=True, backend=backend)
        assert accepted.dtype == torch.int32 and following.dtype == torch.int64
        assert accepted.tolist() == [agreeing] * 5
        assert_bitwise_equal(following, choices(arguments, backend)[:, agreeing], "next token")


def test_laws_do_not_matter_when_coupled_or_greedy(backend: str) -> None:
    for coupled, filters in ((True, NATURAL), (False, GREEDY), (True, GREEDY)):
        arguments = make(filters)
        expected = speculative_accept(**{**arguments, "laws": None}, coupled=coupled, backend=backend)
        broken = {**arguments, "laws": torch.full((B, K, V), torch.nan)}
        assert all(map(torch.equal, speculative_accept(**broken, coupled=coupled, backend=backend), expected))


@pytest.mark.parametrize("filters", [GREEDY, Filters(temperature=1.0, top_k=1), Filters(temperature=1e-7)], ids=str)
@pytest.mark.parametrize("coupled", [False, True])
def test_greedy_takes_the_lowest_id_of_equal_logits(filters: Filters, coupled: bool, backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, -1.0]])
    drafted = torch.tensor([[1, 0], [2, 0], [1, 1], [0, 3]])
    accepted, following = speculative_accept(
        logits.expand(4, 3, 4), drafted, None, filters, keys_of(4), torch.arange(4), coupled=coupled, backend=backend
    )
    assert accepted.tolist() == [2, 0, 1, 0] and following.tolist() == [0, 1, 0, 1]


def test_without_drafted_tokens_it_samples(backend: str) -> None:
    for filters in FILTERS.values():
        arguments = make(filters, tokens=0)
        for laws in (None, arguments["laws"]):
            accepted, following = speculative_accept(**{**arguments, "laws": laws}, backend=backend)
            assert accepted.tolist() == [0] * B
            assert_bitwise_equal(following, choices(arguments, backend)[:, 0], "next token")


@pytest.mark.parametrize("certain", [False, True])
def test_refused_tokens_are_replaced_from_the_residual(certain: bool, backend: str) -> None:
    """Acceptance min(1, p/q) and residual max(p - q, 0) of Leviathan et al., against numbers by hand."""
    rows = {"cpu": 30_000, "triton": 150}.get(backend, 600)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1], dtype=torch.float64)
    token = 1
    if certain:
        rate, residual = 0.3, torch.tensor([4.0, 0, 2, 1, 0]).double() / 7
    else:
        rate, residual = 0.5, torch.tensor([3.0, 0, 1, 0, 0]).double() / 4
    logits = torch.stack([p, p.flip(0)]).log().float().expand(rows, 2, 5)
    laws = None if certain else q.float().expand(rows, 1, 5)
    drafted = torch.full((rows, 1), token)
    accepted, following = speculative_accept(
        logits, drafted, laws, NATURAL, keys_of(rows), torch.zeros(rows, dtype=torch.int64), backend=backend
    )
    assert abs(accepted.double().mean().item() - rate) < 5 * (rate * (1 - rate) / rows) ** 0.5
    assert p_value(following[accepted == 0], residual) > 1e-6
    assert p_value(following[accepted == 1], p.flip(0)) > 1e-6


def test_the_residual_is_that_of_the_filtered_law(backend: str) -> None:
    """With top-k 3 the target is (4, 3, 2, 0) / 9: beside a draft of (2, 7, 0, 0) / 9 it lacks (2, 0, 2, 0) / 9."""
    rows = {"cpu": 30_000, "triton": 150}.get(backend, 600)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(rows, 2, 4)
    laws = (torch.tensor([2.0, 7, 0, 0]) / 9).expand(rows, 1, 4)
    accepted, following = speculative_accept(
        logits, torch.ones(rows, 1, dtype=torch.int64), laws, Filters(temperature=1.0, top_k=3), keys_of(rows),
        torch.zeros(rows, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    assert abs(accepted.double().mean().item() - 3 / 7) < 5 * (12 / 49 / rows) ** 0.5
    assert p_value(following[accepted == 0], torch.tensor([0.5, 0, 0.5, 0])) > 1e-6


def test_a_token_the_target_gives_nothing_is_never_accepted_nor_drawn(backend: str) -> None:
    rows = {"cpu": 50_000, "triton": 60}.get(backend, 300)
    p = torch.tensor([0.0, 0.5, 0.5, 0.0])
    for laws in (None, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(rows, 1, 4)):
        accepted, following = speculative_accept(
            p.log().expand(rows, 2, 4), torch.zeros(rows, 1, dtype=torch.int64), laws, NATURAL, keys_of(rows, 3),
            torch.arange(rows), backend=backend,
        )  # fmt: skip
        assert not accepted.any()
        assert set(following.tolist()) == ({1, 2} if laws is None else {2})


def test_the_test_is_strict_even_when_the_random_number_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification with u = 0, which no seed within reach gives."""
    monkeypatch.setattr(reference, "uniform", lambda *key: 0.0)
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(1, 2, 4)
    accepted, _ = speculative_accept(
        logits, torch.tensor([[0]]), None, NATURAL, keys_of(1), torch.zeros(1, dtype=torch.int64), backend="reference"
    )
    assert accepted.tolist() == [0]


def test_a_draft_with_the_laws_of_the_target_is_always_right(backend: str) -> None:
    for filters in (NATURAL, FILTERS["top-k"], FILTERS["top-p"]):
        arguments = make(filters, rows=200 if backend == "cpu" else 20)
        laws = arguments["laws"]
        for at in range(K):
            arguments["drafted"][:, at] = sample_tokens(
                arguments["logits"][:, at], filters, arguments["keys"], arguments["positions"] + at, Purpose.DRAFT,
                laws=laws[:, at], backend=backend,
            )  # fmt: skip
        accepted, _ = speculative_accept(**arguments, backend=backend)
        assert (accepted == K).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_the_penalty_sees_the_text_and_the_drafted_tokens_before(coupled: bool, backend: str) -> None:
    """Of equal logits, those of tokens that the text holds fall so far that only the others are drawn."""
    filters = Filters(temperature=0.05, repetition_penalty=1000.0)
    rows = 40
    logits, seen = torch.ones(rows, 4, 4), torch.zeros(rows, 4, dtype=torch.bool)
    seen[:, 2] = True
    drafted = torch.tensor([[0, 1, 3]]).expand(rows, 3).contiguous()
    laws = None if coupled else torch.tensor([[1, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]).expand(rows, 3, 4)
    accepted, following = speculative_accept(
        logits, drafted, laws, filters, keys_of(rows), torch.zeros(rows, dtype=torch.int64), coupled=coupled,
        seen=seen, backend=backend,
    )  # fmt: skip
    assert set(following[accepted == 0].tolist()) == {1, 3}
    assert set(following[accepted == 1].tolist()) == {3}
    assert not (accepted == 2).any(), "after 0 and 1, and 2 in the text, only 3 is left"
    assert len(following[accepted == 3].unique()) > 1
    assert seen.sum() == rows, "seen is not written"


def test_a_token_drafted_twice_is_penalised_once(backend: str) -> None:
    filters = Filters(repetition_penalty=2.0)
    logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0], [9.0, 1.0, 0.0], [9.0, 3.0, 0.0]])
    accepted, following = speculative_accept(
        logits[None], torch.tensor([[0, 0, 0]]), None, filters, keys_of(1), torch.zeros(1, dtype=torch.int64),
        seen=torch.zeros(1, 3, dtype=torch.bool), backend=backend,
    )  # fmt: skip
    assert (accepted.item(), following.item()) == (3, 0), "9 / 2 > 3, 9 / 4 is not"


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(filters: Filters, coupled: bool, backend: str) -> None:
    arguments = make(filters)
    accepted, following = speculative_accept(**arguments, coupled=coupled, backend=backend)
    for row in range(B):
        alone = speculative_accept(**rows_of(arguments, slice(row, row + 1)), coupled=coupled, backend=backend)
        assert [t.item() for t in alone] == [accepted[row].item(), following[row].item()]


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_a_shorter_window_decides_the_same(filters: Filters, coupled: bool, backend: str) -> None:
    """A row whose draft is refused within the first tokens does not depend on how many came after."""
    arguments = make(filters, rows=8)
    accepted, following = speculative_accept(**arguments, coupled=coupled, backend=backend)
    for tokens in range(1, K):
        shorter = {**arguments, "logits": arguments["logits"][:, : tokens + 1], "laws": arguments["laws"][:, :tokens],
                   "drafted": arguments["drafted"][:, :tokens].contiguous()}  # fmt: skip
        short_accepted, short_following = speculative_accept(**shorter, coupled=coupled, backend=backend)
        assert torch.equal(short_accepted, accepted.clamp(max=tokens))
        within = accepted < tokens
        assert torch.equal(short_following[within], following[within])


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_limits_are_as_many_drafted_tokens(filters: Filters, coupled: bool, certain: bool, backend: str) -> None:
    """Each row is as in a call of its own with that K; what lies behind is not looked at."""
    arguments = make(filters, rows=2 * (K + 2))
    if coupled or certain:
        arguments["logits"] *= 3
        arguments["drafted"][::2] = choices(arguments, "reference")[::2, :K]
    if certain:
        arguments["laws"] = None
    limits, reached = torch.arange(2 * (K + 2), dtype=torch.int32) // 2, 0
    arguments["logits"][torch.arange(K + 1) > limits[:, None]] = torch.nan
    accepted, following = speculative_accept(**arguments, coupled=coupled, limits=limits, backend=backend)
    for row, limit in enumerate(limits.clamp(max=K).tolist()):
        alone = rows_of(arguments, slice(row, row + 1)) | {"coupled": coupled, "backend": backend}
        alone |= {"logits": alone["logits"][:, : limit + 1], "drafted": alone["drafted"][:, :limit].contiguous()}
        alone["laws"] = None if certain else alone["laws"][:, :limit]
        assert [t.item() for t in speculative_accept(**alone)] == [accepted[row].item(), following[row].item()]
        reached += 0 < limit == accepted[row]
    assert reached, "a window that ends at its limit"


@pytest.mark.parametrize("coupled", [False, True])
def test_threads_change_nothing(coupled: bool, kernels: str) -> None:
    for filters in FILTERS.values():
        arguments = make(filters, rows=9, vocabulary=12_011 if kernels == "cpu" else 3001)
        torch.set_num_threads(1)
        expected = speculative_accept(**arguments, coupled=coupled, backend=kernels)
        torch.set_num_threads(2)
        again = speculative_accept(**arguments, coupled=coupled, backend=kernels)
        assert all(map(torch.equal, again, expected))


@every_filter
def test_views_with_gaps(filters: Filters, backend: str) -> None:
    arguments = make(filters)
    expected = speculative_accept(**arguments, backend=backend)
    logits, laws = torch.full((B + 1, K + 5, V + 20), torch.nan), torch.full((B + 1, 2 * K, V + 3), torch.nan)
    views = {"logits": logits[1:, 2 : K + 3, 7 : V + 7], "laws": laws[1:, ::2, 1 : V + 1]}
    for name, view in views.items():
        view[:] = arguments[name]
    assert all(map(torch.equal, speculative_accept(**{**arguments, **views}, backend=backend), expected))


def test_inputs_are_not_written(backend: str) -> None:
    for filters in FILTERS.values():
        arguments = make(filters)
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        speculative_accept(**arguments, backend=backend)
        for name, value in before.items():
            assert_bitwise_equal(arguments[name], value, name)


def test_inactive_rows_are_not_looked_at(backend: str) -> None:
    arguments = make(NATURAL)
    accepted, following = speculative_accept(**arguments, backend=backend)
    arguments["logits"][1], arguments["laws"][1] = torch.nan, torch.nan
    arguments["logits"][4] = -torch.inf
    active = torch.tensor([True, False, True, True, False, True])
    actual = speculative_accept(**arguments, active=active, backend=backend)
    assert torch.equal(actual[0], accepted * active) and torch.equal(actual[1], following * active)


def window(tokens: list[list[int]], vocabulary: int = 5) -> torch.Tensor:
    """Logits of a target that is certain of these tokens."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float().log()


def accept(logits: torch.Tensor, drafted: list[list[int]], backend: str, filters=NATURAL, **options) -> tuple:
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    laws = options.pop("laws", None)
    keys = keys_of(len(logits))
    return speculative_accept(logits, torch.tensor(drafted), laws, filters, keys, zeros, backend=backend, **options)


MODES = [(NATURAL, False), (NATURAL, True), (GREEDY, False), (Filters(temperature=1.0, top_p=0.9), False)]


@pytest.mark.parametrize(("filters", "coupled"), MODES, ids=["rejection", "coupled", "greedy", "top-p"])
def test_broken_logits_are_named_only_where_they_matter(filters: Filters, coupled: bool, backend: str) -> None:
    logits = window([[1, 2, 3]] * 3)
    right, wrong = [[1, 2]] * 3, [[1, 2], [4, 2], [1, 2]]
    broken = [(torch.nan, "NaN"), (-torch.inf, "every token has probability 0")]
    for value, what in broken + ([] if filters.greedy else [(torch.inf, "infinite")]):
        for at in range(3):
            logits = window([[1, 2, 3]] * 3)
            logits[1, at] = value
            with pytest.raises(ValueError, match=f"^row 1, position {at} of the window: .*{what}") as caught:
                accept(logits, right, backend, filters, coupled=coupled)
            assert "\n" not in str(caught.value)
            if at:  # the first token is refused, and what is behind it is never looked at
                accepted, following = accept(logits, wrong, backend, filters, coupled=coupled)
                assert accepted.tolist() == [2, 0, 2] and following.tolist() == [3, 1, 3]


@pytest.mark.parametrize("column", [0, 16, 76])
def test_one_nan_is_enough(column: int, backend: str) -> None:
    for filters in FILTERS.values():
        arguments = make(filters)
        arguments["logits"][4, 0, column] = torch.nan
        with pytest.raises(ValueError, match=r"row 4, position 0 .*NaN"):
            speculative_accept(**arguments, backend=backend)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -0.5])
def test_a_law_that_gives_its_own_token_no_probability_is_named(value: float, backend: str) -> None:
    logits = window([[1, 2, 3]] * 2)
    laws = window([[1, 2]] * 2).exp()
    laws[1, 1, 2] = value
    with pytest.raises(ValueError, match=r"row 1, position 1 .*law gives its own token no probability") as caught:
        accept(logits, [[1, 2]] * 2, backend, laws=laws)
    assert "\n" not in str(caught.value)
    laws[1, 0, :2] = 0.5  # a refused token before it, and the broken law matters no more
    accepted, _ = accept(logits, [[1, 2], [0, 2]], backend, laws=laws)
    assert accepted.tolist() == [2, 0]


def test_an_empty_residual_is_an_error_that_names_the_row(backend: str) -> None:
    """Laws twice as large as a law can be: every second token is refused, and nothing is left to draw."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(30, 2, 4)
    laws = 2 * law_of(logits[:, 0], NATURAL)[:, None]
    with pytest.raises(ValueError, match=r"^row \d+, position 0 of the window: the residual .* is empty") as caught:
        accept(logits, [[0]] * 30, backend, laws=laws)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_residual_that_is_not_finite_is_an_error(value: float, backend: str) -> None:
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(3, 2, 4)
    laws = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(3, 1, 1)
    laws[2, 0, 2] = value
    with pytest.raises(ValueError, match=r"row 2, position 0 .*residual.* not finite"):
        accept(logits, [[0]] * 3, backend, laws=laws)


def test_a_residual_that_only_rounding_leaves_empty_is_the_law_of_the_target(backend: str) -> None:
    rows, law = 30 if backend == "triton" else 300, torch.tensor([0.0, 0.5, 0.5])
    logits = law.log().expand(rows, 2, 3)
    laws = (law + torch.tensor([5e-7, 0, 0])).expand(rows, 1, 3)
    accepted, following = accept(logits, [[0]] * rows, backend, laws=laws)
    assert not accepted.any() and p_value(following, law) > 1e-6
    with pytest.raises(ValueError, match="residual"):
        accept(logits, [[0]] * rows, backend, laws=laws + torch.tensor([2e-6, 0, 0]))


def test_verdicts_can_be_read_later(backend: str) -> None:
    arguments = make(NATURAL)
    expected = speculative_accept(**arguments, backend=backend)
    arguments["logits"][1, 0, 5], arguments["logits"][4, 0, 7] = torch.nan, torch.inf
    arguments["laws"][3, 0] = 0
    verdicts = torch.full((B,), 9, dtype=torch.int32)
    accepted, following = speculative_accept(**arguments, verdicts=verdicts, backend=backend)
    assert verdicts.tolist() == [0, 1, 0, 4, 2, 0]
    assert not accepted[[1, 3, 4]].any() and not following[[1, 3, 4]].any()
    fine = verdicts == 0
    assert torch.equal(accepted[fine], expected[0][fine]) and torch.equal(following[fine], expected[1][fine])
    with pytest.raises(ValueError, match=r"^row 1, position 0 of the window: logits are NaN") as now:
        speculative_accept(**arguments, backend=backend)
    with pytest.raises(ValueError) as later:
        raise_for(verdicts, accepted)
    assert str(now.value) == str(later.value)


def every_argument() -> dict:
    more = {"active": torch.bool, "limits": torch.int32, "verdicts": torch.int32}
    return make(NATURAL) | {name: torch.ones(B, dtype=dtype) for name, dtype in more.items()}


def refused(match: str, backend: str, **wrong: object) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        speculative_accept(**{**every_argument(), **wrong}, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in every_argument() if name != "filters"])
def test_arguments_that_do_not_fit_are_named(name: str, backend: str) -> None:
    tensor = every_argument()[name]
    refused(r"\bmeta\b" if name == "logits" else rf"\b{name}\b.*\bmeta\b", backend, **{name: tensor.to("meta")})
    refused(rf"\b{name}\b", backend, **{name: tensor.to(torch.int16)})
    refused(rf"\b{name}\b", backend, **{name: tensor[None]})
    if name != "logits":
        refused(rf"\b{name}\b", backend, **{name: torch.cat([tensor, tensor[:1]])})
    refused(rf"\b{name}\b.*contiguous", backend, **{name: tensor.repeat_interleave(2, -1)[..., ::2]})


def test_sizes_that_do_not_fit_are_named(backend: str) -> None:
    base = make(NATURAL)
    refused("drafted must have shape", backend, drafted=base["drafted"][:, 1:].contiguous())
    refused("laws must have shape", backend, laws=base["laws"][:, 1:])
    refused("laws must have shape", backend, laws=base["laws"][..., 1:].contiguous())
    refused(r"logits must have shape \(B, K\+1, V\)", backend, logits=base["logits"][:, :0])
    refused(r"keys must have shape \(6, 2\)", backend, keys=base["keys"][:, :1].contiguous())


def test_limits_are_not_negative(backend: str) -> None:
    refused("limits must be at least 0", backend, limits=torch.tensor([1, 2, 3, -1, 0, 9], dtype=torch.int32))


@pytest.mark.parametrize("token", [-1, V])
def test_drafted_tokens_are_of_the_vocabulary(token: int, backend: str) -> None:
    drafted = make(NATURAL)["drafted"]
    drafted[2, 1] = token
    refused("drafted.*from 0 to 76", backend, drafted=drafted)


def test_a_penalty_needs_the_text(backend: str) -> None:
    refused("penalty needs seen", backend, filters=Filters(temperature=1.0, repetition_penalty=1.1), seen=None)


def test_a_law_that_another_softmax_rounded_is_no_error(kernels):
    logits = torch.full((1, 50280), -16.6)
    logits[0, 0] = 0
    q, rows = torch.softmax(logits.double(), -1).float(), {"cpu": 500, "triton": 1}.get(kernels, 10)
    for seed in range(4):
        zeros = torch.zeros(rows, dtype=torch.int64)
        speculative_accept(
            logits.expand(rows, 2, -1), zeros[:, None], q.expand(rows, 1, -1), NATURAL, keys_of(rows, seed), zeros,
            backend=kernels,
        )  # fmt: skip


def test_a_draft_law_that_is_nan_where_the_target_has_nothing_does_not_matter(backend):
    p, q = torch.tensor([0, 0.5, 0.5, 0]), torch.tensor([0.5, 0.5, 0, torch.nan])
    zeros = torch.zeros(1, dtype=torch.int64)
    accepted, following = speculative_accept(
        p.log().expand(1, 2, -1), zeros[:, None], q[None, None], NATURAL, keys_of(1), zeros, backend=backend
    )
    assert accepted.item() == 0 and following.item() == 2
