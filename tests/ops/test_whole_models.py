"""Whole models on the GPU's kernels with 16-bit activations: the guarantees, end to end."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import random_model, tiny_architecture
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "skinny_linear"  # has every kind of kernel

KINDS = ("falcon-mamba", "mamba2-in-llama", "parallel", "lfm2", "experts")  # together they have every op and mixer
PROMPTS = [[1, 2, 3, 4, 5], [6]]
SAMPLED = sm.SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3)


def models(kind: str, dtype: torch.dtype | str, place: tuple[str, str]) -> tuple:
    """Target and draft, whose texts differ."""
    (backend, device), config = place, tiny_architecture(kind, d=32 if isinstance(dtype, str) else 24)
    return tuple(random_model(config, dtype=dtype, seed=seed, backend=backend, device=device) for seed in (0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_and_logits_are_those_without_a_draft(kind: str, gpu_place: tuple[str, str]) -> None:
    target, draft = models(kind, torch.bfloat16, gpu_place)
    assert target.activation_dtype is torch.bfloat16 and target.backend == gpu_place[0]
    options = {"max_new_tokens": 3, "output_logits": True, "stop_token_ids": ()}
    result = sm.generate(target, PROMPTS, draft=draft, lookahead=2, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = sm.generate(target, [prompt], **options)
        assert torch.equal(result.sequences[row], alone.sequences[0])
        assert_bitwise_equal(result.logits[row], alone.logits[0], f"logits of row {row}")


@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
def test_rejected_and_accepted_drafts_leave_the_same_text(rollback: str, gpu_place: tuple[str, str]) -> None:
    """A draft that is the target itself, so that windows are accepted whole and rounds start behind them; and one that
    is not."""
    target, draft = models("mamba2", torch.float16, gpu_place)
    target.rollback = draft.rollback = rollback
    target.state_dtype = torch.bfloat16
    plain = sm.generate(target, PROMPTS, max_new_tokens=5, stop_token_ids=())
    for other in (target, draft):
        result = sm.generate(target, PROMPTS, draft=other, lookahead=2, max_new_tokens=5, stop_token_ids=())
        for expected, sequence in zip(plain.sequences, result.sequences, strict=True):
            assert torch.equal(expected, sequence)
        assert other is draft or result.stats.acceptance_rate == 1


def test_coupled_samples_are_those_without_a_draft(gpu_place: tuple[str, str]) -> None:
    target, draft = models("mamba1", torch.bfloat16, gpu_place)
    options = {"max_new_tokens": 4, "stop_token_ids": (), "sampling": SAMPLED}
    plain = sm.generate(target, PROMPTS, **options)
    result = sm.generate(target, PROMPTS, draft=draft, lookahead=2, acceptance="coupled", **options)
    for expected, sequence in zip(plain.sequences, result.sequences, strict=True):
        assert torch.equal(expected, sequence)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_weights_in_blocks(format: str, gpu_place: tuple[str, str]) -> None:
    """The rest of the model is float32, and so are the activations."""
    target, draft = models("mamba1", format, gpu_place)
    assert target.activation_dtype is torch.float32
    plain = sm.generate(target, PROMPTS, max_new_tokens=3, stop_token_ids=())
    result = sm.generate(target, PROMPTS, draft=draft, lookahead=2, max_new_tokens=3, stop_token_ids=())
    for expected, sequence in zip(plain.sequences, result.sequences, strict=True):
        assert torch.equal(expected, sequence)
