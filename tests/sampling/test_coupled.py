"""Guarantee 3: coupled, the text is that of plain sampling with the same seed, token for token."""

import dataclasses

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel, random_model, tiny_config
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate

FILTERS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "top-k top-p": {"top_k": 4, "top_p": 0.8, "temperature": 0.9},
    "min-p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5},
    "counts": {"presence_penalty": 0.7, "frequency_penalty": 0.6, "logit_bias": {1: 1.0, 3: -2.0}},
    "all": {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.4},
}
TOKENS = 14
PROMPTS = [[4, 2], [0], [1, 1, 5, 3], [4, 2], [2], [5, 4, 3, 2, 1, 0, 0, 1, 2]]


def params(seed: int | list[int] = 3, **filters: float) -> sm.SamplingParams:
    return sm.SamplingParams(**{"temperature": 1.0, **filters}, seed=seed)


def text(target: object, prompts: list, sampling: sm.SamplingParams | list, **options: object) -> list[list[int]]:
    options = {"max_new_tokens": TOKENS, "stop_token_ids": (), "acceptance": "coupled", **options}
    return [row.tolist() for row in sm.generate(target, prompts, sampling=sampling, **options).sequences]


@pytest.fixture
def target(make_table) -> TableModel:
    return TableModel(make_table(0, 1.5, 0.2))


@pytest.fixture(scope="module")
def pair() -> tuple[sm.MambaLM, dict[str, sm.MambaLM]]:
    """A tiny random target, and drafts that agree with it never to always."""
    target = random_model(tiny_config(tie_embeddings=False))
    noise = torch.randn(target.head.shape, generator=torch.Generator().manual_seed(5))
    near = dataclasses.replace(target, head=target.head + 0.08 * noise)
    return target, {"random": random_model(tiny_config(d_model=16, n_layer=1), seed=1), "near": near, "equal": target}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("draft", ["equal", "sharper", "other", "narrow", "disjoint"])
def test_tables_with_any_draft_and_lookahead(make_draft, target_table, filters, draft) -> None:
    sampling, target = params(**FILTERS[filters]), TableModel(target_table(draft))
    prompts = PROMPTS if draft != "disjoint" else [[2, 0], [1], [2, 2, 1]]
    expected = text(target, prompts, sampling)
    assert text(target, prompts, sampling, acceptance="rejection") == expected, "plain sampling knows one text"
    for lookahead in (1, 2, 4, 15):
        drafted = make_draft(draft, PROMPTS[0], len(prompts))
        assert text(target, prompts, sampling, draft=drafted, lookahead=lookahead) == expected


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_drafts_that_are_certain(target, rate) -> None:
    """Right, wrong or now and then right: the text is the same, and what agrees with it is accepted."""
    for filters in FILTERS.values():
        expected = text(target, PROMPTS, params(**filters))
        script = ScriptedDraft(expected, 6, agree_at_rate(rate))
        result = sm.generate(
            target, PROMPTS, draft=script, lookahead=5, max_new_tokens=TOKENS, sampling=params(**filters),
            acceptance="coupled",
        )  # fmt: skip
        assert [row.tolist() for row in result.sequences] == expected
        if rate in (0, 1):
            assert result.stats.accepted == rate * result.stats.tested


@pytest.mark.parametrize("draft", ["random", "near", "equal"])
@pytest.mark.parametrize("filters", ["plain", "top-k top-p", "penalty"])
def test_models_with_any_draft_lookahead_and_batch(pair, filters, draft) -> None:
    target, drafts = pair
    sampling = params(seed=8, **FILTERS[filters])
    expected = text(target, PROMPTS, sampling)
    for lookahead in (1, 3, 8):
        assert text(target, PROMPTS, sampling, draft=drafts[draft], lookahead=lookahead) == expected
    alone = text(target, PROMPTS[:1], sampling, draft=drafts[draft], lookahead=3)
    assert alone == expected[:1]


def test_a_draft_that_is_near_is_accepted_often(pair) -> None:
    target, drafts = pair
    rates = {
        name: sm.generate(
            target, PROMPTS, draft=draft, max_new_tokens=40, sampling=params(), acceptance="coupled", stop_token_ids=()
        ).stats.acceptance_rate
        for name, draft in drafts.items()
    }
    assert rates["random"] < 0.3 < rates["near"] < rates["equal"] == 1


def test_backends_choose_the_same_text(pair) -> None:
    target, drafts = pair
    reference = random_model(tiny_config(tie_embeddings=False), backend="reference")
    expected = text(target, PROMPTS[:3], params(), draft=drafts["near"])
    assert text(reference, PROMPTS[:3], params(), draft=drafts["near"], max_new_tokens=TOKENS) == expected


@pytest.mark.parametrize("draft", [None, "other"])
def test_a_seed_per_row_makes_each_row_its_own_run(target, make_draft, draft) -> None:
    seeds = [7, 7, 2**63 - 1, 0, 7, 2**32]
    alone = [text(target, [prompt], params(seed)) for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    alone = [rows[0] for rows in alone]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [4, 0], [2, 2, 2, 0], [1]):
        prompts, chosen = [PROMPTS[row] for row in order], [seeds[row] for row in order]
        options = {"draft": make_draft(draft, [], len(order)), "lookahead": 3}
        assert text(target, prompts, params(chosen), **options) == [alone[row] for row in order]


def test_a_seed_per_row_with_models_of_unequal_drafts(pair) -> None:
    target, drafts = pair
    seeds = [1, 2, 1, 1, 5, 6]
    for filters in ({}, FILTERS["all"]):
        alone = [
            text(target, [prompt], params([seed], **filters))[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)
        ]
        assert text(target, PROMPTS, params(seeds, **filters), draft=drafts["near"]) == alone


@pytest.mark.parametrize("draft", [None, "near"])
def test_parameters_per_row_make_each_row_its_own_run(pair, draft) -> None:
    """Greedy rows and sampled ones of every kind, whatever their neighbours are."""
    target, drafts = pair
    rows = [sm.SamplingParams(), *(params(seed, **filters) for seed, filters in enumerate(FILTERS.values()))][:6]
    rows[1] = params(2**40, **FILTERS["counts"])
    alone = [text(target, [prompt], [row])[0] for prompt, row in zip(PROMPTS, rows, strict=True)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [1, 0], [2, 2, 1, 0]):
        prompts, chosen = [PROMPTS[row] for row in order], [rows[row] for row in order]
        assert text(target, prompts, chosen, draft=drafts.get(draft), lookahead=3) == [alone[row] for row in order]


@pytest.mark.parametrize("draft", [None, "other"])
def test_with_one_seed_a_row_depends_on_its_index_alone(target, make_draft, draft) -> None:
    """Catches: a row's index left out of its key."""
    expected = text(target, PROMPTS, params(9))
    others = [[3], [3, 3], [3, 3, 3], [0], [1], [2]]
    for row in range(len(PROMPTS)):
        prompts = [*others[:row], PROMPTS[row]]
        drafted = make_draft(draft, [], len(prompts))
        assert text(target, prompts, params(9), draft=drafted)[row] == expected[row]
    assert expected[0] != expected[3], "equal prompts in two rows draw on their own"


def test_the_budget_does_not_change_the_text(target, make_draft) -> None:
    draft = make_draft("other", [], len(PROMPTS))
    longest = text(target, PROMPTS, params(), max_new_tokens=12)
    for budget in range(1, 12):
        shorter = text(target, PROMPTS, params(), draft=draft, max_new_tokens=budget)
        assert shorter == [row[: len(prompt) + budget] for row, prompt in zip(longest, PROMPTS, strict=True)]


def test_a_stop_does_not_change_the_text_of_other_rows(target, make_draft) -> None:
    draft, free = make_draft("other", [], len(PROMPTS)), text(target, PROMPTS, params())
    stopped = text(target, PROMPTS, params(), draft=draft, stop_token_ids=(4,))
    for prompt, row, whole in zip(PROMPTS, stopped, free, strict=True):
        new = whole[len(prompt) :]
        assert row == prompt + (new[: new.index(4) + 1] if 4 in new else new)
