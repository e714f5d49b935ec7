"""Rows of one batch with parameters of their own: penalties, bias, greedy rows beside sampled ones."""

import pytest
import torch
from test_speculative_accept import FILTERS, K, V, choices, make, rows_of

from speculative_mamba.ops import sample_tokens, speculative_accept
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.sampling import assert_probs, probs_by_hand, rng_keys_of, sample, tensors, text_of
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "speculative_accept"
NATURAL = SamplingParams(temperature=1.0)
MIX = [
    SamplingParams(),
    NATURAL,
    SamplingParams(temperature=0.8, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.0, presence_penalty=1.5),
    SamplingParams(temperature=1.0, frequency_penalty=0.7, top_p=0.9),
    SamplingParams(temperature=1.0, frequency_penalty=-2, presence_penalty=-2),
    SamplingParams(temperature=0.9, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, min_p=0.02),
    SamplingParams(temperature=1.0, logit_bias={0: 100, 3: -100, 50: 2.5, 76: -torch.inf}),
    SamplingParams(repetition_penalty=3.0, presence_penalty=2, logit_bias={token: 0.1 * token for token in range(77)}),
    SamplingParams(temperature=3.0, logit_bias={token: -torch.inf for token in range(74)}, repetition_penalty=0.7),
    SamplingParams(temperature=1.0, top_k=600, frequency_penalty=1.0),
]


def mixed(vocabulary: int) -> dict:
    """Arguments of a batch in which every row has other parameters, but for what a test adds."""
    generator, rows = torch.Generator().manual_seed(vocabulary), len(MIX)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2
    prompt = torch.rand(rows, vocabulary, generator=generator) < 0.2
    counts = torch.randint(-4, 4, (rows, vocabulary), generator=generator).clamp(min=0).int()
    drafted = torch.randint(0, vocabulary, (rows, 3), generator=generator)
    drafted[:, 2] = drafted[:, 0]
    return {"logits": logits, "seen": prompt, "counts": counts, "draft_tokens": drafted}


@pytest.mark.parametrize("vocabulary", [77, 2100])
def test_rows_of_every_kind_in_one_batch_equal_the_hand_computation(vocabulary: int, backend: str) -> None:
    """Presence and frequency count generated and drafted tokens, a repetition penalty those of the prompt as well."""
    batch = mixed(vocabulary)
    tokens, probs = sample(params=MIX, backend=backend, **batch)
    for row, params in enumerate(MIX):
        prompt = batch["seen"][row].nonzero().flatten().tolist()
        generated = torch.arange(vocabulary).repeat_interleave(batch["counts"][row]).tolist()
        generated += batch["draft_tokens"][row].tolist()
        assert_probs(probs[row], probs_by_hand(batch["logits"][row].tolist(), params, prompt, generated), params)
        assert probs[row, tokens[row]] > 0


def test_a_row_of_a_mixed_batch_is_the_row_alone(backend: str) -> None:
    batch = mixed(77)
    tokens, probs = sample(params=MIX, backend=backend, **batch)
    for row, params in enumerate(MIX):
        alone = torch.empty(1, 77)
        texts = {} if not params.penalised else text_of(batch["seen"][[row]], batch["counts"][[row]])
        token = sample_tokens(
            batch["logits"][[row]], tensors(params, 1, 77), rng_keys_of(len(MIX))[[row]], torch.tensor([row + 3]),
            probs=alone, draft_tokens=batch["draft_tokens"][[row]], **texts, backend=backend,
        )  # fmt: skip
        assert token.item() == tokens[row].item()
        assert_bitwise_equal(alone[0], probs[row], f"probs of row {row}")


def test_neutral_penalties_and_an_empty_bias_change_nothing(backend: str) -> None:
    batch = mixed(77)
    plain = [SamplingParams(temperature=params.temperature, top_k=params.top_k) for params in MIX]
    expected = sample(batch["logits"], plain, backend)
    neutral = SamplingTensors.from_params(plain, 77, penalties=True, bias_capacity=4)
    probs = torch.empty(len(MIX), 77)
    tokens = sample_tokens(
        batch["logits"], neutral, rng_keys_of(len(MIX)), torch.arange(len(MIX)) + 3, probs=probs,
        **text_of(batch["seen"], batch["counts"]), backend=backend,
    )  # fmt: skip
    assert_bitwise_equal(tokens, expected[0], "tokens")
    assert_bitwise_equal(probs, expected[1], "probs")


def test_values_that_are_set_are_those_that_count(backend: str) -> None:
    """What a captured call relies on: greedy rows become sampled ones, with the same tensors."""
    batch = mixed(77)
    expected = sample(params=MIX[::-1], backend=backend, **batch)
    sampling, probs = tensors(MIX, len(MIX), 77), torch.empty(len(MIX), 77)
    for row, params in enumerate(MIX[::-1]):
        sampling.set_row(row, params, 77)
    tokens = sample_tokens(
        batch["logits"], sampling, rng_keys_of(len(MIX)), torch.arange(len(MIX)) + 3, probs=probs,
        **text_of(batch["seen"], batch["counts"]), draft_tokens=batch["draft_tokens"], backend=backend,
    )  # fmt: skip
    assert_bitwise_equal(tokens, expected[0], "tokens")
    assert_bitwise_equal(probs, expected[1], "probs")


def test_what_bias_and_penalties_leave_is_judged(backend: str) -> None:
    """NaN, infinite and impossible logits are named as they are after bias and penalties; other rows do not mind."""
    params = [
        SamplingParams(temperature=1.0, logit_bias={0: -torch.inf, 1: -torch.inf, 2: -torch.inf}),
        SamplingParams(temperature=1.0, logit_bias={1: -torch.inf}),
        SamplingParams(temperature=1.0, logit_bias={0: -torch.inf}),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(temperature=1.0, frequency_penalty=1.0, logit_bias={2: 1e30}),
        NATURAL,
    ]
    logits = torch.tensor([[1.0, 2, 3], [1, torch.inf, 0], [torch.nan, 0, 0], [0.0, -0.0, -torch.inf],
                           [0, 0, 3e38], [0.0, -0.0, -torch.inf]])  # fmt: skip
    counts = torch.tensor([[0, 0, 0]] * 3 + [[1, 0, 5]] * 3).int()
    status = torch.full((6,), 9, dtype=torch.int32)
    tokens, probs = sample(
        logits, params, backend, seen=torch.zeros(6, 3, dtype=torch.bool), counts=counts, row_status=status
    )
    assert status.tolist() == [3, 1, 1, 0, 0, 0]
    assert tokens[3:5].tolist() == [1, 2] and tokens[:3].tolist() == [0, 0, 0]
    assert probs[3:].tolist() == [[0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]]


@pytest.mark.parametrize("coupled", [False, True])
def test_presence_and_frequency_count_the_tokens_before_each_position(coupled: bool, backend: str) -> None:
    """Drafted tokens count as generated from the position after theirs on, each as often as it comes; the prompt does
    not count. Greedy, so that the first position at which another token leads is seen."""
    logits = torch.tensor([5.0, 4.2, 0.0]).expand(1, 4, 3)
    for presence, frequency, counts, expected in (
        (0.0, 0.5, [0, 0, 0], (2, 1)),  # 5, 4.5, 4 against 4.2
        (0.0, 0.5, [1, 0, 0], (1, 1)),
        (0.5, 0.0, [0, 0, 0], (3, 0)),  # 5, then 4.5
        (0.9, 0.0, [0, 0, 0], (1, 1)),
        (0.9, 0.0, [0, 4, 0], (3, 0)),
        (-0.5, 0.0, [0, 1, 0], (3, 0)),  # 5 against 4.7, then 5.5
        (0.0, -0.5, [0, 2, 0], (0, 1)),
    ):
        params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        text = text_of(torch.ones(1, 3, dtype=torch.bool), torch.tensor([counts]).int())
        accepted, next_token = speculative_accept(
            logits, torch.tensor([[0, 0, 0]]), None, tensors(params, 1, 3), rng_keys_of(1),
            torch.zeros(1, dtype=torch.int64), coupled=coupled, **text, backend=backend,
        )  # fmt: skip
        assert (accepted.item(), next_token.item()) == expected, (presence, frequency, counts)


@pytest.mark.parametrize("coupled", [False, True])
def test_windows_of_every_kind_in_one_batch(coupled: bool, backend: str) -> None:
    """Each row of a mixed batch is bit for bit the row alone, of which the other rows' parameters are unknown."""
    kinds = list(FILTERS.values()) * 2
    arguments, reached = make(kinds, rows=len(kinds)), set()
    if coupled:
        arguments["draft_tokens"][::2] = choices(arguments, backend)[::2, :K]
    accepted, next_token = speculative_accept(**arguments, coupled=coupled, backend=backend)
    for row, params in enumerate(kinds):
        alone = rows_of(arguments, slice(row, row + 1)) | {"sampling": tensors(params, 1, V)}
        if not params.penalised:
            del alone["prompt_mask"], alone["output_counts"]
        result = speculative_accept(**alone, coupled=coupled, backend=backend)
        assert [t.item() for t in result] == [accepted[row].item(), next_token[row].item()], row
        reached.add(accepted[row].item())
    assert len(reached) > 1


def test_no_rows_to_choose_for(backend: str) -> None:
    logits, keys, positions = torch.zeros(0, 3, 9), torch.zeros(0, 2).long(), torch.zeros(0).long()
    sampling = tensors([], 0, 9)
    tokens = sample_tokens(logits[:, 0], sampling, keys, positions, backend=backend)
    accepted, next_token = speculative_accept(
        logits, torch.zeros(0, 2).long(), None, sampling, keys, positions, backend=backend
    )
    assert len(tokens) == len(accepted) == len(next_token) == 0


def test_probs_that_another_softmax_rounded_is_no_error(kernels):
    logits = torch.full((1, 50280), -16.6)
    logits[0, 0] = 0
    q, rows = torch.softmax(logits.double(), -1).float(), {"cpu": 500, "triton": 1}.get(kernels, 10)
    for seed in range(4):
        zeros = torch.zeros(rows, dtype=torch.int64)
        speculative_accept(
            logits.expand(rows, 2, -1), zeros[:, None], q.expand(rows, 1, -1), tensors(NATURAL, rows, 50280),
            rng_keys_of(rows, seed), zeros, backend=kernels,
        )  # fmt: skip


def test_a_draft_probability_that_is_nan_where_the_target_has_nothing_does_not_matter(backend):
    p, q = torch.tensor([0, 0.5, 0.5, 0]), torch.tensor([0.5, 0.5, 0, torch.nan])
    zeros = torch.zeros(1, dtype=torch.int64)
    accepted, next_token = speculative_accept(
        p.log().expand(1, 2, -1),
        zeros[:, None],
        q[None, None],
        tensors(NATURAL, 1, 4),
        rng_keys_of(1),
        zeros,
        backend=backend,
    )
    assert accepted.item() == 0 and next_token.item() == 2
