"""Repetition penalty: drafted tokens count as text while they are tested, so a draft changes nothing."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

LENGTHS = (1, 2, 9, 33)
TOKENS = 16


@pytest.fixture(scope="module")
def without(pair, prompt):
    """without(penalty, backend): decoding each row alone without a draft."""
    known = {}

    def decode(penalty, backend="cpu"):
        if (penalty, backend) not in known:
            options = {"sampling": sm.SamplingParams(repetition_penalty=penalty), "output_logits": True}
            options |= {"max_new_tokens": TOKENS, "stop_token_ids": ()}
            target = pair(backend=backend).target
            known[penalty, backend] = [sm.generate(target, [prompt(length)], **options) for length in LENGTHS]
        return known[penalty, backend]

    return decode


def check(pair, prompt, rows, draft, penalty, lookahead, backend="cpu"):
    result = sm.generate(
        pair(backend=backend).target, [prompt(length) for length in LENGTHS], draft=draft, lookahead=lookahead,
        max_new_tokens=TOKENS, stop_token_ids=(), sampling=sm.SamplingParams(repetition_penalty=penalty),
        output_logits=True,
    )  # fmt: skip
    for row, alone in enumerate(rows):
        assert result.sequences[row].tolist() == alone.sequences[0].tolist(), f"row {row}"
        assert_bitwise_equal(result.logits[row], alone.logits[0], f"logits of row {row}")
    return result.stats


@pytest.mark.parametrize("lookahead", range(1, 9))
@pytest.mark.parametrize("draft", ["random", "near", "equal", "scripted", "repeating"])
def test_with_a_draft_as_without(pair, prompt, without, draft, lookahead):
    """Catches: drafted tokens forgotten; one position off."""
    for penalty in (1.5, 0.7):
        rows = without(penalty)
        texts = [alone.sequences[0].tolist() for alone in rows]
        if draft == "scripted":
            proposer = ScriptedDraft(texts, 61, lambda row, at: (row + at) % 4 != 0)
        elif draft == "repeating":
            proposer = ScriptedDraft([[text[-1]] * 60 for text in texts], 61, lambda row, at: True)
        else:
            proposer = pair().drafts[draft]
        stats = check(pair, prompt, rows, proposer, penalty, lookahead)
        assert draft != "equal" or stats.acceptance_rate == 1, "the draft draws under the same penalty"


@pytest.mark.parametrize("draft", ["near", "equal"])
def test_the_reference_backend(pair, prompt, without, draft):
    models = pair(backend="reference")
    check(pair, prompt, without(1.5, "reference"), models.drafts[draft], 1.5, 4, "reference")
    for a, b in zip(without(1.5), without(1.5, "reference"), strict=True):
        assert torch.equal(a.sequences[0], b.sequences[0])


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_against_a_hand_computation(pair, prompt, without, penalty):
    """Float64 logits of the whole text; those of its tokens are divided if positive, else multiplied."""
    for row, length in enumerate(LENGTHS):
        text = prompt(length)
        for _ in range(TOKENS):
            logits = oracle.full_forward(pair().target, text)[-1].tolist()
            for token in set(text):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            text.append(max(range(61), key=logits.__getitem__))
        assert without(penalty)[row].sequences[0].tolist() == text


def test_a_penalty_repeats_less(without):
    distinct = [sum(len(set(alone.sequences[0].tolist())) for alone in without(penalty)) for penalty in (0.5, 1.0, 2.0)]
    assert distinct[0] < distinct[1] < distinct[2]


@pytest.mark.parametrize("prompt_tokens", [[0], [0, 1, 2]])
def test_prompt_and_drafted_tokens_count(prompt_tokens):
    """All tokens are equally likely, so the penalty alone decides: the lowest that the text does not hold."""
    size = 9
    target = TableModel(torch.full((size, size), 1 / size))
    unseen = [token for token in range(size) if token not in prompt_tokens]
    for proposed in (unseen, [unseen[0]] * len(unseen), [0] * len(unseen)):
        draft = ScriptedDraft([prompt_tokens + proposed], size, lambda row, at: True)
        result = sm.generate(
            target, [prompt_tokens], draft=draft, lookahead=5, max_new_tokens=len(unseen), stop_token_ids=(),
            sampling=sm.SamplingParams(repetition_penalty=1.1),
        )  # fmt: skip
        assert result.sequences[0].tolist() == prompt_tokens + unseen
        assert (result.stats.accepted == result.stats.tested) == (proposed == unseen)
