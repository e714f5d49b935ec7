"""Guarantees 1, 3 and 5 for every architecture, both ways of going back and every kind of draft."""

import dataclasses
import functools
import itertools

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode.lookahead import FixedLookahead
from speculative_mamba.layers.block import Block
from speculative_mamba.layers.cache import CAPACITY_STEP
from speculative_mamba.ops.backend import extension
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import ARCHITECTURES, random_model, tiny_architecture
from speculative_mamba.testing.tolerance import assert_bitwise_equal

CASES = [
    pytest.param(kind, seed, mode, id=f"{kind} {seed} {mode}")
    for kind in ARCHITECTURES
    for seed in (0, 1)
    for mode in (("snapshots", "replay") if kind != "llama" else ("snapshots",))
]
SOME = [case for case in CASES if case.values[1] == ARCHITECTURES.index(case.values[0]) % 2]  # one seed of each kind
HYBRIDS = ("mamba2attn", "mamba-in-llama", "mamba2-in-llama", "granite-hybrid", "parallel", "lfm2", "experts")
DRAFTS = ("equal", "near, snapshots", "near, replay", "random, snapshots", "random, replay", "llama", "ngram")
LENGTHS = (1, 4, CAPACITY_STEP - 5)  # the last one's attention cache grows within ten tokens
TOKENS = 10
PLAIN = {"stop_token_ids": (), "output_logits": True}


@pytest.fixture(scope="module")
def prompts(prompt):
    return [prompt(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def plain(plain):
    """Of the model with a state in every slot, whose text one that replays must give too."""
    twins = {}

    def decode(model, prompt, tokens):
        weights = id(model.blocks), id(model.head), model.state_dtype
        twin = twins.setdefault(weights, dataclasses.replace(model, rollback="snapshots"))
        return plain(twin, prompt, tokens)

    return decode


def draft_of(drafts, name):
    return drafts.get(name, name)


def check(result, target, prompts, plain, tokens=TOKENS):
    """Every row against plain decoding of that row alone."""
    for row, given in enumerate(prompts):
        sequence, logits = plain(target, given, tokens)
        assert result.sequences[row].tolist() == sequence, f"tokens of row {row}"
        assert_bitwise_equal(result.logits[row], logits, f"logits of row {row}")


@pytest.mark.parametrize(
    ("kind", "seed", "mode", "lookahead"),
    [
        pytest.param(kind, (ARCHITECTURES.index(kind) + turn) % 2, mode, lookahead, id=f"{kind} {mode} {lookahead}")
        for kind, mode in dict.fromkeys((case.values[0], case.values[2]) for case in CASES)
        for turn, lookahead in enumerate((1, 4, 7))
    ],
)
def test_any_draft_gives_the_plain_text(family, plain, prompts, kind, seed, mode, lookahead):
    """The seeds take turns."""
    target, drafts = family(kind, seed, mode)
    rates = {}
    for name in DRAFTS:
        result = sm.generate(
            target, prompts, draft=draft_of(drafts, name), lookahead=lookahead, max_new_tokens=TOKENS, **PLAIN
        )
        check(result, target, prompts, plain)
        rates[name] = result.stats.acceptance_rate
    assert rates["equal"] == 1 and 0 < rates["near, snapshots"] == rates["near, replay"] < 1


DTYPES = {  # of weights and of states
    "cpu": ((torch.bfloat16, torch.float32), ("q8_0", torch.bfloat16), (torch.float32, torch.float16)),
    "reference": ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), ("q4_0", torch.bfloat16)),
}


@pytest.mark.parametrize(
    ("kind", "seed", "mode", "dtype", "state_dtype", "backend"),
    [
        pytest.param(*case.values, *dtypes, backend, id="-".join([case.id, *map(str, dtypes), backend]))
        for backend in DTYPES
        for turn, dtypes in enumerate(DTYPES[backend])
        for at, case in enumerate(SOME)
        if backend == "cpu" or (at + turn) % 3 == 0
    ],
)
def test_dtypes_and_backends(family, plain, prompts, kind, seed, mode, dtype, state_dtype, backend):
    """What a layer keeps is rounded to state_dtype after every token, an attention's entries too. On the reference,
    which is slow, architectures and their modes take turns with the dtypes."""
    target, drafts = family(kind, seed, mode, dtype, state_dtype, backend)
    for layer in target.new_cache(1, 2):
        kept = [getattr(layer, name) for name in ("keys", "values", "states") if hasattr(layer, name)]
        assert all(tensor.dtype == state_dtype for tensor in kept)
    tokens = TOKENS if backend == "cpu" else 7
    for name in ("near, replay", "llama"):
        result = sm.generate(target, prompts, draft=drafts[name], lookahead=3, max_new_tokens=tokens, **PLAIN)
        check(result, target, prompts, plain, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, "q8_0"], ids=str)
@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_against_a_forward_pass_over_the_whole_text(family, prompts, kind, seed, mode, dtype):
    """Nothing of the ops or the loop is in the oracle: float64, from scratch."""
    target, drafts = family(kind, seed, mode, dtype)
    result = sm.generate(target, prompts, draft=drafts["near"], lookahead=3, max_new_tokens=TOKENS, **PLAIN)
    for given, text, logits in zip(prompts, result.sequences, result.logits, strict=True):
        exact = oracle.full_forward(target, text.tolist()[:-1])[len(given) - 1 :]
        assert text[len(given) :].tolist() == exact.argmax(-1).tolist()
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(("kind", "seed", "mode"), CASES)
def test_coupled_text_is_the_plain_one(family, prompts, kind, seed, mode):
    target, drafts = family(kind, seed, mode)
    sampling = sm.SamplingParams(temperature=0.9, top_p=0.95, seed=4)
    options = {"sampling": sampling, "acceptance": "coupled", "max_new_tokens": TOKENS, **PLAIN}
    alone = [sm.generate(target, [given], **options) for given in prompts[:1]]
    expected = sm.generate(target, prompts, **options)
    assert torch.equal(alone[0].sequences[0], expected.sequences[0])
    for lookahead, name in ((1, "near, replay"), (3, "llama"), (4, "random, replay"), (7, "equal"), (5, "ngram")):
        result = sm.generate(target, prompts, draft=draft_of(drafts, name), lookahead=lookahead, **options)
        for row in range(len(prompts)):
            assert torch.equal(result.sequences[row], expected.sequences[row]), name
            assert_bitwise_equal(result.logits[row], expected.logits[row], name)


@pytest.mark.parametrize("name", ["near, replay", "llama", "ngram"])
@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_rejection_gives_the_models_own_logits(family, prompts, kind, seed, mode, name):
    """Of whatever text it draws: those of the model over the whole text, one token at a time."""
    target, drafts = family(kind, seed, mode)
    sampling = sm.SamplingParams(temperature=0.8, seed=2)
    result = sm.generate(
        target, prompts, draft=draft_of(drafts, name), lookahead=4, max_new_tokens=TOKENS, sampling=sampling, **PLAIN
    )
    for given, text, logits in zip(prompts, result.sequences, result.logits, strict=True):
        assert len(text) == len(given) + TOKENS
        cache, start = target.new_cache(1, 1), torch.zeros(1, dtype=torch.int32)
        steps = torch.cat([target.verify(token.view(1, 1), cache, start)[0] for token in text[:-1]])
        assert_bitwise_equal(logits, steps[len(given) - 1 :])


@pytest.mark.parametrize(
    ("kind", "seed", "mode", "name"),
    [
        pytest.param(kind, (ARCHITECTURES.index(kind) + turn) % 2, mode, name, id=f"{kind} {mode} {name}")
        for kind, mode in dict.fromkeys((case.values[0], case.values[2]) for case in CASES)
        for turn, name in enumerate(("near, snapshots", "near, replay", "llama", None))
    ],
)
def test_two_calls_equal_one(family, plain, prompts, assert_states_fit, kind, seed, mode, name):
    """The first ends inside blocks, row by row; the second has another lookahead, and a copy goes elsewhere first. The
    seeds take turns."""
    target, drafts = family(kind, seed, mode)
    texts = [plain(target, given, 2 * TOKENS) for given in prompts]
    stops = tuple({texts[row][0][LENGTHS[row] + at] for row, at in ((0, 2), (2, 5))})
    cache, draft = sm.GenerationCache(), drafts.get(name)
    first = sm.generate(
        target, prompts, draft=draft, lookahead=5, max_new_tokens=8, stop_token_ids=stops, output_logits=True,
        cache=cache,
    )  # fmt: skip
    assert "eos" in first.finish_reasons
    assert_states_fit(cache)
    aside, begun = cache.copy(), [list(text) for text in cache.sequences]
    elsewhere = [[*text, 5, 6] for text in begun]
    other = sm.generate(target, elsewhere, draft=draft, lookahead=2, max_new_tokens=3, cache=aside, **PLAIN)
    check(other, target, elsewhere, plain, 3)
    assert cache.sequences == begun
    assert_states_fit(cache)
    second = sm.generate(target, begun, draft=draft, lookahead=3, max_new_tokens=TOKENS, cache=cache, **PLAIN)
    assert_states_fit(cache)
    for row, (sequence, logits) in enumerate(texts):
        count = len(first.logits[row]) + TOKENS
        assert second.sequences[row].tolist() == sequence[: LENGTHS[row] + count]
        assert_bitwise_equal(torch.cat([first.logits[row], second.logits[row]]), logits[:count], f"row {row}")


@pytest.mark.parametrize("pattern", [(0, 3), (2, 0, 0, 4)], ids=str)
@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_a_draft_catches_up_after_rounds_without_it(
    family, plain, prompts, assert_states_fit, monkeypatch, kind, seed, mode, pattern
):
    """An equal draft is always right, so a state that lacks a token shows. Calls may end while it is behind."""
    target = family(kind, seed, mode)[0]
    rounds = itertools.cycle(pattern)
    monkeypatch.setattr(FixedLookahead, "next", lambda self: next(rounds))
    cache, parts = sm.GenerationCache(), []
    for count in (4, 1, 2 * TOKENS - 5):
        texts = cache.sequences or prompts
        parts.append(sm.generate(target, texts, draft=target, lookahead=5, max_new_tokens=count, cache=cache, **PLAIN))
        assert parts[-1].stats.accepted == parts[-1].stats.tested
        assert_states_fit(cache)
    monkeypatch.undo()
    assert parts[-1].stats.accepted > 15
    for row, given in enumerate(prompts):
        sequence, logits = plain(target, given, 2 * TOKENS)
        assert parts[-1].sequences[row].tolist() == sequence
        assert_bitwise_equal(torch.cat([part.logits[row] for part in parts]), logits)


@functools.cache
def wide(kind, mode):
    """A model large enough to be shared out."""
    config = tiny_architecture(kind)
    return dataclasses.replace(random_model(dataclasses.replace(config, vocab_size=1500)), rollback=mode)


def run_of(model):
    prompts = [[1], list(range(70))]
    return sm.generate(model, prompts, draft=model, lookahead=3, max_new_tokens=6, **PLAIN).logits


@pytest.mark.parametrize("mode", ["snapshots", "replay"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_number_of_threads(threads, kind, mode):
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(run_of(wide(kind, mode)))
    for other in runs[1:]:
        for row in range(2):
            assert_bitwise_equal(other[row], runs[0][row])


@pytest.mark.parametrize("mode", ["snapshots", "replay"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_instruction_sets_with_a_fused_multiply_add(kind, mode):
    module = extension()[0]
    isas = [isa for isa in module.available_isas() if isa != "baseline"] if module else []
    if len(isas) < 2:
        pytest.skip(f"needs two instruction sets with a fused multiply-add, this machine has {isas}")
    before, runs = module.isa(), []
    try:
        for isa in isas:
            module.select_isa(isa)
            runs.append(run_of(wide(kind, mode)))
    finally:
        module.select_isa(before)
    for other in runs[1:]:
        for row in range(2):
            assert_bitwise_equal(other[row], runs[0][row])


@pytest.mark.parametrize("lookahead", [2, 7])
@pytest.mark.parametrize("kind", ["llama", *HYBRIDS])
def test_rows_of_very_different_length(family, plain, prompt, kind, lookahead):
    """Prompts on both sides of a capacity, and texts that outgrow another one while they are written."""
    target, drafts = family(kind, 1, "replay")
    prompts = [prompt(length) for length in (1, 3 * CAPACITY_STEP - 9, CAPACITY_STEP - 1, CAPACITY_STEP, 2)]
    for name in ("near", "llama"):
        result = sm.generate(target, prompts, draft=drafts[name], lookahead=lookahead, max_new_tokens=24, **PLAIN)
        check(result, target, prompts, plain, 24)


@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_several_end_of_text_tokens(family, plain, prompts, assert_states_fit, kind, seed, mode):
    """A model's own tuple of them: a row ends with the first it comes to."""
    target, drafts = family(kind, seed, mode)
    texts = [plain(target, given, TOKENS) for given in prompts]
    ends = texts[0][0][LENGTHS[0] + 3], texts[2][0][LENGTHS[2] + 5]
    ending = dataclasses.replace(target, config=dataclasses.replace(target.config, eos_token_id=ends))
    cache = sm.GenerationCache()
    result = sm.generate(
        ending, prompts, draft=drafts["equal"], lookahead=6, max_new_tokens=TOKENS, output_logits=True, cache=cache
    )
    assert result.finish_reasons[0] == result.finish_reasons[2] == "eos"
    for row, (sequence, logits) in enumerate(texts):
        new = sequence[LENGTHS[row] :]
        count = min([new.index(end) + 1 for end in ends if end in new], default=TOKENS)
        assert result.sequences[row].tolist() == sequence[: LENGTHS[row] + count]
        assert_bitwise_equal(result.logits[row], logits[:count])
    assert_states_fit(cache)


@pytest.mark.parametrize("victim", ["target", "draft"])
@pytest.mark.parametrize(("kind", "seed", "mode"), SOME)
def test_an_interrupted_run_goes_on_exactly(
    family, plain, prompts, assert_states_fit, monkeypatch, kind, seed, mode, victim
):
    """Ctrl-C before the last block of a step, when the layers before it have already written their caches."""
    target, drafts = family(kind, seed, mode)
    draft = drafts["near"]
    draft = dataclasses.replace(draft, blocks=[dataclasses.replace(block) for block in draft.blocks])
    last, whole = (target if victim == "target" else draft).blocks[-1], Block.__call__
    options = {"draft": draft, "stop_token_ids": ()}
    texts = [plain(target, given, 2 * TOKENS) for given in prompts]
    interrupted = 0
    for call in range(0, 8, 2):
        cache, count = sm.GenerationCache(), -1
        sm.generate(target, prompts, lookahead=3, max_new_tokens=3, cache=cache, **options)

        def counted(self, *arguments, call=call):
            nonlocal count
            count += self is last
            if self is last and count == call:
                raise KeyboardInterrupt
            return whole(self, *arguments)

        monkeypatch.setattr(Block, "__call__", counted)
        try:
            sm.generate(target, cache.sequences, lookahead=4, max_new_tokens=TOKENS, cache=cache, **options)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            monkeypatch.setattr(Block, "__call__", whole)
        assert_states_fit(cache, complete=False)
        done = [len(text) - length for text, length in zip(cache.sequences, LENGTHS, strict=True)]
        result = sm.generate(
            target, cache.sequences, lookahead=2, max_new_tokens=5, output_logits=True, cache=cache, **options
        )
        for row, (sequence, logits) in enumerate(texts):
            assert result.sequences[row].tolist() == sequence[: LENGTHS[row] + done[row] + 5]
            assert_bitwise_equal(result.logits[row], logits[done[row] : done[row] + 5])
        assert_states_fit(cache)
    assert interrupted
