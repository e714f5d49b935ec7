"""The guarantees of the loop for every architecture, both ways to go back, and every kind of draft."""

import dataclasses
import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.layers.cache import AttentionCache, MambaCache
from speculative_mamba.ops.backend import extension
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import ARCHITECTURES, as_dtype, random_model, tiny_architecture
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate
from speculative_mamba.testing.tolerance import assert_bitwise_equal

TOKENS = 16
UNEQUAL = (1, 9, 67)
MODES = ("states", "inputs")
kinds = pytest.mark.parametrize("kind", ARCHITECTURES)
seeds = pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
modes = pytest.mark.parametrize("mode", MODES)


@functools.cache
def stored(kind, seed, dtype, backend):
    return random_model(tiny_architecture(kind, seed), seed=seed, dtype=dtype, backend=backend)


def model(kind, seed=0, mode="auto", dtype=torch.float32, backend="cpu", **other):
    return dataclasses.replace(stored(kind, seed, dtype, backend), checkpoint=mode, **other)


def near(target):
    """The target with a head that is a little off: right most of the time."""
    noise = torch.randn(target.head.shape, generator=torch.Generator().manual_seed(5))
    head = oracle.dense(target.head, torch.float32) + 0.06 * noise
    return dataclasses.replace(target, head=as_dtype(head, target.head.dtype))


DRAFTS = {
    "near": near,
    "itself": lambda target: target,
    "Mamba-1": lambda target: random_model(tiny_architecture("mamba1"), seed=7, backend=target.backend),
    "Llama": lambda target: random_model(tiny_architecture("llama"), seed=7, backend=target.backend),
    "ngram": lambda target: "ngram",
}
plainly = {}


def plain(target, prompt, tokens=TOKENS):
    """Sequence and logits of plain decoding of one row alone."""
    key = (*(id(part) for part in (target.embedding, target.norm_weight)), target.state_dtype, tuple(prompt), tokens)
    if key not in plainly:
        result = sm.generate(target, [prompt], max_new_tokens=tokens, stop_token_ids=(), output_logits=True)
        plainly[key] = target, result.sequences[0].tolist(), result.logits[0]
    return plainly[key][1:]


def check(target, draft, prompts, lookahead, tokens=TOKENS):
    result = sm.generate(
        target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens, stop_token_ids=(), output_logits=True
    )
    for row, prompt in enumerate(prompts):
        sequence, logits = plain(target, prompt, tokens)
        assert result.sequences[row].tolist() == sequence, f"tokens of row {row}"
        assert_bitwise_equal(result.logits[row], logits, f"logits of row {row}")
    return result


def slots(*values):
    return torch.tensor(values, dtype=torch.int32)


@kinds
@seeds
@modes
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_text_and_logits_are_those_of_plain_decoding(prompt, kind, seed, mode, draft):
    target = model(kind, seed, mode)
    prompts = [prompt(length) for length in UNEQUAL]
    for lookahead in (1, 4, 7):
        check(target, DRAFTS[draft](target), prompts, lookahead)


@kinds
@seeds
def test_on_the_reference(prompt, kind, seed):
    target = model(kind, seed, MODES[seed], backend="reference")
    check(target, near(target), [prompt(3), prompt(11)], 3, tokens=9)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_dtypes_of_weights(prompt, kind, dtype):
    target = model(kind, dtype=dtype)
    check(target, near(target), [prompt(length) for length in UNEQUAL], 4)


@kinds
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_states_keys_and_values(prompt, kind, mode, dtype):
    target = model(kind, 1, mode, state_dtype=dtype)
    for layer in target.new_cache(2, 3):
        assert (layer.keys if isinstance(layer, AttentionCache) else layer.states).dtype == dtype
    check(target, near(target), [prompt(length) for length in UNEQUAL], 4)
    exact = plain(model(kind, 1), prompt(67))[1]
    assert not torch.equal(plain(target, prompt(67))[1], exact), "it must make a difference"


@kinds
@seeds
def test_against_a_forward_pass_over_the_whole_text(prompt, kind, seed):
    target, text = model(kind, seed), prompt(30)
    sequence, logits = plain(target, text, 30)
    assert sequence == oracle.greedy(target, text, 30)
    exact = oracle.full_forward(target, sequence)[len(text) - 1 : -1]
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@kinds
@seeds
def test_both_ways_to_go_back_hold_the_same_states(prompt, kind, seed):
    """Through rounds with every accepted count, row by row another, every slot that a row may go on from."""
    text, lookahead, source = [prompt(200, seed=4), prompt(200, seed=5)], 4, random.Random(0)
    both = [model(kind, seed, mode) for mode in MODES]
    caches, done, start = [m.new_cache(2, lookahead + 1) for m in both], [9, 40], [0, 0]
    for m, cache in zip(both, caches, strict=True):
        for row in range(2):
            m.prefill(text[row][: done[row]], cache, row)
    for _ in range(8):
        window = torch.tensor([row[at : at + lookahead + 1] for row, at in zip(text, done, strict=True)])
        one, other = (m.verify(window, cache, slots(*start)) for m, cache in zip(both, caches, strict=True))
        assert_bitwise_equal(one, other)
        for first, second in zip(*caches, strict=True):
            for row in range(2):
                for slot in range(lookahead + 1):
                    saved = first.checkpoint(row, slot), second.checkpoint(row, slot)
                    for part, same in zip(*saved, strict=True):
                        assert_bitwise_equal(part, same, f"row {row}, slot {slot}")
        start = [source.randrange(lookahead + 1) for _ in start]
        done = [at + slot + 1 for at, slot in zip(done, start, strict=True)]


def test_what_auto_chooses():
    def replays(kind, batch, count):
        return [layer.inputs is not None for layer in model(kind).new_cache(batch, count)]

    assert not any(replays("mamba1", 1, 5)) and all(replays("mamba1", 4, 5))
    assert all(replays("mamba2", 1, 5)) and not any(replays("mamba2", 1, 1))


@kinds
@seeds
@modes
def test_every_slot_is_a_fresh_prefill(prompt, assert_slot_holds, kind, seed, mode):
    """Three rounds; in each every slot is looked at, and the row goes on from another one."""
    target, text = model(kind, seed, mode), prompt(60)
    for counts in ((0, 3, 1), (4, 0, 2), (2, 4, 4)):
        cache, done, start = target.new_cache(2, 5), 6, 0
        for row in range(2):
            target.prefill(text[:done], cache, row)
        for accepted in counts:
            target.verify(torch.tensor([text[done : done + 5]] * 2), cache, slots(start, start))
            for slot in range(5):
                assert_slot_holds(target, cache, 1, slot, text[: done + slot + 1])
            start, done = accepted, done + accepted + 1


@kinds
@seeds
@modes
def test_a_draft_runs_a_token_at_a_time(prompt, assert_slot_holds, kind, seed, mode):
    """Two tokens to slots 0 and 1, then each token from the slot before to the next: slots are those of one call."""
    draft, text = model(kind, seed, mode), prompt(40)
    cache, whole = draft.new_cache(2, 5), draft.new_cache(2, 5)
    for held in (cache, whole):
        for row in range(2):
            draft.prefill(text[:7], held, row)
    start = 0
    for done in (7, 9, 10):
        expected = draft.verify(torch.tensor([text[done : done + 5]] * 2), whole, slots(start, start))
        logits = [draft.verify(torch.tensor([text[done : done + 2]] * 2), cache, slots(start, start))]
        for slot in range(2, 5):
            token = torch.tensor([text[done + slot : done + slot + 1]] * 2)
            logits.append(draft.verify(token, cache, slots(slot - 1, slot - 1), slot))
        assert_bitwise_equal(torch.cat(logits, 1), expected)
        start = {7: 1, 9: 0}.get(done, 4)
        assert_slot_holds(draft, cache, 1, start, text[: done + start + 1])


@kinds
@modes
def test_null_columns_leave_no_trace(prompt, kind, mode):
    target, text = model(kind, 1, mode), prompt(12)
    cache, alone = target.new_cache(2, 5), target.new_cache(1, 5)
    window = torch.tensor([[3, *text[:4]], text[:5]])
    logits = target.verify(window, cache, slots(0, 0), null_columns=slots(1, 0))
    expected = target.verify(window[:1, 1:], alone, slots(0))
    assert_bitwise_equal(logits[0, 1:], expected[0])
    again = target.verify(torch.tensor([text[4:7]] * 2), cache, slots(4, 3))
    assert_bitwise_equal(again[0], target.verify(torch.tensor([text[4:7]]), alone, slots(3))[0])


@kinds
@modes
def test_any_cut_of_a_long_text_gives_the_same_logits(prompt, kind, mode):
    """Across several growths of an attention layer's cache; with recorded steps, which know addresses, and without."""
    target, text, source = model(kind, 0, mode), prompt(300), random.Random(1)
    whole, steps = target.new_cache(1, 16), list(target.new_cache(1, 16))
    target.prefill(text[:20], whole, 0)
    target.prefill(text[:11], steps, 0)
    target.prefill(text[11:20], steps, 0)
    done, starts, logits = 20, [slots(0), slots(0)], ([], [])
    while done < len(text):
        count = min(source.choice((1, 2, 5, 16)), len(text) - done)
        logits[0].append(target.verify(torch.tensor([text[done : done + count]]), whole, starts[0])[0])
        for token in text[done : done + count]:
            logits[1].append(target.verify(torch.tensor([[token]]), steps, starts[1])[0])
            starts[1] = slots(0)
        starts[0], done = slots(count - 1), done + count
    assert_bitwise_equal(torch.cat(logits[0]), torch.cat(logits[1]))
    exact = oracle.full_forward(target, text)[20:]
    torch.testing.assert_close(torch.cat(logits[0]).double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("kind", ["llama", "mamba2attn"])
def test_steps_that_were_recorded_before_the_cache_grew_are_not_run(prompt, kind):
    target, text = model(kind), prompt(200)
    cache = target.new_cache(1, 2)
    target.verify(torch.tensor([text[:2]]), cache, slots(0))
    target.verify(torch.tensor([text[2:3]]), cache, slots(1))
    for token in text[3:60]:
        target.verify(torch.tensor([[token]]), cache, slots(0))
    assert len(cache.steps) == 2
    keys = [layer.keys for layer in cache if isinstance(layer, AttentionCache)]
    for layer in cache:
        if isinstance(layer, AttentionCache):
            layer.grow(70)
    assert all(old is not layer.keys for old, layer in zip(keys, filter(_is_attention, cache), strict=True))
    for old in keys:
        old.fill_(torch.nan)  # whoever reads it gives itself away
    exact = oracle.full_forward(target, text)
    for at in range(60, 200):
        if at == 199:  # the cache has grown by itself: what was recorded on the tensors from before keeps none of them
            held = {id(tensor) for step in cache.steps.values() for tensor in step.addressed}
            assert all(id(layer.keys) in held for layer in filter(_is_attention, cache)) and len(cache.steps) == 1
        logits = target.verify(torch.tensor([[text[at]]]), cache, slots(0))[0, 0]
        torch.testing.assert_close(logits.double(), exact[at], rtol=0, atol=1e-5 * exact.abs().max().item())


def _is_attention(layer):
    return isinstance(layer, AttentionCache)


@kinds
@modes
def test_what_is_not_read_may_be_anything(prompt, kind, mode):
    target, text = model(kind, 1, mode), prompt(60)
    clean = target.new_cache(1, 5)
    target.prefill(text[:9], clean, 0)
    target.verify(torch.tensor([text[9:14]]), clean, slots(0))
    poisoned = target.new_cache(1, 5)
    for layer, other in zip(poisoned, clean, strict=True):
        layer.restore(0, other.checkpoint(0, 2))
        if isinstance(layer, AttentionCache):
            length = int(layer.lengths[0, 0])
            layer.keys[:, :, length:], layer.values[:, :, length:] = torch.nan, torch.nan
        elif layer.inputs is not None:
            layer.inputs.x.fill_(torch.nan), layer.inputs.B.fill_(torch.nan)
            layer.inputs.dt[:, 1:] = torch.nan
    expected = target.verify(torch.tensor([text[20:24]]), clean, slots(2))
    assert_bitwise_equal(target.verify(torch.tensor([text[20:24]]), poisoned, slots(0)), expected)


@kinds
@modes
def test_a_used_cache_takes_a_checkpoint(prompt, kind, mode):
    """As a draft that was left out of some rounds goes on from where it stood."""
    target, text = model(kind, 1, mode), prompt(60)
    cache = target.new_cache(2, 5)
    target.prefill(text[:9], cache, 0)
    saved = [layer.checkpoint(0, 0) for layer in cache]
    for at in (9, 14):
        target.verify(torch.tensor([text[at : at + 5]] * 2), cache, slots(4 if at > 9 else 0, 0))
    for layer, state in zip(cache, saved, strict=True):
        layer.restore(1, state)
    fresh = target.new_cache(1, 5)
    target.prefill(text[:9], fresh, 0)
    window = torch.tensor([text[9:12]])
    actual = target.verify(window.repeat(2, 1), cache, slots(2, 0))[1]
    assert_bitwise_equal(actual, target.verify(window, fresh, slots(0))[0])


@kinds
@modes
def test_two_calls_equal_one(prompt, assert_states_fit, kind, mode):
    """Also after a stop inside an accepted block, with another lookahead, and from a branch."""
    target = model(kind, 0, mode)
    draft, prompts = near(target), [prompt(length) for length in UNEQUAL]
    options = {"draft": draft, "stop_token_ids": (), "output_logits": True}
    whole = sm.generate(target, prompts, max_new_tokens=24, lookahead=4, **options)
    stop = int(whole.sequences[1][len(prompts[1]) + 6])
    cache = sm.GenerationCache()
    first = sm.generate(
        target, prompts, max_new_tokens=12, lookahead=5, cache=cache, **{**options, "stop_token_ids": (stop,)}
    )
    assert "eos" in first.finish_reasons
    assert_states_fit(cache)
    branch = cache.copy()
    for held in (cache, branch):
        second = sm.generate(target, held.sequences, max_new_tokens=8, lookahead=3, cache=held, **options)
        for row, sequence in enumerate(second.sequences):
            assert sequence.tolist() == whole.sequences[row][: len(sequence)].tolist()
            begun = len(first.sequences[row]) - len(prompts[row])
            assert_bitwise_equal(second.logits[row], whole.logits[row][begun : begun + 8], f"row {row}")
        assert_states_fit(held)


@kinds
def test_sampled_text_is_that_of_plain_sampling(prompt, kind):
    target, prompts = model(kind, 1), [prompt(4), prompt(15)]
    options = {"max_new_tokens": 14, "sampling": sm.SamplingParams(temperature=0.9, top_k=20, seed=3)}
    expected = sm.generate(target, prompts, **options).sequences
    for name, draft in DRAFTS.items():
        result = sm.generate(target, prompts, draft=draft(target), acceptance="coupled", lookahead=4, **options)
        assert all(map(torch.equal, result.sequences, expected)), name
        sm.generate(target, prompts, draft=draft(target), acceptance="rejection", lookahead=4, **options)


@kinds
def test_instruction_sets_and_threads(prompt, threads, kind):
    target, module = model(kind), extension()[0]
    before, text, results = module.isa(), prompt(80), []
    try:
        for isa in (name for name in module.available_isas() if name != "baseline"):
            module.select_isa(isa)
            for count in (1, 2, 3):
                threads(count)
                cache = target.new_cache(1, 9)
                target.prefill(text[:71], cache, 0)
                results.append(target.verify(torch.tensor([text[71:]]), cache, slots(0)))
    finally:
        module.select_isa(before)
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@kinds
@modes
def test_an_interrupted_run_goes_on_right(prompt, monkeypatch, assert_states_fit, kind, mode):
    target = model(kind, 0, mode)
    draft, prompts, cache = near(target), [prompt(5), prompt(30)], sm.GenerationCache()
    expected = [plain(target, p, 20)[0] for p in prompts]
    for calls in range(2, 14, 3):
        verify, left = sm.MambaLM.verify, [calls]

        def interrupted(self, *arguments, verify=verify, left=left):
            logits = verify(self, *arguments)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return logits

        monkeypatch.setattr(sm.MambaLM, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            texts = cache.sequences or prompts
            sm.generate(target, texts, draft=draft, max_new_tokens=40, stop_token_ids=(), cache=cache)
        monkeypatch.setattr(sm.MambaLM, "verify", verify)
        assert_states_fit(cache, complete=False)
    assert all(text[:25] == right[: len(text[:25])] for text, right in zip(cache.sequences, expected, strict=True))


def test_one_of_several_ends_of_text(prompt):
    target, text = model("llama"), prompt(9)
    sequence = plain(target, text)[0]
    stops = sequence[len(text) + 5], sequence[len(text) + 9]
    config = dataclasses.replace(target.config, eos_token_id=stops)
    result = sm.generate(dataclasses.replace(target, config=config), [text], draft=near(target), max_new_tokens=TOKENS)
    ends = min(sequence.index(stop, len(text)) for stop in stops)
    assert result.sequences[0].tolist() == sequence[: ends + 1] and result.finish_reasons == ["eos"]


def test_a_cache_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="layers"):
        model("mamba2attn").verify(torch.tensor([[1]]), model("mamba2").new_cache(1, 1), slots(0))


def test_replayed_inputs_must_follow_also_in_recorded_steps():
    target = model("mamba2", mode="inputs")
    cache = target.new_cache(1, 4)
    target.verify(torch.tensor([[1, 2]]), cache, slots(0))
    for _ in range(2):
        target.verify(torch.tensor([[3]]), cache, slots(1), 2)
    with pytest.raises(ValueError, match="write_slot 2 continues from slot 1"):
        target.verify(torch.tensor([[3]]), cache, slots(0), 2)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(ARCHITECTURES),
    seed=st.integers(0, 1),
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 5),
    rounds=st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 99)), min_size=1, max_size=6),
    prefilled=st.integers(0, 70),
)
def test_any_rounds_equal_single_steps(kind, seed, mode, batch, rounds, prefilled):
    """Windows of any length, taken at once or as a draft takes them, any count accepted in any row."""
    target, source = model(kind, seed, mode), random.Random(prefilled)
    texts = [[source.randrange(61) for _ in range(120)] for _ in range(batch)]
    cache, singles = target.new_cache(batch, 6), [target.new_cache(1, 1) for _ in texts]
    done, start = [min(prefilled + row, 70) for row in range(batch)], [0] * batch
    for row, text in enumerate(texts):
        target.prefill(text[: done[row]], cache, row)
        target.prefill(text[: done[row]], singles[row], 0)
    for count, by_token, choice in rounds:
        window = torch.tensor([text[at : at + count] for text, at in zip(texts, done, strict=True)])
        if by_token and count > 2:
            logits = [target.verify(window[:, :2], cache, slots(*start))]
            for slot in range(2, count):
                logits.append(target.verify(window[:, slot : slot + 1], cache, slots(*[slot - 1] * batch), slot))
            logits = torch.cat(logits, 1)
        else:
            logits = target.verify(window, cache, slots(*start))
        start = [(choice + 7 * row) % count for row in range(batch)]
        for row in range(batch):
            for t in range(start[row] + 1):
                alone = target.verify(window[row : row + 1, t : t + 1], singles[row], slots(0))
                assert_bitwise_equal(logits[row, t], alone[0, 0], f"row {row}, token {t}")
            done[row] += start[row] + 1


def test_memory_of_both_ways():
    """A state per slot, or one state and the inputs."""
    for kind, inputs in (("mamba1", 2 * 48 + 5), ("mamba2", 48 + 6 + 18)):
        per_slot, replayed = (model(kind, mode=mode).new_cache(3, 7)[0] for mode in MODES)
        assert isinstance(per_slot, MambaCache) and per_slot.inputs is None
        state = per_slot.states[0, 0].numel()
        assert per_slot.states.numel() == 3 * 7 * state and replayed.states.numel() == 3 * state
        assert sum(kept.numel() for kept in vars(replayed.inputs).values()) == 3 * 7 * inputs


@kinds
def test_a_batch_of_scripted_rows(prompt, kind):
    """Rows that accept their own counts, one of them far longer than the others."""
    target, prompts = model(kind), [prompt(2, seed=8), prompt(150, seed=8), prompt(33, seed=8)]
    texts = [plain(target, p, 24)[0] for p in prompts]
    for rate in (0.0, 0.6, 1.0):
        draft = ScriptedDraft(texts, target.vocab_size, agree_at_rate(rate, 3))
        check(target, draft, prompts, 5, tokens=24)
