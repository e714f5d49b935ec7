"""Guarantee 4 for every architecture and both ways of going back: a slot is a fresh prefill, whatever came before."""

import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.layers.cache import CAPACITY_STEP, AttentionCache, MambaCache
from speculative_mamba.testing.models import ARCHITECTURES
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

WITH_STATES = tuple(kind for kind in ARCHITECTURES if kind not in ("llama", "lfm2"))
WITH_ATTENTION = tuple(kind for kind in ARCHITECTURES if kind not in ("mamba1", "falcon-mamba", "mamba2"))
CASES = [
    pytest.param(kind, seed, mode, id=f"{kind} {seed} {mode}")
    for kind in ARCHITECTURES
    for seed in (0, 1)
    for mode in (("snapshots", "replay") if kind != "llama" else ("snapshots",))
]
SOME = [case for case in CASES if case.values[1] == ARCHITECTURES.index(case.values[0]) % 2]  # one seed of each kind


def slots(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same_checkpoints(cache, expected, row, slot, other_slot=None):
    """Whatever the layers remember in a row's slot, in two caches."""
    for index, (layer, right) in enumerate(zip(cache, expected, strict=True)):
        held = layer.snapshot(row, slot), right.snapshot(row, slot if other_slot is None else other_slot)
        for a, b in zip(*held, strict=True):
            assert_bitwise_equal(a, b, f"layer {index}, row {row}, slot {slot}")


class Watched:
    """A model that calls ``see(model, cache, start_slot, tokens)`` before each of its steps."""

    def __init__(self, model, see):
        self.model, self.see, self.vocab_size = model, see, model.vocab_size
        self.eos_token_id, self.device = None, model.device
        self.new_cache, self.prefill = model.new_cache, model.prefill

    def verify(self, tokens, cache, start_slot, write_slot=0, left_padding=None):
        self.see(self.model, cache, start_slot, tokens)
        return self.model.verify(tokens, cache, start_slot, write_slot, left_padding)


class Script(ScriptedDraft):
    """In round r, row b has exactly ``(r + b) % (K + 1)`` right tokens."""

    def propose(self, rows, accepted, lookahead):
        self.round = getattr(self, "round", -1) + 1
        self._agree = lambda row, position: position - len(rows[row]) < (self.round + row) % (lookahead + 1)
        return super().propose(rows, accepted, lookahead)


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_a_window_that_just_fits_and_one_that_does_not(family, prompt, assert_slot_holds, kind, spare):
    """The longer row is the second, and goes on from the last token of a window; no shape of call comes twice.

    Catches: room for one token too few; for the first row or the first slot only.
    """
    target, texts = family(kind)[0], [prompt(3), prompt(CAPACITY_STEP - 6 - spare)]
    cache = target.new_cache(2, 4)
    for row, text in enumerate(texts):
        target.prefill(text, cache, row)
    for window, start in (([1, 2], (0, 0)), ([3, 4, 5, 6], (0, 1)), ([7], (0, 3))):
        target.verify(torch.tensor([window] * 2), cache, slots(*start))
    assert {layer.capacity > CAPACITY_STEP for layer in cache if isinstance(layer, AttentionCache)} == {spare == 0}
    assert_slot_holds(target, cache, 1, 0, [*texts[1], 1, 2, 3, 4, 5, 6, 7])
    assert_slot_holds(target, cache, 0, 0, [*texts[0], 1, 3, 7])


@pytest.mark.parametrize("kind", WITH_STATES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_give_the_states_of_states(family, prompt, kind, seed, state_dtype):
    """Whole runs with rejections: what both models go on from in every step, their text and logits.

    Catches: one input too few; a saved state materialized for another slot; "replay" taken for "snapshots".
    """
    prompts, runs = [prompt(length) for length in (1, 2, 21)], []
    for mode in ("snapshots", "replay"):
        target, drafts = family(kind, seed, mode, state_dtype=state_dtype)
        held = [layer.states.shape[1] for layer in target.new_cache(1, 5) if not isinstance(layer, AttentionCache)]
        assert set(held) == {5 if mode == "snapshots" else 1}
        seen = []

        def see(model, cache, start, tokens, seen=seen):
            for row, slot in enumerate(start.tolist()):
                if slot >= 0:
                    seen += [part for layer in cache for part in layer.snapshot(row, slot)]

        result = sm.generate(
            Watched(target, see), prompts, draft=Watched(drafts[f"near, {mode}"], see), lookahead=4, max_new_tokens=14,
            output_logits=True,
        )  # fmt: skip
        runs.append((seen, result))
    (states, expected), (inputs, result) = runs
    assert expected.stats.accepted < expected.stats.tested, "something should be rejected"
    assert len(states) == len(inputs)
    for a, b in zip(inputs, states, strict=True):
        assert_bitwise_equal(a, b)
    for row in range(len(prompts)):
        assert torch.equal(result.sequences[row], expected.sequences[row])
        assert_bitwise_equal(result.logits[row], expected.logits[row])


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_every_slot_of_a_window_is_a_prefill(family, prompt, assert_slot_holds, kind, seed, mode):
    """Three rounds with a window of four tokens, of which the last 3 - accepted are wrong."""
    target, text = family(kind, seed, mode)[0], prompt(30)
    for accepted in range(4):
        cache, start, done = target.new_cache(1, 4), slots(0), 7
        target.prefill(text[:7], cache, 0)
        for _ in range(3):
            window = text[done : done + accepted + 1] + [0] * (3 - accepted)
            target.verify(torch.tensor([window]), cache, start)
            for slot in range(4):
                assert_slot_holds(target, cache, 0, slot, text[:done] + window[: slot + 1])
            start, done = slots(accepted), done + accepted + 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_the_loop_continues_from_a_fresh_state_after_any_acceptance(
    family, prompt, assert_slot_holds, kind, seed, mode, backend
):
    """The target and the draft, in three rows that accept other counts; the texts grow over the caches' capacity."""
    target, tokens = family(kind, seed, mode, backend=backend)[0], 14 if backend == "cpu" else 6
    prompts = [prompt(length) for length in (1, 4, CAPACITY_STEP - 4)]
    options = {"max_new_tokens": tokens, "stop_token_ids": ()}
    texts = [row.tolist() for row in sm.generate(target, prompts, **options).sequences]
    lengths, seen = [len(p) for p in prompts], set()

    def see(model, cache, start, tokens):
        for row, slot in enumerate(start.tolist()):
            if lengths[row] < len(texts[row]):
                seen.add(slot)
                assert_slot_holds(model, cache, row, slot, texts[row][: lengths[row] - 1])

    def count(row, token):
        lengths[row] += 1

    script = Script(texts, target.vocab_size, None)
    result = sm.generate(Watched(target, see), prompts, draft=script, lookahead=3, on_token=count, **options)
    assert [row.tolist() for row in result.sequences] == texts
    assert seen == set(range(4)) or backend == "reference"


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_the_draft_continues_from_a_fresh_state_after_any_acceptance(
    family, prompt, assert_slot_holds, kind, seed, mode
):
    """Its first call of a round takes two tokens; its state is then one token behind the target's."""
    target, drafts = family(kind, seed)
    draft = drafts["near"] if kind == "llama" else drafts[f"near, {mode}"]
    prompts = [prompt(length) for length in (1, 2, 3, CAPACITY_STEP - 4)]
    options = {"max_new_tokens": 16, "stop_token_ids": ()}
    texts = [row.tolist() for row in sm.generate(target, prompts, **options).sequences]
    lengths, seen = [len(p) for p in prompts], set()

    def see(model, cache, start, tokens):
        for row, slot in enumerate(start.tolist()):
            if tokens.shape[1] == 2 and lengths[row] < len(texts[row]):
                seen.add(slot)
                assert_slot_holds(model, cache, row, slot, texts[row][: max(lengths[row] - 2, 0)])

    def count(row, token):
        lengths[row] += 1

    sm.generate(target, prompts, draft=Watched(draft, see), lookahead=2, on_token=count, **options)
    assert len(seen) > 1, "not only one count should be accepted"


@pytest.fixture(scope="module")
def single_steps(family):
    """single_steps(kind, seed, mode, text): logits, and the cache after the text, of steps that are never recorded."""

    @functools.cache
    def run(kind, seed, mode, text):
        target = family(kind, seed, mode)[0]
        cache = list(target.new_cache(1, 1))
        return torch.cat([target.verify(torch.tensor([[token]]), cache, slots(0)) for token in text], 1), cache

    return run


@pytest.mark.parametrize("block", [5, "random"])
@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_any_cut_gives_the_same_logits_and_states(
    family, prompt, single_steps, assert_slot_holds, kind, seed, mode, block
):
    """210 tokens, for which an attention cache grows twice, against single steps."""
    target, text, source = family(kind, seed, mode)[0], prompt(210), random.Random(seed)
    expected, steps = single_steps(kind, seed, mode, tuple(text))
    cache, done, start = target.new_cache(1, 8), 0, slots(0)
    if block == "random":
        done = source.randrange(100)
        target.prefill(text[:done], cache, 0)
    while done < len(text):
        count = source.choice([1, 2, 3, 7, 8]) if block == "random" else block
        window = text[done : done + count]
        logits = target.verify(torch.tensor([window]), cache, start)
        assert_bitwise_equal(logits, expected[:, done : done + len(window)], f"{len(window)} tokens from {done}")
        done, start = done + len(window), slots(len(window) - 1)
    assert_same_checkpoints(cache, steps, 0, int(start), 0)
    assert_slot_holds(target, cache, 0, int(start), text)
    attention = [layer for layer in cache if isinstance(layer, AttentionCache)]
    assert bool(attention) == (kind in WITH_ATTENTION)
    assert all(len(text) <= layer.capacity < 3 * len(text) for layer in attention)


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_a_recorded_step_is_not_run_on_the_cache_from_before_it_grew(family, prompt, kind):
    """The same shape of call right before and right after, the old tensors kept alive by the caller.

    A shape that was only seen before is forgotten, and with it the memory that it worked on.

    Catches: recorded steps kept, run on the tensors from before.
    """
    target, text = family(kind)[0], prompt(CAPACITY_STEP + 8)
    recorded, plain = target.new_cache(1, 2), list(target.new_cache(1, 2))
    for cache in (recorded, plain):
        target.prefill(text[: CAPACITY_STEP - 5], cache, 0)
        target.verify(torch.tensor([text[CAPACITY_STEP - 5 : CAPACITY_STEP - 3]]), cache, slots(0))
    start, old = slots(1), [layer.tensors() for layer in recorded]
    for token in text[CAPACITY_STEP - 3 :]:
        actual, expected = (target.verify(torch.tensor([[token]]), cache, start) for cache in (recorded, plain))
        start = slots(0)
        assert_bitwise_equal(actual, expected)
        assert_same_checkpoints(recorded, plain, 0, 0)
    assert any(before[0] is not layer.tensors()[0] for before, layer in zip(old, recorded, strict=True))
    assert len(recorded.steps) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_null_columns_leave_no_trace(family, prompt, assert_slot_holds, kind, seed, mode, backend):
    """A row with n leading left padding equals the row without them, from a fresh state."""
    target, text = family(kind, seed, mode, backend=backend)[0], prompt(6)
    for columns in ([1, 0], [0, 3]):
        cache = target.new_cache(2, 4)
        padded = torch.tensor([[60] * n + text[: 4 - n] for n in columns])
        logits = target.verify(padded, cache, slots(0, 0), left_padding=slots(*columns))
        for row, n in enumerate(columns):
            alone = target.new_cache(1, 4)
            expected = target.verify(torch.tensor([text[: 4 - n]]), alone, slots(0))
            assert_bitwise_equal(logits[row, n:], expected[0])
            for slot in range(n, 4):
                assert_slot_holds(target, cache, row, slot, text[: slot + 1 - n])
        target.verify(torch.tensor([text[4:]] * 2), cache, slots(3, 3))
        for row, n in enumerate(columns):
            assert_slot_holds(target, cache, row, 1, text[: 4 - n] + text[4:])


def poison(layer, row, slot):
    """NaN in everything of a row that a call from a slot must not read."""
    if isinstance(layer, AttentionCache):
        length = int(layer.lengths[row, slot])
        layer.keys[row, :, length:], layer.values[row, :, length:] = torch.nan, torch.nan
        layer.lengths[row], layer.lengths[row, slot] = 0, length
    elif isinstance(layer, MambaCache) and layer.inputs is None:
        state = layer.states[row, slot].clone()
        layer.states[row], layer.states[row, slot] = torch.nan, state
    elif isinstance(layer, MambaCache):
        for tensor in vars(layer.inputs).values():
            tensor[row, slot + 1 :] = torch.nan
    if layer.window is not None:
        kept = slice(slot + 1, slot + layer.window.shape[1] - layer.slots + 1)
        history = layer.window[row, kept].clone()
        layer.window[row], layer.window[row, kept] = torch.nan, history


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_what_is_not_read_never_matters(family, prompt, assert_slot_holds, kind, seed, mode):
    """Blocks go to the first slot or behind the one to start from; each row starts from the same slot."""
    target, text = family(kind, seed, mode)[0], prompt(40)
    cache, start, done = target.new_cache(2, 7), 0, 9
    for row in range(2):
        target.prefill(text[:9], cache, row)
    for length, in_place in ((3, False), (2, True), (1, True), (6, False), (1, True), (4, False), (4, False)):
        for layer in cache:
            for row in range(2):
                poison(layer, row, start)
        write = start + 1 if in_place else 0
        window = torch.tensor([text[done : done + length]] * 2)
        logits = target.verify(window, cache, slots(start, start), write)
        assert not logits.isnan().any()
        start, done = write + length - 1, done + length
        for row in range(2):
            assert_slot_holds(target, cache, row, start, text[:done])


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_rows_start_from_slots_of_their_own(family, prompt, assert_slot_holds, kind, seed, mode):
    """Poisoned as well; one row is far longer, so that only it makes an attention cache grow."""
    target, lengths = family(kind, seed, mode)[0], (3, CAPACITY_STEP - 7, 1)
    texts = [prompt(length + 12, seed) for seed, length in enumerate(lengths)]
    cache, at, counts = target.new_cache(3, 6), list(lengths), [5, 0, 3]
    for row, text in enumerate(texts):
        target.prefill(text[: lengths[row]], cache, row)
    start = [0, 0, 0]
    for step in range(2):
        for layer in cache:
            for row, slot in enumerate(start):
                poison(layer, row, slot)
        windows = [text[n : n + 6] for text, n in zip(texts, at, strict=True)]
        logits = target.verify(torch.tensor(windows), cache, slots(*start))
        for row, n in enumerate(at):
            alone = target.new_cache(1, 6)
            target.prefill(texts[row][:n], alone, 0)
            assert_bitwise_equal(logits[row], target.verify(torch.tensor([windows[row]]), alone, slots(0))[0])
            for slot in range(6):
                assert_slot_holds(target, cache, row, slot, texts[row][: n + slot + 1])
        start = counts
        at = [n + count + 1 for n, count in zip(at, counts, strict=True)]
        assert step or max(at) <= CAPACITY_STEP


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_a_restored_slot_is_the_one_that_was_saved(family, prompt, assert_slot_holds, kind, seed, mode):
    """Into a row that held something longer or shorter, next to one that is not touched.

    Catches: a state restored beside the lengths or conv inputs of another text; recorded steps run on a cache from
    before it grew.
    """
    target, long, short = family(kind, seed, mode)[0], prompt(CAPACITY_STEP + 9), prompt(5, 1)
    source, cache = target.new_cache(1, 4), target.new_cache(2, 3)
    target.prefill(long[:-4], source, 0)
    target.verify(torch.tensor([long[-4:]]), source, slots(0))
    for row in range(2):
        target.prefill(short, cache, row)
    for slot in (3, 0, 2):
        target.verify(torch.tensor([[1, 2, 3]] * 2), cache, slots(0, 0))  # recorded in the first round
        for mine, theirs in zip(source, cache, strict=True):
            theirs.restore(1, mine.snapshot(0, slot))
        text = long[: len(long) - 3 + slot]
        assert_slot_holds(target, cache, 1, 0, text)
        assert_slot_holds(target, cache, 0, 2, [*short, 1, 2, 3])
        target.verify(torch.tensor([[4, 5]] * 2), cache, slots(2, 0))
        short = [*short, 1, 2, 3, 4]
        assert_slot_holds(target, cache, 1, 0, [*text, 4])
        assert_slot_holds(target, cache, 1, 1, [*text, 4, 5])
        assert_slot_holds(target, cache, 0, 0, short)


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_a_checkpoint_is_a_copy(family, prompt, kind, seed, mode):
    """What the row does afterwards, going back and on with another text, does not reach it.

    Catches: saved keys and values that are views of the cache.
    """
    target, text = family(kind, seed, mode)[0], prompt(20)
    cache = target.new_cache(1, 4)
    target.prefill(text[:5], cache, 0)
    target.verify(torch.tensor([text[5:9]]), cache, slots(0))
    saved = [layer.snapshot(0, slot) for layer in cache for slot in (0, 2)]
    held = [[part.clone() for part in parts] for parts in saved]
    for start, at in ((0, 9), (3, 13), (0, 16)):
        target.verify(torch.tensor([text[at : at + 4]]), cache, slots(start))
    for parts, before in zip(saved, held, strict=True):
        for part, right in zip(parts, before, strict=True):
            assert_bitwise_equal(part, right)


accepted_counts = st.lists(st.integers(0, 5), min_size=2, max_size=2)
calls = st.lists(
    st.tuples(st.sampled_from(["window", "draft"]), st.integers(1, 6), accepted_counts), min_size=1, max_size=6
)


@settings(
    max_examples=40, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    case=st.sampled_from(CASES), state_dtype=st.sampled_from([torch.float32, torch.bfloat16]), calls=calls,
    lengths=st.lists(st.integers(1, CAPACITY_STEP), min_size=2, max_size=2), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_calls_are_their_single_steps(family, prompt, case, state_dtype, calls, lengths, seed):
    """Windows and a draft's rounds (two tokens, then one at a time behind them), after which each row goes back."""
    target = family(*case.values, state_dtype=state_dtype)[0]
    cache, start, texts = target.new_cache(2, 6), [0, 0], [prompt(n, seed + row) for row, n in enumerate(lengths)]
    for row, text in enumerate(texts):
        target.prefill(text, cache, row)
    for number, (kind, count, accepted) in enumerate(calls):
        new = torch.tensor([prompt(count + 1, seed + number + row)[:count] for row in range(2)])
        if kind == "window":
            logits = target.verify(new, cache, slots(*start))
        else:
            first = min(2, count)
            parts = [target.verify(new[:, :first], cache, slots(*start))]
            for at in range(first, count):
                parts.append(target.verify(new[:, at : at + 1], cache, slots(at - 1, at - 1), at))
            logits = torch.cat(parts, 1)
        for row in range(2):
            steps = list(target.new_cache(1, 1))
            target.prefill(texts[row], steps, 0)
            for at, token in enumerate(new[row].tolist()):
                single = target.verify(torch.tensor([[token]]), steps, slots(0))
                assert_bitwise_equal(logits[row, at], single[0, 0], f"call {number}, row {row}, token {at}")
                for layer, right in zip(cache, steps, strict=True):
                    for a, b in zip(layer.snapshot(row, at), right.snapshot(0, 0), strict=True):
                        assert_bitwise_equal(a, b, f"call {number}, row {row}, slot {at}")
            start[row] = accepted[row] % count
            texts[row] = texts[row] + new[row, : start[row] + 1].tolist()


def test_what_auto_chooses(family):
    """As measured: inputs for Mamba-2 wherever there is a draft, a state per slot for Mamba-1."""

    def replays(kind, batch, count):
        return {layer.inputs is not None for layer in family(kind, mode="auto")[0].new_cache(batch, count)}

    assert replays("mamba1", 1, 5) == replays("mamba1", 64, 5) == replays("mamba2", 4, 1) == {False}
    assert replays("mamba2", 1, 2) == replays("mamba2", 64, 5) == {True}


@pytest.mark.parametrize(("kind", "per_slot"), [("mamba1", 2 * 48 + 5), ("mamba2", 48 + 6 + 18)])
def test_memory(family, kind, per_slot):
    """A state for every slot, or one and every slot's x, dt and B."""
    states, inputs = (family(kind, mode=mode)[0].new_cache(3, 7)[0] for mode in ("snapshots", "replay"))
    assert states.states.numel() == 7 * inputs.states.numel()
    assert sum(kept.numel() for kept in vars(inputs.inputs).values()) == 3 * 7 * per_slot


def test_inputs_must_follow_also_in_recorded_steps(family):
    target = family("mamba2", mode="replay")[0]
    cache = target.new_cache(1, 4)
    target.verify(torch.tensor([[1, 2]]), cache, slots(0))
    for _ in range(2):
        target.verify(torch.tensor([[3]]), cache, slots(1), 2)
    with pytest.raises(ValueError, match="write_slot 2 continues from slot 1"):
        target.verify(torch.tensor([[3]]), cache, slots(0), 2)


def test_a_cache_of_another_architecture_is_refused(family):
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        family("mamba2attn")[0].verify(torch.tensor([[1]]), family("mamba2")[0].new_cache(1, 1), slots(0))
