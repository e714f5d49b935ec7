"""Ctrl-C and errors in the middle of a call: the cache holds the committed text, and going on from it is exact."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode import round
from speculative_mamba.layers import mamba1
from speculative_mamba.layers.block import Block
from speculative_mamba.models.runner import ModelRunner
from speculative_mamba.ops.recording import Recording
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.tolerance import assert_bitwise_equal

SAMPLING = {"greedy": sm.SamplingParams(), "sampled": sm.SamplingParams(temperature=0.9, top_p=0.9, seed=3)}
LENGTHS = (1, 2, 7, 66)
BEFORE, DURING, AFTER = 4, 9, 5  # tokens of the call before, of the one that breaks off, of the one after


class Interrupt(BaseException):
    """No error that anything could take for one of its own."""


@pytest.fixture(scope="module")
def draft():
    """Of two layers, none of them shared with the target."""
    return random_model(tiny_config(d_model=16, n_layer=2), seed=1)


@pytest.fixture(scope="module")
def texts(pair, prompt):
    """texts(sampling): the rows' texts and logits of one call without a draft, long enough for all three."""
    known = {}

    def decode(sampling):
        if sampling not in known:
            known[sampling] = sm.generate(
                pair().target, [prompt(length) for length in LENGTHS], max_new_tokens=BEFORE + DURING + AFTER,
                sampling=SAMPLING[sampling], acceptance="coupled", stop_token_ids=(), output_logits=True,
            )  # fmt: skip
        return known[sampling]

    return decode


def alarm(call, raised, function):
    """``function``, but its n-th call raises, counted from 0."""
    count = -1

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count == call:
            raise raised
        return function(*arguments, **options)

    return counted


@pytest.fixture
def break_off(pair, prompt, texts, draft, assert_states_fit):
    """break_off(error, sampling, start, **options): a call, one that ``start`` makes fail, and one that goes on.

    Returns whether the second failed at all.
    """

    def run(error, sampling, start, stop=lambda: None, proposer=draft, **options):
        target, expected, cache = pair().target, texts(sampling), sm.GenerationCache()
        common = {
            "draft": proposer, "sampling": SAMPLING[sampling], "acceptance": "coupled", "stop_token_ids": (),
            "cache": cache,
        }  # fmt: skip
        sm.generate(target, [prompt(length) for length in LENGTHS], lookahead=3, max_new_tokens=BEFORE, **common)
        start()
        failed = False
        try:
            sm.generate(target, cache.sequences, lookahead=4, max_new_tokens=DURING, **common, **options)
        except type(error) as caught:
            assert caught is error or not isinstance(caught, Interrupt)
            failed = True
        finally:
            stop()
        for row, text in enumerate(cache.sequences):
            assert BEFORE <= len(text) - LENGTHS[row] <= BEFORE + DURING
            assert text == expected.sequences[row].tolist()[: len(text)], "the cache holds committed text"
        assert_states_fit(cache, complete=False)
        lengths = [len(text) for text in cache.sequences]
        result = sm.generate(
            target, cache.sequences, lookahead=2, max_new_tokens=AFTER, output_logits=True, **common
        )  # fmt: skip
        for row, length in enumerate(lengths):
            assert result.sequences[row].tolist() == expected.sequences[row].tolist()[: length + AFTER]
            at = length - LENGTHS[row]
            assert_bitwise_equal(result.logits[row], expected.logits[row][at : at + AFTER], f"logits of row {row}")
        assert_states_fit(cache)
        return failed

    return run


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("position", range(DURING * len(LENGTHS)))
def test_a_callback_that_raises(break_off, assert_states_fit, sampling, position):
    """At each of its calls; the states are then complete, so nothing is computed again."""
    error = Interrupt()
    assert break_off(error, sampling, lambda: None, on_token=alarm(position, error, lambda row, token: None))


def test_the_states_are_complete_after_a_callback_has_raised(pair, prompt, draft, assert_states_fit):
    for position in range(0, 20, 3):
        cache = sm.GenerationCache()
        with pytest.raises(Interrupt):
            sm.generate(
                pair().target, [prompt(length) for length in LENGTHS], draft=draft, cache=cache, max_new_tokens=DURING,
                on_token=alarm(position, Interrupt(), lambda row, token: None), stop_token_ids=(),
            )  # fmt: skip
        assert_states_fit(cache)


def rings(monkeypatch, owner, name, is_hit, call, error, after):
    """Makes ``owner.name`` raise at its n-th call that ``is_hit``, before it runs or after. Returns start and stop."""
    whole, count = getattr(owner, name), -1

    def counted(*arguments, **options):
        nonlocal count
        count += is_hit(arguments[0])
        hit = is_hit(arguments[0]) and count == call
        if hit and not after:
            raise error
        result = whole(*arguments, **options)
        if hit:
            raise error
        return result

    return lambda: monkeypatch.setattr(owner, name, counted), lambda: monkeypatch.setattr(owner, name, whole)


@pytest.fixture
def unrecorded(monkeypatch):
    """Rounds run as Python, where every call of a part of a model can be counted."""
    monkeypatch.setattr(round, "_recorded_parts", lambda *arguments: None)


before_and_after = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@before_and_after
@pytest.mark.parametrize("place", ["verify", "second block", "scan", "prefill"])
@pytest.mark.parametrize("victim", ["target", "draft"])
def test_a_model_that_is_interrupted(pair, draft, break_off, unrecorded, monkeypatch, victim, place, after):
    """At the n-th call of one of its parts; the scan comes when the convolution has already written its window.

    Catches: slots trusted after an interruption.
    """
    model = pair().target if victim == "target" else draft
    second = model.blocks[1]
    owner, name, is_hit = {
        "verify": (sm.MambaLM, "verify", lambda first: first is model),
        "prefill": (ModelRunner, "read", lambda runner: runner.model is model),
        "second block": (Block, "__call__", lambda first: first is second),
        "scan": (mamba1, "selective_scan_verify", lambda x: x.shape[-1] == len(second.mixers[0].A)),
    }[place]
    interrupted = 0
    for call in range(9):
        start, stop = rings(monkeypatch, owner, name, is_hit, call, KeyboardInterrupt(), after)
        interrupted += break_off(KeyboardInterrupt(), "greedy" if call % 2 else "sampled", start, stop)
    assert interrupted >= 4


@before_and_after
def test_recorded_rounds_that_are_interrupted(break_off, monkeypatch, after):
    """Before or after the n-th part that is run again: a draft's proposal, or the rest of a round."""
    interrupted = 0
    for call in range(9):
        start, stop = rings(monkeypatch, Recording, "run", lambda recording: True, call, KeyboardInterrupt(), after)
        interrupted += break_off(KeyboardInterrupt(), "greedy" if call % 2 else "sampled", start, stop)
    assert interrupted >= 4


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_logits_processor_that_raises(break_off, draft, sampling):
    for call in range(0, 60, 7):
        error = Interrupt()
        assert break_off(
            error, sampling, lambda: None, logits_processor=alarm(call, error, lambda row, tokens, logits: logits)
        )


@pytest.mark.parametrize("victim", ["target", "draft"])
def test_logits_that_become_nan(pair, draft, break_off, unrecorded, monkeypatch, victim):
    model, whole = pair().target if victim == "target" else draft, sm.MambaLM.verify
    for call in range(5):
        count = -1

        def broken(self, *arguments, call=call, **options):
            nonlocal count
            count += self is model
            logits = whole(self, *arguments, **options)
            return logits * torch.nan if self is model and count == call else logits

        assert break_off(
            ValueError(), "greedy",
            lambda broken=broken: monkeypatch.setattr(sm.MambaLM, "verify", broken),
            lambda: monkeypatch.setattr(sm.MambaLM, "verify", whole),
        ) or (victim == "target" and call > 2)  # fmt: skip


def test_an_interrupted_first_call(pair, prompt, draft, plain, monkeypatch):
    """Nothing was saved yet; the prompts are the text."""
    target, prompts = pair().target, [prompt(length) for length in LENGTHS]
    for call in range(6):
        cache = sm.GenerationCache()
        start, stop = rings(monkeypatch, Block, "__call__", lambda block: True, call, KeyboardInterrupt(), False)
        start()
        with pytest.raises(KeyboardInterrupt):
            sm.generate(target, prompts, draft=draft, max_new_tokens=6, cache=cache, stop_token_ids=())
        stop()
        assert cache.sequences == prompts
        result = sm.generate(target, prompts, draft=draft, max_new_tokens=6, cache=cache, stop_token_ids=())
        for row, given in enumerate(prompts):
            assert result.sequences[row].tolist() == plain(target, given, 6)[0]


@pytest.mark.parametrize("proposer", ["tokens", "error"])
def test_a_drafter_that_fails(pair, break_off, proposer):
    class Failing:
        vocab_size, round = 61, 0

        def begin(self, prompts, lookahead, sampler): ...

        def propose(self, rows, accepted, lookahead):
            self.round += 1
            if self.round == 5 and proposer == "error":
                raise ValueError("the drafter gave up")
            return torch.full((len(rows), lookahead), 61 if self.round == 5 else 5), None

    assert break_off(ValueError(), "greedy", lambda: None, proposer=Failing())
