"""Guarantee 4 for whole models: going back to any token of a window gives the state of a fresh prefill up to it."""

import copy
import random

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def slots(*values):
    return torch.tensor(values, dtype=torch.int32)


def fresh(model, tokens):
    cache = model.new_cache(1, 1)
    model.prefill(tokens, cache, 0)
    return cache


class Watched:
    """A model that checks, at the first call of every round, the slots the loop chose to go on from.

    ``texts`` are the right texts, of which it has read all but the last ``behind`` tokens. Rows that have reached the
    end of theirs are not looked at. ``on_token`` must be the loop's.
    """

    def __init__(self, model, prompts, texts, behind, starts_round, check):
        self.model, self.texts, self.behind, self.starts_round, self.check = model, texts, behind, starts_round, check
        self.vocab_size, self.eos_token_id, self.device = model.vocab_size, None, model.device
        self.new_cache, self.prefill = model.new_cache, model.prefill
        self.lengths = [len(prompt) for prompt in prompts]
        self.rounds, self.seen_slots = 0, set()

    def on_token(self, row, token):
        self.lengths[row] += 1

    def verify(self, tokens, cache, start_slot, write_slot=0, left_padding=None):
        if self.starts_round(tokens):
            for row, slot in enumerate(start_slot.tolist()):
                if self.lengths[row] < len(self.texts[row]):
                    read = self.texts[row][: max(self.lengths[row] - self.behind, 0)]
                    self.check(self.model, cache, row, slot, read)
                    if self.rounds:
                        self.seen_slots.add(slot)
            self.rounds += 1
        return self.model.verify(tokens, cache, start_slot, write_slot, left_padding)


class Script(ScriptedDraft):
    """In round r, row b has exactly ``(r + b) % (K + 1)`` right tokens."""

    def propose(self, rows, accepted, lookahead):
        self.round = getattr(self, "round", -1) + 1
        self._agree = lambda row, position: position - len(rows[row]) < (self.round + row) % (self.lookahead + 1)
        return super().propose(rows, accepted, lookahead)


@pytest.mark.parametrize(("lookahead", "backend"), [(1, "cpu"), (3, "cpu"), (5, "cpu"), (3, "reference")])
def test_the_loop_continues_from_a_fresh_state_after_any_acceptance(
    pair, plain, prompt, assert_slot_holds, lookahead, backend
):
    """Catches: a start slot one too early, or not passed to a layer; a recorded one that is frozen; a cache that grows
    in its first layer only.
    """
    target, tokens = pair(backend=backend).target, 30
    prompts = [prompt(length) for length in (1, 2, 3, 5, 66)]
    texts = [plain(target, p, tokens)[0] for p in prompts]
    watched = Watched(target, prompts, texts, 1, lambda tokens: True, assert_slot_holds)
    draft = Script(texts, target.vocab_size, None)
    draft.lookahead = lookahead
    result = sm.generate(
        watched, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens, on_token=watched.on_token
    )
    assert [sequence.tolist() for sequence in result.sequences] == texts
    assert watched.seen_slots == set(range(lookahead + 1)), "every count from none to all must have been accepted"


@pytest.mark.parametrize("lookahead", [1, 3, 5])
def test_the_draft_continues_from_a_fresh_state_after_any_acceptance(pair, plain, prompt, assert_slot_holds, lookahead):
    """Its first call of a round takes two tokens; its state is then one token behind the target's.

    Catches: left padding that is missing for one-token prompts, or not passed to a layer.
    """
    models, tokens = pair(), 60
    prompts = [prompt(length) for length in (1, 2, 3, 66)]
    texts = [plain(models.target, p, tokens)[0] for p in prompts]
    draft = Watched(
        models.drafts["near"], prompts, texts, 2, lambda tokens: tokens.shape[1] == 2, assert_slot_holds
    )  # fmt: skip
    sm.generate(
        models.target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens, stop_token_ids=(),
        on_token=draft.on_token,
    )  # fmt: skip
    assert draft.seen_slots == set(range(lookahead + 1))


@pytest.mark.parametrize("lookahead", range(1, 16))
def test_a_cache_has_a_slot_for_every_token_of_a_window(lookahead):
    """The shapes, computed anew from the configuration; one token more does not fit, and then nothing is written."""
    model = random_model(tiny_config(n_layer=3, d_conv=2 + lookahead % 4))
    c, mixer = model.config, model.config.blocks[0]
    cache = model.new_cache(2, lookahead + 1)
    assert len(cache) == 3
    for layer in cache:
        assert layer.states.shape == (2, lookahead + 1, 2 * c.d_model, mixer.d_state)
        assert layer.window.shape == (2, mixer.d_conv - 1 + lookahead + 1, 2 * c.d_model)
        assert layer.states.dtype == layer.window.dtype == torch.float32
    before = [(layer.states.clone(), layer.window.clone()) for layer in cache]
    with pytest.raises(ValueError, match=f"do not fit into {lookahead + 1} slots"):
        model.verify(torch.ones(2, lookahead + 2, dtype=torch.long), cache, slots(0, 0))
    with pytest.raises(ValueError, match="do not fit"):
        model.verify(torch.ones(2, 1, dtype=torch.long), cache, slots(0, 0), write_slot=lookahead + 1)
    with pytest.raises(ValueError, match="start_slot"):
        model.verify(torch.ones(2, 1, dtype=torch.long), cache, slots(0, lookahead + 1))
    for layer, (states, window) in zip(cache, before, strict=True):
        assert_bitwise_equal(layer.states, states)
        assert_bitwise_equal(layer.window, window)
    model.verify(torch.ones(2, lookahead + 1, dtype=torch.long), cache, slots(0, 0))
    assert not any(layer.states.isnan().any() for layer in cache)


def overwrite(cache):
    """The same states in the same memory, which was used for something else in between."""
    saved = [(layer.states.clone(), layer.window.clone()) for layer in cache]
    for layer, (states, window) in zip(cache, saved, strict=True):
        layer.states.fill_(7), layer.window.fill_(7)
        layer.states.copy_(states), layer.window.copy_(window)
    return cache


def replace_tensors(cache):
    for layer in cache:
        layer.states, layer.window = layer.states.clone(), layer.window.clone()
    return cache


def replace_layers(cache):
    cache[:] = [type(layer)(layer.states.clone(), layer.window.clone()) for layer in cache]
    return cache


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "change", [overwrite, replace_tensors, replace_layers, copy.deepcopy, copy.copy, list], ids=lambda f: f.__name__
)
def test_the_state_is_an_object_of_the_callers(pair, prompt, backend, change):
    """What is done to it between two calls of the same shape counts: the next call reads and writes what is there."""
    target, text = pair(backend=backend).target, torch.tensor([prompt(9)])
    expected, cache = target.new_cache(1, 3), target.new_cache(1, 3)
    for at in (0, 3):
        target.verify(text[:, at : at + 3], expected, slots(2 if at else 0))
        target.verify(text[:, at : at + 3], cache, slots(2 if at else 0))
    held = [(layer.states, layer.window) for layer in cache]  # keeps the old memory from being given away
    changed = change(cache)
    logits = [target.verify(text[:, 6:], c, slots(2)) for c in (expected, changed)]
    assert_bitwise_equal(logits[1], logits[0])
    for layer, right in zip(changed, expected, strict=True):
        assert_bitwise_equal(layer.states, right.states)
        assert_bitwise_equal(layer.window, right.window)
    assert len(held) == len(changed)


@pytest.mark.parametrize("calls_before", [0, 1, 2])
@pytest.mark.parametrize(
    ("start", "words"),
    [
        (torch.zeros(2, dtype=torch.int64), "start_slot"),
        (torch.zeros(1, dtype=torch.int32), "start_slot"),
        (torch.zeros(3, dtype=torch.int32), "start_slot"),
        (torch.full((2,), 4, dtype=torch.int32), "start_slot"),
        (torch.full((2,), -2, dtype=torch.int32), "start_slot"),
    ],
    ids=["int64", "one row", "three rows", "too large", "negative"],
)
def test_arguments_are_checked_in_every_call(pair, calls_before, start, words):
    """Also in a call of a shape that was seen before; and then nothing is written."""
    target = pair().target
    cache, tokens = target.new_cache(2, 4), torch.ones(2, 2, dtype=torch.long)
    for _ in range(calls_before):
        target.verify(tokens, cache, slots(0, 0))
    before = [(layer.states.clone(), layer.window.clone()) for layer in cache]
    with pytest.raises(ValueError, match=words):
        target.verify(tokens, cache, start)
    for layer, (states, window) in zip(cache, before, strict=True):
        assert_bitwise_equal(layer.states, states)
        assert_bitwise_equal(layer.window, window)


def test_a_cache_of_another_depth_is_refused(pair):
    target = pair().target
    for layers in (slice(0, 1), slice(1, 2)):
        cache = target.new_cache(1, 2)
        before = [layer.states.clone() for layer in cache]
        with pytest.raises(ValueError):
            target.verify(torch.ones(1, 2, dtype=torch.long), cache[layers], slots(0))
        for layer, states in zip(cache, before, strict=True):
            assert_bitwise_equal(layer.states, states, "states, of which none may be written")


@pytest.mark.parametrize("accepted", range(6))
def test_every_slot_of_a_window_is_a_prefill(pair, prompt, accepted, assert_slot_holds):
    """Three rounds with a window of six tokens, of which the last 5 - accepted are wrong.

    Catches: a write slot that is not passed to a layer; a prefill that keeps no last state; views of another row.
    """
    target = pair().target
    text = prompt(40)
    cache = target.new_cache(1, 6)
    target.prefill(text[:7], cache, 0)
    start, done = slots(0), 7
    for _ in range(3):
        window = text[done : done + accepted + 1] + [0] * (5 - accepted)
        target.verify(torch.tensor([window]), cache, start)
        for slot in range(6):
            assert_slot_holds(target, cache, 0, slot, text[:done] + window[: slot + 1])
        start, done = slots(accepted), done + accepted + 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seed", range(8))
def test_any_cut_gives_the_same_logits_and_states(pair, prompt, backend, seed):
    """64 tokens as one prefill, single steps and blocks of 2 to 8, in random order, against 64 single steps."""
    target, text, source = pair(backend=backend).target, prompt(64), random.Random(seed)
    steps = target.new_cache(1, 1)
    expected = torch.cat([target.verify(torch.tensor([[token]]), steps, slots(0)) for token in text], 1)
    cache, done, start = target.new_cache(1, 8), source.randrange(40), slots(0)
    target.prefill(text[:done], cache, 0)
    while done < len(text):
        block = text[done : done + source.choice([1, 1, 2, 3, 4, 5, 6, 7, 8])]
        logits = target.verify(torch.tensor([block]), cache, start)
        assert_bitwise_equal(logits, expected[:, done : done + len(block)], f"{len(block)} tokens from {done}")
        done, start = done + len(block), slots(len(block) - 1)
    for layer, one in zip(cache, steps, strict=True):
        assert_bitwise_equal(layer.states[:, start.item()], one.states[:, 0])


def test_unread_slots_never_matter(pair, prompt, assert_slot_holds):
    """Before every call all slots but the one to start from are poisoned; blocks go behind it or to the first."""
    target, text = pair().target, prompt(30)
    cache, width = target.new_cache(2, 7), target.config.blocks[0].d_conv
    for row in range(2):
        target.prefill(text[:9], cache, row)
    start, done = [0, 0], 9
    for length, in_place in ((3, False), (2, True), (1, True), (6, False), (1, True), (4, False)):
        for layer in cache:
            for row, slot in enumerate(start):
                state, inputs = layer.states[row, slot].clone(), layer.window[row, slot + 1 : slot + width].clone()
                layer.states[row], layer.window[row] = torch.nan, torch.nan
                layer.states[row, slot], layer.window[row, slot + 1 : slot + width] = state, inputs
        write = start[0] + 1 if in_place else 0
        logits = target.verify(torch.tensor([text[done : done + length]] * 2), cache, slots(*start), write)
        assert not logits.isnan().any()
        start, done = [write + length - 1] * 2, done + length
        for row in range(2):
            assert_slot_holds(target, cache, row, start[row], text[:done])


def test_rows_start_from_slots_of_their_own(pair, prompt, assert_slot_holds):
    target = pair().target
    texts = [prompt(12, seed) for seed in range(3)]
    cache = target.new_cache(3, 6)
    for row, text in enumerate(texts):
        target.prefill(text[:3], cache, row)
    target.verify(torch.tensor([text[3:9] for text in texts]), cache, slots(0, 0, 0))
    counts = [5, 0, 3]
    successors = [texts[row][4 + n : 6 + n] for row, n in enumerate(counts)]
    logits = target.verify(torch.tensor(successors), cache, slots(*counts))
    for row, n in enumerate(counts):
        prefix = texts[row][: 4 + n]
        assert_slot_holds(target, cache, row, 0, prefix + successors[row][:1])
        assert_slot_holds(target, cache, row, 1, prefix + successors[row])
        alone = target.verify(torch.tensor([successors[row]]), _with_slots(fresh(target, prefix), target, 2), slots(0))
        assert_bitwise_equal(logits[row], alone[0])


def _with_slots(cache, model, count):
    """The same slot 0 in a cache with room for more."""
    roomy = model.new_cache(1, count)
    for old, new in zip(cache, roomy, strict=True):
        new.states[:, :1], new.window[:, : old.window.shape[1]] = old.states, old.window
    return roomy


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("columns", [[1, 0], [2, 1], [0, 3]])
def test_null_columns_leave_no_trace(pair, prompt, backend, columns, assert_slot_holds):
    """A row with n leading left padding equals the row without them, from a fresh state."""
    target = pair(backend=backend).target
    text = prompt(4)
    padded = torch.tensor([[60] * n + text[: 4 - n] for n in columns])
    cache = target.new_cache(2, 4)
    logits = target.verify(padded, cache, slots(0, 0), left_padding=slots(*columns))
    for row, n in enumerate(columns):
        alone = target.new_cache(1, 4)
        expected = target.verify(torch.tensor([text[: 4 - n]]), alone, slots(0))
        assert_bitwise_equal(logits[row, n:], expected[0])
        assert_slot_holds(target, cache, row, 3, text[: 4 - n])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 63, 64, 65, 128, 130])
def test_prefill_equals_single_steps(pair, prompt, length, assert_slot_holds):
    target, text = pair().target, prompt(length)
    cache = target.new_cache(1, 1)
    for token in text:
        target.verify(torch.tensor([[token]]), cache, slots(0))
    assert_slot_holds(target, cache, 0, 0, text)


def test_a_long_prompt(pair, plain, prompt):
    """2,000 tokens: same text with a draft as without, and the cache is as large as for one token."""
    models = pair()
    text, logits = plain(models.target, prompt(2000), 8)
    result = sm.generate(
        models.target, [prompt(2000), prompt(1)], draft=models.drafts["near"], max_new_tokens=8, stop_token_ids=(),
        output_logits=True,
    )  # fmt: skip
    assert result.sequences[0].tolist() == text
    assert_bitwise_equal(result.logits[0], logits)


def test_prefill_memory_does_not_grow_with_the_prompt(pair, prompt, monkeypatch):
    """No intermediate tensor has more tokens than a chunk."""
    target, widest = pair().target, 0
    whole = type(target)._blocks

    def watch(self, hidden, batch, cache, window):
        nonlocal widest
        widest = max(widest, len(hidden))
        return whole(self, hidden, batch, cache, window)

    monkeypatch.setattr(type(target), "_blocks", watch)
    cache = target.new_cache(1, 1)
    target.prefill(prompt(1500), cache, 0)
    assert widest <= 64
    assert cache[0].states.numel() == target.config.blocks[0].d_inner * target.config.blocks[0].d_state
