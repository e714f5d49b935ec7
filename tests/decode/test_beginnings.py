"""Beginnings of texts that recorded kernels read have the bits of those that Python calls kernel by kernel."""

import dataclasses
import random

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.layers.cache import AttentionCache
from speculative_mamba.models import beginnings
from speculative_mamba.models.beginnings import SIZES
from speculative_mamba.models.runner import ModelRunner
from speculative_mamba.testing.models import ARCHITECTURES, random_model, tiny_architecture
from speculative_mamba.testing.tolerance import assert_bitwise_equal

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 47, 64, 65, 127, 200, 255, 257, 496, 497)


def pair(model: sm.MambaLM, slots: int = 4) -> tuple[ModelRunner, ModelRunner]:
    """One that records, and one that never does."""
    recording, plain = ModelRunner(model, 3, slots), ModelRunner(model, 3, slots)
    plain._beginnings = None
    return recording, plain


def assert_same_state(one: ModelRunner, other: ModelRunner, row: int, what: str) -> None:
    for layer, expected in zip(one.layers, other.layers, strict=True):
        for part, its in zip(layer.snapshot(row, 0), expected.snapshot(row, 0), strict=True):
            assert_bitwise_equal(part, its, what)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("rollback", ["snapshots", "replay", "auto"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_states_have_the_bits_of_those_read_plainly(kind: str, rollback: str, slots: int) -> None:
    """Texts of any length, in rows that had others, and what is read behind them."""
    model = dataclasses.replace(random_model(tiny_architecture(kind), backend="cpu"), rollback=rollback)
    (one, plain), source = pair(model, slots), random.Random(0)
    attention = any(isinstance(layer, AttentionCache) for layer in one.layers)
    assert (one._beginnings is None) == (attention or not one.layers)
    for length in [*LENGTHS, *reversed(LENGTHS)]:
        text = source.choices(range(model.vocab_size), k=length + 3)
        for runner in (one, plain):
            runner.prefill(1, text[:length])
        assert_same_state(one, plain, 1, f"{length} tokens")
        for runner in (one, plain):
            runner.read(1, text[length:])
        assert_same_state(one, plain, 1, f"{length} tokens and 3 more")
    if one._beginnings is not None:
        assert sorted(one._beginnings._parts) == list(SIZES)
    for runner in (one, plain):
        runner.prefill(1, [])
    assert_same_state(one, plain, 1, "an empty text")


@torch.no_grad()
def test_one_text_alone_is_not_recorded() -> None:
    model = random_model(tiny_architecture("mamba1"), backend="cpu")
    runner = ModelRunner(model, 2, 1)
    for length in (20, 60, 600):
        runner.prefill(0, [1] * length)
        assert not runner._beginnings._parts
    runner.prefill(1, [2] * 30)
    assert runner._beginnings._parts


@torch.no_grad()
def test_what_is_no_token_is_refused_there_too() -> None:
    model = random_model(tiny_architecture("mamba1"), backend="cpu")
    one, plain = pair(model)
    for _ in range(3):
        for runner in (one, plain):
            runner.prefill(0, [3, 1, 4])
    for token in (-1, model.vocab_size):
        with pytest.raises(ValueError, match="token ids from 0 to"):
            one.prefill(0, [3, token, 4])
    for runner in (one, plain):
        runner.prefill(0, [2, 7])
    assert_same_state(one, plain, 0, "after an error")


@torch.no_grad()
def test_an_error_on_the_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a next text that goes on from the state of the one that broke off."""
    model = random_model(tiny_architecture("mamba1"), backend="cpu")
    one, plain = pair(model)
    for _ in range(2):
        one.prefill(0, [1] * 40)
    second = one._beginnings._parts[32]
    with monkeypatch.context() as patched:
        patched.setattr(second, "run", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            one.prefill(0, [1] * 40)
    for runner in (one, plain):
        runner.prefill(0, [5] * 40)
    assert_same_state(one, plain, 0, "after an error")


def test_weights_with_gradients() -> None:
    """What reads a text takes none, wherever it is called."""
    model = random_model(tiny_architecture("mamba1"), backend="cpu")
    model.norm_weight.requires_grad_()
    one, plain = pair(model)
    for _ in range(3):
        for runner in (one, plain):
            runner.prefill(0, tuple(range(20)))
    assert one._beginnings._parts
    assert_same_state(one, plain, 0, "a text")


@torch.no_grad()
@pytest.mark.parametrize("breaks", ["copied", "made"])
def test_an_interrupt_leaves_nothing_behind(breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a state was just copied into a row, and when memory for parts was just made.

    Catches: a next text of a size that is not recorded, read behind that state; parts without their memory.
    """
    model = random_model(tiny_architecture("mamba1"), backend="cpu")
    one, plain = pair(model)
    one.prefill(0, [1] * 40)
    target = (torch, "_foreach_zero_") if breaks == "copied" else (beginnings, "_Part")
    with monkeypatch.context() as patched:
        patched.setattr(*target, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            one.prefill(1, [1] * 40)
    for length in (500, 40):
        for runner in (one, plain):
            runner.prefill(1, [5] * length)
        assert_same_state(one, plain, 1, f"{length} tokens after an interrupt")
