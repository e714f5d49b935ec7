"""Which drafted tokens stand, and the token after them."""

import functools
from collections.abc import Callable

import pytest
import torch

from speculative_mamba.ops import sample_tokens, speculative_accept
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.speculative_accept import reference
from speculative_mamba.testing.sampling import rng_keys_of, tensors, text_of
from speculative_mamba.testing.tolerance import assert_bitwise_equal

NATURAL, GREEDY = SamplingParams(temperature=1.0), SamplingParams()
FILTERS = {
    "greedy": GREEDY,
    "natural": NATURAL,
    "top-k": SamplingParams(temperature=0.8, top_k=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.9),
    "all": SamplingParams(temperature=1.2, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    "penalties": SamplingParams(temperature=0.9, presence_penalty=0.6, frequency_penalty=0.4,
                                logit_bias={0: -100, 1: 2.0, 5: -torch.inf, 9: 1.5}),
}  # fmt: skip
every_filter = pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS)
B, K, V = 6, 3, 77


def probs_of(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities of rows of logits (M, V), as ``test_sample_tokens`` checks them."""
    rows, vocabulary = logits.shape
    probs, zeros = torch.empty(logits.shape), torch.zeros(rows, dtype=torch.int64)
    sample_tokens(logits, tensors(params, rows, vocabulary), rng_keys_of(rows), zeros, probs=probs, backend="reference")
    return probs


def computed_once(function: Callable) -> Callable:
    """For arguments of one text: what the specification says is the same beside every backend."""
    results = {}

    @functools.wraps(function)
    def call(*arguments: object) -> tuple:
        key = repr(arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return call


def make(params: SamplingParams | list, rows: int = B, tokens: int = K, vocabulary: int = V, seed: int = 0) -> dict:
    """Arguments of the op: a draft that is not far from the target, and its tokens drawn from its probabilities."""
    made = _made(params, rows, tokens, vocabulary, seed)
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in made.items()}


@computed_once
def _made(params: SamplingParams | list, rows: int, tokens: int, vocabulary: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens + 1, vocabulary, generator=generator) * 2
    prompt_mask = torch.rand(rows, vocabulary, generator=generator) < 0.2
    counts = torch.randint(-3, 3, (rows, vocabulary), generator=generator).clamp(min=0).int()
    text = text_of(prompt_mask, counts)
    rng_keys, positions = rng_keys_of(rows, 11), torch.arange(rows) * 100
    sampling = tensors(params, rows, vocabulary)
    draft_probs, drafted = torch.empty(rows, tokens, vocabulary), torch.empty(rows, tokens, dtype=torch.int64)
    for at in range(tokens):
        theirs = logits[:, at] + 0.5 * torch.randn(rows, vocabulary, generator=generator)
        drafted[:, at] = sample_tokens(
            theirs, sampling, rng_keys, positions + at, Purpose.DRAFT, probs=draft_probs[:, at], **text,
            draft_tokens=drafted[:, :at].contiguous(),
        )  # fmt: skip
    return {"logits": logits, "draft_tokens": drafted, "draft_probs": draft_probs, "sampling": sampling,
            "rng_keys": rng_keys, "positions": positions, **text}  # fmt: skip


def rows_of(arguments: dict, rows: slice) -> dict:
    sliced = {name: value[rows] for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return arguments | sliced | {"sampling": arguments["sampling"].rows_of(rows)}


def choice(arguments: dict, backend: str, at: int) -> torch.Tensor:
    """What ``sample_tokens`` chooses at a position of the window, (B)."""
    return sample_tokens(
        arguments["logits"][:, at], arguments["sampling"], arguments["rng_keys"], arguments["positions"] + at,
        prompt_mask=arguments["prompt_mask"], output_counts=arguments["output_counts"],
        draft_tokens=arguments["draft_tokens"][:, :at].contiguous(), backend=backend,
    )  # fmt: skip


def choices(arguments: dict, backend: str) -> torch.Tensor:
    """At each position, (B, K+1)."""
    return torch.stack([choice(arguments, backend, at) for at in range(arguments["logits"].shape[1])], 1)


def p_value(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """How likely tokens at least this far from the probabilities are; 0 if one was drawn that cannot be."""
    expected = probs.double() * len(tokens)
    observed, possible = torch.bincount(tokens, minlength=len(probs)), expected > 0
    if observed[~possible].any():
        return 0.0
    statistic = ((observed - expected) ** 2 / expected)[possible].sum()
    freedom = torch.tensor(max(possible.sum().item() - 1, 1) / 2).double()
    return torch.special.gammaincc(freedom, statistic / 2).item()


@computed_once
def specified(params: SamplingParams, coupled: bool, rows: int) -> list[tuple[dict, tuple]]:
    """Arguments, and what the specification decides."""
    arguments = make(params, rows) | {"coupled": coupled}
    if coupled:
        arguments["draft_tokens"][:, :2] = choices(arguments, "reference")[:, :2]
    calls = [arguments | other for other in ({}, {"draft_probs": None}, {"active": torch.arange(rows) % 3 > 0})]
    return [(call, speculative_accept(**call, backend="reference")) for call in calls]


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_the_kernels_decide_as_the_specification(params: SamplingParams, coupled: bool, kernels: str) -> None:
    for arguments, expected in specified(params, coupled, 30 if kernels == "cpu" else 6):
        actual = speculative_accept(**arguments, backend=kernels)
        assert_bitwise_equal(actual[0], expected[0], "accepted")
        assert_bitwise_equal(actual[1], expected[1], "next token")
    assert len(expected[0].unique()) > 1, "windows of several lengths"


@pytest.mark.parametrize("vocabulary", [1, 16, 65, 3001])
def test_sizes(vocabulary: int, kernels: str) -> None:
    for params in (NATURAL, SamplingParams(temperature=1.0, top_p=0.99), SamplingParams(temperature=1.0, top_k=1500)):
        arguments = make(params, rows=10 if kernels == "cpu" else 3, vocabulary=vocabulary)
        expected = speculative_accept(**arguments, backend="reference")
        assert all(map(torch.equal, speculative_accept(**arguments, backend=kernels), expected))


@every_filter
def test_coupled_choices_are_those_of_sample_tokens(params: SamplingParams, backend: str) -> None:
    """Position by position, up to and including the first that is not the drafted token.

    Catches: noise one position off, in draft or target.
    """
    rows = torch.arange(5)
    arguments, agreeing = make(params, rows=5), rows % (K + 1)
    for at in range(K):
        chosen = choice(arguments, backend, at)
        arguments["draft_tokens"][:, at] = torch.where(at < agreeing, chosen, (chosen + 1) % V)
    accepted, next_token = speculative_accept(**arguments, coupled=True, backend=backend)
    assert accepted.dtype == torch.int32 and next_token.dtype == torch.int64
    assert torch.equal(accepted, agreeing.int())
    assert_bitwise_equal(next_token, choices(arguments, backend)[rows, agreeing], "next token")


def test_draft_probs_do_not_matter_when_coupled_or_greedy(backend: str) -> None:
    for coupled, params in ((True, NATURAL), (False, GREEDY), (True, GREEDY)):
        arguments = make(params)
        expected = speculative_accept(**{**arguments, "draft_probs": None}, coupled=coupled, backend=backend)
        broken = {**arguments, "draft_probs": torch.full((B, K, V), torch.nan)}
        assert all(map(torch.equal, speculative_accept(**broken, coupled=coupled, backend=backend), expected))


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1e-7)], ids=str
)
@pytest.mark.parametrize("coupled", [False, True])
def test_greedy_takes_the_lowest_id_of_equal_logits(params: SamplingParams, coupled: bool, backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, -1.0]])
    drafted = torch.tensor([[1, 0], [2, 0], [1, 1], [0, 3]])
    accepted, next_token = speculative_accept(
        logits.expand(4, 3, 4),
        drafted,
        None,
        tensors(params, 4, 4),
        rng_keys_of(4),
        torch.arange(4),
        coupled=coupled,
        backend=backend,
    )
    assert accepted.tolist() == [2, 0, 1, 0] and next_token.tolist() == [0, 1, 0, 1]


def test_without_drafted_tokens_it_samples(backend: str) -> None:
    for params in FILTERS.values():
        arguments = make(params, tokens=0)
        for draft_probs in (None, arguments["draft_probs"]):
            accepted, next_token = speculative_accept(**{**arguments, "draft_probs": draft_probs}, backend=backend)
            assert accepted.tolist() == [0] * B
            assert_bitwise_equal(next_token, choices(arguments, backend)[:, 0], "next token")


@pytest.mark.parametrize("certain", [False, True])
def test_refused_tokens_are_replaced_from_the_residual(certain: bool, backend: str) -> None:
    """Acceptance min(1, p/q) and residual max(p - q, 0) of Leviathan et al., against numbers by hand."""
    rows = {"cpu": 30_000, "triton": 50}.get(backend, 600)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1], dtype=torch.float64)
    token = 1
    if certain:
        rate, residual = 0.3, torch.tensor([4.0, 0, 2, 1, 0]).double() / 7
    else:
        rate, residual = 0.5, torch.tensor([3.0, 0, 1, 0, 0]).double() / 4
    logits = torch.stack([p, p.flip(0)]).log().float().expand(rows, 2, 5)
    draft_probs = None if certain else q.float().expand(rows, 1, 5)
    drafted = torch.full((rows, 1), token)
    accepted, next_token = speculative_accept(
        logits,
        drafted,
        draft_probs,
        tensors(NATURAL, rows, 5),
        rng_keys_of(rows),
        torch.zeros(rows, dtype=torch.int64),
        backend=backend,
    )
    assert abs(accepted.double().mean().item() - rate) < 5 * (rate * (1 - rate) / rows) ** 0.5
    assert p_value(next_token[accepted == 0], residual) > 1e-6
    assert p_value(next_token[accepted == 1], p.flip(0)) > 1e-6


def test_the_residual_is_that_of_the_filtered_probs(backend: str) -> None:
    """With top-k 3 the target is (4, 3, 2, 0) / 9: beside a draft of (2, 7, 0, 0) / 9 it lacks (2, 0, 2, 0) / 9."""
    rows = {"cpu": 30_000, "triton": 50}.get(backend, 600)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(rows, 2, 4)
    draft_probs = (torch.tensor([2.0, 7, 0, 0]) / 9).expand(rows, 1, 4)
    accepted, next_token = speculative_accept(
        logits, torch.ones(rows, 1, dtype=torch.int64), draft_probs,
        tensors(SamplingParams(temperature=1.0, top_k=3), rows, 4), rng_keys_of(rows),
        torch.zeros(rows, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    assert abs(accepted.double().mean().item() - 3 / 7) < 5 * (12 / 49 / rows) ** 0.5
    assert p_value(next_token[accepted == 0], torch.tensor([0.5, 0, 0.5, 0])) > 1e-6


def test_a_token_the_target_gives_nothing_is_never_accepted_nor_drawn(backend: str) -> None:
    rows = {"cpu": 50_000, "triton": 20}.get(backend, 300)
    p = torch.tensor([0.0, 0.5, 0.5, 0.0])
    for draft_probs in (None, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(rows, 1, 4)):
        accepted, next_token = speculative_accept(
            p.log().expand(rows, 2, 4), torch.zeros(rows, 1, dtype=torch.int64), draft_probs, tensors(NATURAL, rows, 4),
            rng_keys_of(rows, 3),
            torch.arange(rows), backend=backend,
        )  # fmt: skip
        assert not accepted.any()
        assert set(next_token.tolist()) == ({1, 2} if draft_probs is None else {2})


def test_the_test_is_strict_even_when_the_random_number_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification with u = 0, which no seed within reach gives. Catches: u·q ≤ p instead of <."""
    monkeypatch.setattr(reference, "uniform", lambda *key: 0.0)
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(1, 2, 4)
    accepted, _ = speculative_accept(
        logits,
        torch.tensor([[0]]),
        None,
        tensors(NATURAL, 1, 4),
        rng_keys_of(1),
        torch.zeros(1, dtype=torch.int64),
        backend="reference",
    )
    assert accepted.tolist() == [0]


def test_a_draft_with_the_probs_of_the_target_is_always_right(backend: str) -> None:
    for params in (NATURAL, FILTERS["top-k"], FILTERS["top-p"]):
        arguments = make(params, rows={"cpu": 200, "triton": 8}.get(backend, 20))
        draft_probs = arguments["draft_probs"]
        for at in range(K):
            arguments["draft_tokens"][:, at] = sample_tokens(
                arguments["logits"][:, at], arguments["sampling"], arguments["rng_keys"],
                arguments["positions"] + at, Purpose.DRAFT, probs=draft_probs[:, at], backend=backend,
            )  # fmt: skip
        accepted, _ = speculative_accept(**arguments, backend=backend)
        assert (accepted == K).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_the_penalty_sees_the_text_and_the_drafted_tokens_before(coupled: bool, backend: str) -> None:
    """Of equal logits, those of tokens that the text holds fall so far that only the others are drawn."""
    params = SamplingParams(temperature=0.05, repetition_penalty=1000.0)
    rows = 40
    logits, text = torch.ones(rows, 4, 4), text_of((torch.arange(4) == 2).expand(rows, 4).contiguous())
    drafted = torch.tensor([[0, 1, 3]]).expand(rows, 3).contiguous()
    draft_probs = None if coupled else torch.tensor([[1, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]).expand(rows, 3, 4)
    accepted, next_token = speculative_accept(
        logits, drafted, draft_probs, tensors(params, rows, 4), rng_keys_of(rows), torch.zeros(rows, dtype=torch.int64),
        coupled=coupled, **text, backend=backend,
    )  # fmt: skip
    assert set(next_token[accepted == 0].tolist()) == {1, 3}
    assert set(next_token[accepted == 1].tolist()) == {3}
    assert not (accepted == 2).any(), "after 0 and 1, and 2 in the text, only 3 is left"
    assert len(next_token[accepted == 3].unique()) > 1
    assert text["prompt_mask"].sum() == rows and not text["output_counts"].any(), "the text is not written"


def test_a_token_drafted_twice_is_penalised_once(backend: str) -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0], [9.0, 1.0, 0.0], [9.0, 3.0, 0.0]])
    accepted, next_token = speculative_accept(
        logits[None], torch.tensor([[0, 0, 0]]), None, tensors(params, 1, 3), rng_keys_of(1),
        torch.zeros(1, dtype=torch.int64), **text_of(torch.zeros(1, 3, dtype=torch.bool)), backend=backend,
    )  # fmt: skip
    assert (accepted.item(), next_token.item()) == (3, 0), "9 / 2 > 3, 9 / 4 is not"


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(params: SamplingParams, coupled: bool, backend: str) -> None:
    arguments = make(params)
    accepted, next_token = speculative_accept(**arguments, coupled=coupled, backend=backend)
    for row in range(B):
        alone = speculative_accept(**rows_of(arguments, slice(row, row + 1)), coupled=coupled, backend=backend)
        assert [t.item() for t in alone] == [accepted[row].item(), next_token[row].item()]


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_a_shorter_window_decides_the_same(params: SamplingParams, coupled: bool, backend: str) -> None:
    """A row whose draft is refused within the first tokens does not depend on how many came after."""
    arguments = make(params, rows=8)
    accepted, next_token = speculative_accept(**arguments, coupled=coupled, backend=backend)
    for tokens in range(1, K):
        shorter = {**arguments, "logits": arguments["logits"][:, : tokens + 1],
                   "draft_probs": arguments["draft_probs"][:, :tokens],
                   "draft_tokens": arguments["draft_tokens"][:, :tokens].contiguous()}  # fmt: skip
        short_accepted, short_next_token = speculative_accept(**shorter, coupled=coupled, backend=backend)
        assert torch.equal(short_accepted, accepted.clamp(max=tokens))
        within = accepted < tokens
        assert torch.equal(short_next_token[within], next_token[within])


@computed_once
def unlike_rows(params: SamplingParams, coupled: bool, certain: bool) -> dict:
    """Of which every second agrees with the target."""
    arguments = make(params, rows=2 * (K + 2))
    if coupled or certain:
        arguments["logits"] *= 3
        arguments["draft_tokens"][::2] = choices(arguments, "reference")[::2, :K]
    return arguments | ({"draft_probs": None} if certain else {})


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_num_draft_tokens_are_as_many_drafted_tokens(
    params: SamplingParams, coupled: bool, certain: bool, backend: str
) -> None:
    """Each row is as in a call of its own with that K; what lies behind is not looked at."""
    arguments = unlike_rows(params, coupled, certain)
    limits, reached = torch.arange(2 * (K + 2), dtype=torch.int32) // 2, 0
    behind = torch.arange(K + 1) > limits[:, None]
    arguments = arguments | {"logits": arguments["logits"].masked_fill(behind[..., None], torch.nan)}
    accepted, next_token = speculative_accept(**arguments, coupled=coupled, num_draft_tokens=limits, backend=backend)
    for row, limit in enumerate(limits.clamp(max=K).tolist()):
        alone = rows_of(arguments, slice(row, row + 1)) | {"coupled": coupled, "backend": backend}
        alone |= {
            "logits": alone["logits"][:, : limit + 1],
            "draft_tokens": alone["draft_tokens"][:, :limit].contiguous(),
        }
        alone["draft_probs"] = None if certain else alone["draft_probs"][:, :limit]
        assert [t.item() for t in speculative_accept(**alone)] == [accepted[row].item(), next_token[row].item()]
        reached += 0 < limit == accepted[row]
    assert reached, "a window that ends at its limit"


@computed_once
def stopping(params: SamplingParams, coupled: bool) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Arguments with stop tokens, and what the specification decides without them."""
    arguments = make(params, rows=8 * K) | {"coupled": coupled}
    if coupled:
        arguments["draft_tokens"][::2] = choices(arguments, "reference")[::2, :K]
    rows, is_stop = torch.arange(8 * K), torch.zeros(8 * K, V, dtype=torch.bool)
    is_stop[rows, arguments["draft_tokens"][rows, rows % K]] = True
    return arguments | {"is_stop": is_stop}, *speculative_accept(**arguments, backend="reference")


@every_filter
@pytest.mark.parametrize("coupled", [False, True])
def test_nothing_is_decided_behind_a_stop_token(params: SamplingParams, coupled: bool, backend: str) -> None:
    """Catches: a stop token that is looked for one position too late."""
    arguments, accepted, next_token = stopping(params, coupled)
    stops_at = (
        arguments["is_stop"].gather(1, arguments["draft_tokens"]).int().argmax(1)
    )  # the place of each row's first
    behind = accepted > stops_at
    unread = (torch.arange(K + 1) > stops_at[:, None])[..., None]
    logits = arguments["logits"].masked_fill(unread, torch.nan)
    found, then = speculative_accept(**{**arguments, "logits": logits}, backend=backend)
    assert torch.equal(found, torch.where(behind, stops_at + 1, accepted).int())
    assert torch.equal(then, torch.where(behind, 0, next_token))
    assert behind.any()


@pytest.mark.parametrize("coupled", [False, True])
def test_threads_change_nothing(coupled: bool, cpu: str) -> None:
    for params in FILTERS.values():
        arguments = make(params, rows=9, vocabulary=12_011)
        torch.set_num_threads(1)
        expected = speculative_accept(**arguments, coupled=coupled, backend=cpu)
        torch.set_num_threads(2)
        again = speculative_accept(**arguments, coupled=coupled, backend=cpu)
        assert all(map(torch.equal, again, expected))


@every_filter
def test_views_with_gaps(params: SamplingParams, backend: str) -> None:
    arguments = make(params)
    expected = speculative_accept(**arguments, backend=backend)
    logits, draft_probs = torch.full((B + 1, K + 5, V + 20), torch.nan), torch.full((B + 1, 2 * K, V + 3), torch.nan)
    views = {"logits": logits[1:, 2 : K + 3, 7 : V + 7], "draft_probs": draft_probs[1:, ::2, 1 : V + 1]}
    for name, view in views.items():
        view[:] = arguments[name]
    assert all(map(torch.equal, speculative_accept(**{**arguments, **views}, backend=backend), expected))


def test_inputs_are_not_written(backend: str) -> None:
    for params in FILTERS.values():
        arguments = make(params)
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        speculative_accept(**arguments, backend=backend)
        for name, value in before.items():
            assert_bitwise_equal(arguments[name], value, name)


def test_inactive_rows_are_not_looked_at(backend: str) -> None:
    arguments = make(NATURAL)
    accepted, next_token = speculative_accept(**arguments, backend=backend)
    arguments["logits"][1], arguments["draft_probs"][1] = torch.nan, torch.nan
    arguments["logits"][4] = -torch.inf
    active = torch.tensor([True, False, True, True, False, True])
    actual = speculative_accept(**arguments, active=active, backend=backend)
    assert torch.equal(actual[0], accepted * active) and torch.equal(actual[1], next_token * active)
