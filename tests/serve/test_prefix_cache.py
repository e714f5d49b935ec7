"""States of what was read before: the longest is found, the oldest goes, and no bit depends on them."""

import random

import pytest
import torch
from engines import WAIT, alone, pair

import speculative_mamba as sm
from speculative_mamba.serve.prefix_cache import PrefixCache
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def state(*tokens: int, floats: int = 8) -> sm.RowState:
    return sm.RowState(list(tokens), [(torch.zeros(floats),)])


def nbytes(*tokens: int, floats: int = 8) -> int:
    return 4 * floats + 8 * len(tokens)


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(10**6)
    states = [state(1), state(1, 2, 3), state(1, 2, 3, 4, 5), state(1, 2, 9), state(2)]
    for one in states:
        cache.store(one, None)
    assert cache.find([1, 2, 3, 4, 7])[0] is states[1]
    assert cache.find([1, 2, 3, 4, 5, 6])[0] is states[2]
    assert cache.find([1, 2, 3, 4, 5])[0] is states[1], "the last token of a prompt is read by the first round"
    assert cache.find([1, 2, 9, 9])[0] is states[3] and cache.find([2, 1])[0] is states[4]
    assert cache.find([1]) == cache.find([3, 1, 2, 3]) == (None, None)


def test_what_was_used_least_recently_goes_first() -> None:
    cache = PrefixCache(3 * nbytes(1))
    states = [state(token) for token in range(4)]
    for one in states[:3]:
        cache.store(one, None)
    assert (len(cache), cache.nbytes) == (3, 3 * nbytes(1))
    assert cache.find([0, 0])[0] is states[0]
    cache.store(states[3], None)
    assert [cache.find([token, 0])[0] for token in range(4)] == [states[0], None, states[2], states[3]]
    cache.store(state(7, floats=100), None)
    assert (len(cache), cache.nbytes) == (0, 0), "larger than all that may be kept"


def test_a_text_is_kept_once() -> None:
    """With the draft's state, if anybody gave one."""
    cache, draft = PrefixCache(10**6), state(1)
    cache.store(state(1, 2), draft)
    again = state(1, 2)
    cache.store(again, None)
    assert cache.find([1, 2, 3]) == (again, draft)
    assert (len(cache), cache.nbytes) == (1, nbytes(1, 2) + nbytes(1))
    cache.store(None, None)
    cache.store(state(), None)
    assert len(cache) == 1


def talks(source: random.Random, vocabulary: int) -> list[list[int]]:
    """What people say in three conversations, the first of which begin alike."""
    opening = [source.randrange(vocabulary) for _ in range(20)]
    return [
        [*(opening if talk < 2 else []), *(source.randrange(vocabulary) for _ in range(source.randrange(1, 30)))]
        for talk in range(3)
    ]


@pytest.mark.parametrize("kind", [sm.EagerExecutor, RecordingExecutor])
@pytest.mark.parametrize("models", ["mamba1", "mamba2-in-llama", "llama", "lfm2"])
@pytest.mark.parametrize("prefix_cache_bytes", [10**8, 6 * 10**4])
def test_no_bit_depends_on_it(kind, models, prefix_cache_bytes) -> None:
    """Conversations of several turns side by side, with and without draft: tokens and log-probabilities."""
    (target, draft), source = pair(models), random.Random(4)
    rows = [(talk, sm.SamplingParams(temperature=source.choice([0, 1.0]), seed=5)) for talk in talks(source, 61)]
    known = 0
    with sm.Engine(
        target, draft=draft, lookahead=3, acceptance="coupled", max_batch_size=2, executor=kind(),
        prefix_cache_bytes=prefix_cache_bytes,
    ) as engine:  # fmt: skip
        for _ in range(4):
            asked = [
                sm.Request(talk, source.choice([1, 6, 9]), sampling, stop_token_ids=(3, 4), logprobs=0,
                           use_draft=source.random() < 0.7)
                for talk, sampling in rows
            ]  # fmt: skip
            for (talk, _), one, completion in zip(rows, asked, [engine.submit(one) for one in asked], strict=True):
                output, expected = completion.result(WAIT), alone(target, one)
                assert output.tokens == expected.sequences[0].tolist()[len(one.prompt) :]
                logprobs = expected.logits[0].log_softmax(-1)
                for at, token in enumerate(output.outputs):
                    assert token.logprob == logprobs[at, token.token].item()
                known += output.cached_tokens
                talk += [*output.tokens, *(source.randrange(61) for _ in range(source.randrange(1, 9)))]
            stats = engine.stats()
            assert stats.prefix_cache_bytes <= prefix_cache_bytes
    assert known == stats.cached_tokens
    if prefix_cache_bytes == 10**8:
        assert known > 0.5 * stats.prompt_tokens and stats.prefix_cache_entries > 12


@pytest.mark.parametrize("kind", [sm.EagerExecutor, RecordingExecutor])
def test_states_are_those_of_their_texts(kind) -> None:
    """Of prompts and of turns, of target and draft, bit for bit as read anew."""
    target, draft = pair("mamba2-in-llama")
    with sm.Engine(target, draft=draft, max_batch_size=2, executor=kind(), prefix_cache_bytes=10**8) as engine:
        for prompt in ([5, 6, 7], [5] * 300, [9, 1]):
            engine.submit(sm.Request(prompt, 7, stop_token_ids=())).result(WAIT)
    entries = engine._prefix_cache._entries.values()
    assert [len(entry.target.tokens) for entry in entries] == [2, 9, 299, 306, 1, 8]
    for entry in entries:
        for model, kept in ((target, entry.target), (draft, entry.draft)):
            fresh = model.new_cache(1, 1)
            model.prefill(kept.tokens, fresh, 0)
            for layer, parts in zip(fresh, kept.layers, strict=True):
                for part, right in zip(parts, layer.snapshot(0, 0), strict=True):
                    assert_bitwise_equal(part, right, f"after {len(kept.tokens)} tokens")


def test_a_second_turn_reads_only_what_is_new() -> None:
    """And a text that broke off at a stop string or was cancelled is known up to its prompt at least."""
    target, draft = pair("mamba1")
    with sm.Engine(target, draft=draft, prefix_cache_bytes=10**8) as engine:
        first = engine.submit(sm.Request([5] * 500, 9, stop_token_ids=())).result(WAIT)
        text = [*[5] * 500, *first.tokens]
        second = engine.submit(sm.Request([*text, 1, 2], 5)).result(WAIT)
        assert (first.cached_tokens, second.cached_tokens) == (0, 508)
        again = engine.submit(sm.Request([5] * 500, 9, stop_token_ids=())).result(WAIT)
        assert (again.cached_tokens, again.tokens) == (499, first.tokens)
        other = engine.submit(sm.Request([6, *[5] * 500], 3)).result(WAIT)
        assert other.cached_tokens == 0
    assert engine.stats().cached_tokens == 508 + 499
