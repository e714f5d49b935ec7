"""The state after a call is the state of its text: several calls with a cache equal one longer call, bit for bit."""

import copy
import dataclasses
import gc
import pickle
import random
import weakref

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode.executors import EagerExecutor
from speculative_mamba.models.runner import ModelRunner
from speculative_mamba.testing.models import ARCHITECTURES, TableModel, random_model, tiny_config
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate
from speculative_mamba.testing.tolerance import assert_bitwise_equal

SAMPLING = {
    "greedy": sm.SamplingParams(),
    "greedy, penalty": sm.SamplingParams(repetition_penalty=1.4),
    "sampled": sm.SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=7),
    "sampled, penalty": sm.SamplingParams(temperature=1.1, min_p=0.01, repetition_penalty=1.3, seed=8),
}
DRAFTS = ("none", "model", "scripted")
LENGTHS = (1, 2, 3, 9, 66)
OPTIONS = {"acceptance": "coupled", "stop_token_ids": (), "output_logits": True}


def make_draft(kind, models, texts):
    """A scripted draft knows the texts and is right in two of three places."""
    if kind == "scripted":
        return ScriptedDraft(texts, models.target.vocab_size, lambda row, at: (row + at) % 3 != 0)
    return models.drafts["near"] if kind == "model" else None


def lists(result):
    return [sequence.tolist() for sequence in result.sequences]


def check_parts(parts, whole):
    """The calls' logits, one after the other, and the last one's text."""
    assert lists(parts[-1]) == lists(whole)
    for row, logits in enumerate(whole.logits):
        joined = torch.cat([part.logits[row] for part in parts])
        assert_bitwise_equal(joined, logits, f"logits of row {row}")


@pytest.fixture(scope="module")
def whole(pair, prompt):
    """whole(sampling, tokens, dtype, backend): one call without a draft, for prompts of LENGTHS."""
    known = {}

    def decode(sampling, tokens, dtype=torch.float32, backend="cpu"):
        key = sampling, tokens, dtype, backend
        if key not in known:
            prompts = [prompt(length) for length in LENGTHS]
            known[key] = sm.generate(
                pair(dtype, backend).target, prompts, sampling=SAMPLING[sampling], max_new_tokens=tokens, **OPTIONS
            )
        return known[key]

    return decode


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("first", DRAFTS)
@pytest.mark.parametrize("second", DRAFTS)
def test_two_calls_equal_one(pair, prompt, whole, assert_states_fit, sampling, first, second):
    """Catches: slot `accepted` saved instead of the committed one; rows that have ended saved too late; a draft's
    state one token off.
    """
    models, expected = pair(), whole(sampling, 12)
    for budget, lookaheads in ((1, (3, 4)), (5, (6, 2)), (8, (2, 5))):
        cache, prompts, parts = sm.GenerationCache(), [prompt(length) for length in LENGTHS], []
        for kind, tokens, lookahead in zip((first, second), (budget, 12 - budget), lookaheads, strict=True):
            draft = make_draft(kind, models, lists(expected))
            result = sm.generate(
                models.target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens,
                sampling=SAMPLING[sampling], cache=cache, **OPTIONS,
            )  # fmt: skip
            parts.append(result)
            assert result.cache is cache and cache.sequences == lists(result)
            assert_states_fit(cache)
            prompts = cache.sequences
        check_parts(parts, expected)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "cpu"), (torch.float32, "reference")], ids=str)
@pytest.mark.parametrize("sampling", ["greedy", "sampled, penalty"])
def test_a_chain_of_calls_in_other_dtypes_and_backends(
    pair, prompt, whole, assert_states_fit, dtype, backend, sampling
):
    models, expected = pair(dtype, backend), whole(sampling, 13, dtype, backend)
    cache, prompts, parts = sm.GenerationCache(), [prompt(length) for length in LENGTHS], []
    for kind, tokens, lookahead in (("model", 4, 4), ("none", 1, 1), ("model", 5, 2), ("scripted", 3, 7)):
        draft = make_draft(kind, models, lists(expected))
        result = sm.generate(
            models.target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens,
            sampling=SAMPLING[sampling], cache=cache, **OPTIONS,
        )  # fmt: skip
        parts.append(result)
        prompts = cache.sequences
        assert_states_fit(cache)
    check_parts(parts, expected)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_of_other_dtypes(pair, prompt, assert_states_fit, state_dtype):
    models = pair()
    target, draft = (
        dataclasses.replace(m, state_dtype=state_dtype) for m in (models.target, models.drafts["random"])
    )  # fmt: skip
    prompts = [prompt(length) for length in LENGTHS]
    expected = sm.generate(target, prompts, max_new_tokens=12, **OPTIONS)
    cache, parts = sm.GenerationCache(), []
    for tokens, proposer in ((4, draft), (3, None), (5, draft)):
        result = sm.generate(
            target, cache.sequences or prompts, draft=proposer, max_new_tokens=tokens, cache=cache, **OPTIONS
        )
        parts.append(result)
        assert_states_fit(cache)
        assert cache.target_states[0].layers[0][0].dtype == state_dtype
    check_parts(parts, expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_user_may_speak_in_between(pair, prompt, assert_states_fit, seed):
    """Tokens appended to the cached text, another number in every row: as a fresh call on the whole text."""
    source, models = random.Random(seed), pair()
    sampling = SAMPLING[list(SAMPLING)[seed]]
    cache, prompts = sm.GenerationCache(), [prompt(length) for length in LENGTHS]
    for turn in range(3):
        options = {**OPTIONS, "sampling": sampling, "max_new_tokens": source.randint(1, 6)}
        alone = sm.generate(models.target, prompts, **options)
        draft = make_draft(source.choice(DRAFTS), models, lists(alone))
        result = sm.generate(models.target, prompts, draft=draft, cache=cache, lookahead=3, **options)
        check_parts([result], alone)
        assert_states_fit(cache)
        prompts = [text + prompt(row if turn else 70 * (row % 2), seed) for row, text in enumerate(cache.sequences)]


@pytest.mark.parametrize("draft", ["near", "equal", None])
@pytest.mark.parametrize("lookahead", [2, 5, 9])
def test_rows_that_end_in_different_rounds(pair, plain, prompt, assert_states_fit, draft, lookahead):
    """Ends of text inside accepted blocks and the budget; each row goes on from where it ended."""
    models = pair()
    prompts = [prompt(length) for length in LENGTHS]
    texts = [plain(models.target, p, 40) for p in prompts]
    stops = {texts[row][0][len(prompts[row]) + at] for row, at in ((0, 1), (1, 6), (2, 9))}
    cache, options = sm.GenerationCache(), {"draft": models.drafts.get(draft), "lookahead": lookahead}
    first = sm.generate(
        models.target, prompts, max_new_tokens=16, stop_token_ids=tuple(stops), output_logits=True, cache=cache,
        **options,
    )  # fmt: skip
    assert set(first.finish_reasons) == {"eos", "length"} or len({len(logits) for logits in first.logits}) > 2
    assert_states_fit(cache)
    second = sm.generate(
        models.target, cache.sequences, max_new_tokens=12, stop_token_ids=(), output_logits=True, cache=cache, **options
    )
    assert_states_fit(cache)
    for row, (tokens, logits) in enumerate(texts):
        count = len(first.logits[row]) + 12
        assert second.sequences[row].tolist() == tokens[: len(prompts[row]) + count]
        assert_bitwise_equal(torch.cat([first.logits[row], second.logits[row]]), logits[:count], f"row {row}")


def test_a_stop_string_inside_a_block(pair, plain, prompt, chain, assert_states_fit):
    models = pair()
    tokenizer = chain([bytes([48 + token]) for token in range(61)]).tokenizer
    target = dataclasses.replace(models.target, load_tokenizer=lambda: tokenizer)
    prompts = [prompt(length) for length in (2, 9)]
    texts = [plain(models.target, p, 20)[0] for p in prompts]
    stop = tokenizer.decode(texts[0][2 + 2 : 2 + 5])
    cache = sm.GenerationCache()
    options = {"draft": models.drafts["equal"], "lookahead": 8, "stop_token_ids": (), "cache": cache}
    first = sm.generate(target, prompts, max_new_tokens=8, stop_strings=[stop], **options)
    assert first.finish_reasons[0] == "stop" and len(first.sequences[0]) == 2 + 5
    assert_states_fit(cache)
    second = sm.generate(target, cache.sequences, max_new_tokens=10, **options)
    for row, text in enumerate(texts):
        assert second.sequences[row].tolist() == text[: len(first.sequences[row]) + 10]
    assert_states_fit(cache)


def test_copies_do_not_influence_one_another(pair, prompt, whole, assert_states_fit):
    """Catches: copies that share states or texts."""
    models, expected = pair(), whole("greedy", 12)
    cache, options = sm.GenerationCache(), {"draft": models.drafts["near"], **OPTIONS}
    sm.generate(models.target, [prompt(length) for length in LENGTHS], max_new_tokens=5, cache=cache, **options)
    copies = [cache.copy(), cache.copy()]
    texts, seeds = [list(text) for text in cache.sequences], prompt(5)
    asides = [text + seeds for text in texts]
    aside = sm.generate(models.target, asides, max_new_tokens=6, cache=copies[0], **options)
    assert lists(aside) == lists(sm.generate(models.target, asides, max_new_tokens=6, **OPTIONS))
    for unused in (cache, copies[1]):
        assert unused.sequences == texts
        assert_states_fit(unused)
    for continued in (copies[1], cache):
        result = sm.generate(models.target, texts, max_new_tokens=7, cache=continued, **options)
        assert lists(result) == lists(expected)
    assert copies[0].sequences == lists(aside)
    assert_states_fit(copies[0])
    copy, before = cache.copy(), [list(text) for text in cache.sequences]
    copy.sequences[0].append(1)
    copy.sequences.pop()
    assert cache.sequences == before


def test_budget_zero(pair, prompt, whole, assert_states_fit):
    target, expected, cache = pair().target, whole("greedy", 12), sm.GenerationCache()
    prompts = [prompt(length) for length in LENGTHS]
    for budget in (0, 5, 0, 7):
        result = sm.generate(target, cache.sequences or prompts, max_new_tokens=budget, cache=cache, **OPTIONS)
        assert cache.sequences == lists(result)
        assert_states_fit(cache, complete=bool(result.stats.tokens))
    assert lists(result) == lists(expected)


def test_prompts_of_budget_zero_may_be_longer_than_the_states(pair, prompt, assert_states_fit):
    target, cache = pair().target, sm.GenerationCache()
    sm.generate(target, [prompt(4)], max_new_tokens=3, cache=cache, stop_token_ids=())
    longer = [cache.sequences[0] + prompt(9)]
    sm.generate(target, longer, max_new_tokens=0, cache=cache)
    assert cache.sequences == longer
    assert_states_fit(cache, complete=False)
    continued = sm.generate(target, longer, max_new_tokens=6, cache=cache, **OPTIONS)
    check_parts([continued], sm.generate(target, longer, max_new_tokens=6, **OPTIONS))


def test_a_cached_text_is_not_read_again(pair, prompt, monkeypatch):
    models = pair()
    cache, options = sm.GenerationCache(), {"draft": models.drafts["near"], "stop_token_ids": ()}
    sm.generate(models.target, [prompt(900)], max_new_tokens=4, cache=cache, **options)
    whole, read = ModelRunner.read, []

    def watch(self, row, tokens):
        read.append(len(tokens))
        return whole(self, row, tokens)

    monkeypatch.setattr(ModelRunner, "read", watch)
    sm.generate(models.target, cache.sequences, max_new_tokens=4, cache=cache, **options)
    assert len(read) == 2 and sum(read) < 10


def test_what_was_given_is_not_changed(pair, prompt):
    target, cache = pair().target, sm.GenerationCache()
    rows, ids = [prompt(3), prompt(7)], torch.tensor([prompt(5)])
    copies, before = [list(row) for row in rows], ids.clone()
    sm.generate(target, rows, max_new_tokens=4, cache=cache)
    held = cache.sequences
    texts = [list(text) for text in held]
    result = sm.generate(target, held, max_new_tokens=4, cache=cache)
    sm.generate(target, ids, max_new_tokens=4, cache=sm.GenerationCache())
    assert rows == copies and held == texts and torch.equal(ids, before)
    result.sequences[0][0] = 60 - result.sequences[0][0]
    assert cache.sequences[0][:3] == rows[0], "the result's tensors are copies"


def test_a_draft_of_another_kind_starts_anew(pair, prompt, whole, assert_states_fit):
    """A scripted draft between two calls of a model, and two models in turn."""
    models, expected = pair(), whole("greedy", 12)
    scripted = ScriptedDraft(lists(expected), 61, agree_at_rate(0.5))
    cache, prompts = sm.GenerationCache(), [prompt(length) for length in LENGTHS]
    for draft in (models.drafts["near"], scripted, models.drafts["random"], models.drafts["near"]):
        result = sm.generate(models.target, prompts, draft=draft, max_new_tokens=3, cache=cache, **OPTIONS)
        prompts = cache.sequences
        assert_states_fit(cache)
    assert lists(result) == lists(expected)


class Summing(sm.Draft):
    """Its state is the sum of what it has read; it proposes the last token again."""

    stateful = True

    def __init__(self):
        self.vocab_size, self.went_on = 61, []

    def allocate(self, batch, lookahead, sampler, *, captured):
        return self

    def prefill(self, row, text, state=None):
        assert state is None or int(state.layers[0][0]) == sum(state.tokens)
        self.went_on.append(state is not None)

    def propose(self, state, lookahead):
        return sm.Proposal(state.last[:, 1:].repeat(1, lookahead))

    def snapshot(self, row, slot, text):
        return sm.RowState(text[:-2], [(torch.tensor(sum(text[:-2])),)])


class SummingToo(Summing):
    """Its states are nobody else's either."""


def test_a_draft_without_a_model_goes_on_from_its_own_states_alone(pair, prompt, whole):
    """Catches: states of a model, or of another class, handed to a draft that has none; and the other way round."""
    models, expected = pair(), whole("greedy", 12)
    cache, prompts, mine = sm.GenerationCache(), [prompt(length) for length in LENGTHS], Summing()
    for draft in (models.drafts["near"], mine, mine, SummingToo(), models.drafts["near"], mine):
        result = sm.generate(models.target, prompts, draft=draft, max_new_tokens=2, cache=cache, **OPTIONS)
        prompts = cache.sequences
        if isinstance(draft, SummingToo):
            assert draft.went_on == [False] * len(LENGTHS)
    assert lists(result) == lists(expected)
    assert mine.went_on == [went_on for went_on in (False, True, False) for _ in LENGTHS]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda target, texts: (random_model(tiny_config()), texts), "another model"),
        (lambda target, texts: (target, texts[:1]), "holds 2 rows"),
        (lambda target, texts: (target, [*texts, [1]]), "holds 2 rows"),
        (lambda target, texts: (target, [texts[0], texts[1][:-1]]), "row 1"),
        (lambda target, texts: (target, [[60 - texts[0][0], *texts[0][1:]], texts[1]]), "row 0"),
        (lambda target, texts: (target, texts[::-1]), "row 0"),
    ],
    ids=["model", "fewer rows", "more rows", "shorter", "other token", "swapped"],
)
def test_refusals_lose_nothing(pair, prompt, plain, assert_states_fit, change, words):
    models, cache = pair(), sm.GenerationCache()
    options = {"draft": models.drafts["near"], "max_new_tokens": 5, "stop_token_ids": (), "cache": cache}
    sm.generate(models.target, [prompt(3), prompt(8)], **options)
    other, prompts = change(models.target, [list(text) for text in cache.sequences])
    with pytest.raises(ValueError, match=words) as caught:
        sm.generate(other, prompts, **options)
    assert "\n" not in str(caught.value)
    assert_states_fit(cache)
    result = sm.generate(models.target, cache.sequences, **options)
    for row, length in enumerate((3, 8)):
        assert result.sequences[row].tolist() == plain(models.target, prompt(length), 10)[0]


@pytest.mark.parametrize("bad", [{"lookahead": 0}, {"max_new_tokens": -1}, {"acceptance": "?"}, {"stop_strings": "a"}])
def test_a_refused_argument_loses_nothing(pair, prompt, plain, bad):
    target, cache = pair().target, sm.GenerationCache()
    sm.generate(target, [prompt(4)], max_new_tokens=5, stop_token_ids=(), cache=cache)
    with pytest.raises(ValueError):
        sm.generate(target, [[*cache.sequences[0], 1]], cache=cache, **bad)
    result = sm.generate(target, cache.sequences, max_new_tokens=5, stop_token_ids=(), cache=cache)
    assert result.sequences[0].tolist() == plain(target, prompt(4), 10)[0]


EDITS = {
    "cut": lambda texts: texts[0].__delitem__(slice(-3, None)),
    "cut by one": lambda texts: texts[0].pop(),
    "cut to one token": lambda texts: texts[1].__delitem__(slice(1, None)),
    "changed": lambda texts: texts[0].__setitem__(2, 60 - texts[0][2]),
    "turned round": lambda texts: texts.reverse(),
    "one row less": lambda texts: texts.pop(),
    "one row more": lambda texts: texts.append([1]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_text_that_was_edited_in_place_is_refused(family, prompt, assert_states_fit, kind, edit):
    """A state knows what it has read; what the list of texts says by then does not matter."""
    target, drafts = family(kind)
    cache, options = sm.GenerationCache(), {"draft": drafts["near"], "stop_token_ids": ()}
    sm.generate(target, [prompt(5), prompt(9)], max_new_tokens=7, cache=cache, **options)
    whole = [list(text) for text in cache.sequences]
    EDITS[edit](cache.sequences)
    with pytest.raises(ValueError, match="row") as caught:
        sm.generate(target, cache.sequences, cache=cache, **options)
    assert "\n" not in str(caught.value)
    cache.sequences = whole
    result = sm.generate(target, whole, max_new_tokens=4, cache=cache, output_logits=True, **options)
    check_parts([result], sm.generate(target, whole, max_new_tokens=4, output_logits=True, stop_token_ids=()))
    assert_states_fit(cache)


def test_an_edit_behind_what_was_read_is_the_users_word(pair, prompt):
    target, cache = pair().target, sm.GenerationCache()
    sm.generate(target, [prompt(5)], max_new_tokens=7, cache=cache, stop_token_ids=())
    cache.sequences[0][-1] = 60 - cache.sequences[0][-1]
    cache.sequences[0] += [3, 4]
    text = [list(cache.sequences[0])]
    result = sm.generate(target, cache.sequences, max_new_tokens=4, cache=cache, **OPTIONS)
    check_parts([result], sm.generate(target, text, max_new_tokens=4, **OPTIONS))


def test_what_a_callback_does_to_the_texts_of_a_cache_is_its_own(pair, prompt, plain):
    cache = sm.GenerationCache()
    result = sm.generate(
        pair().target, [prompt(5)], draft=pair().target, max_new_tokens=9, stop_token_ids=(), cache=cache,
        on_token=lambda row, token: cache.sequences[row].clear(),
    )  # fmt: skip
    assert result.sequences[0].tolist() == cache.sequences[0] == plain(pair().target, prompt(5), 9)[0]


def same_again(model):
    """A model of the same weights, as if it had been loaded again."""
    return dataclasses.replace(model, head=model.head.clone(), norm_weight=model.norm_weight.clone())


@pytest.mark.parametrize(
    "again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
@pytest.mark.parametrize("draft", ["near", "ngram", None])
def test_a_result_can_be_pickled_and_gone_on_from_elsewhere(pair, prompt, plain, assert_states_fit, again, draft):
    """Its models are known by their weights, where they are loaded again."""
    models, given = pair(), [prompt(5), prompt(66)]
    draft = models.drafts.get(draft, draft)
    options = {"draft": draft, "stop_token_ids": ()}
    result = sm.generate(
        models.target, given, max_new_tokens=7, cache=sm.GenerationCache(), output_logits=True, **options
    )
    copied = again(result)
    assert lists(copied) == lists(result) and copied.stats == result.stats
    assert len(pickle.dumps(result)) < 500_000, "no weights"
    for target in (models.target, same_again(models.target)):
        cache = again(copied.cache)
        if draft is models.drafts["near"]:
            options["draft"] = same_again(draft)
        whole = sm.generate(target, cache.sequences, max_new_tokens=5, cache=cache, **options)
        for row, text in enumerate(lists(whole)):
            assert text == plain(models.target, given[row], 12)[0]
        assert_states_fit(cache)
    other = dataclasses.replace(models.target, norm_weight=models.target.norm_weight * 1.5)
    for changed in (other, dataclasses.replace(models.target, state_dtype=torch.float16)):
        with pytest.raises(ValueError, match="another model"):
            sm.generate(changed, copied.cache.sequences, cache=copied.cache)


def test_a_result_does_not_hold_the_models(prompt):
    target, draft = random_model(tiny_config()), random_model(tiny_config(), seed=1)
    held = [weakref.ref(target), weakref.ref(draft)]
    result = sm.generate(target, [prompt(3)], draft=draft, max_new_tokens=5, cache=sm.GenerationCache())
    del target, draft
    gc.collect()
    assert [model() for model in held] == [None, None]
    assert result.cache.target is result.cache.draft is None


def test_an_executor_does_not_hold_what_its_last_call_was_given(pair, prompt):
    executor, cache = RecordingExecutor(), sm.GenerationCache()
    held = weakref.ref(cache)
    sm.generate(pair().target, [prompt(3)], max_new_tokens=3, cache=cache, executor=executor)
    del cache
    gc.collect()
    assert held() is None and executor.num_captures


class Keeping:
    """A drafter that keeps the sampler that it is given."""

    vocab_size = 11

    def begin(self, prompts, lookahead, sampler):
        self.sampler = sampler

    def propose(self, rows, accepted, lookahead):
        return torch.ones(len(rows), 1, dtype=torch.int64), None


@pytest.mark.parametrize(
    "again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_drafters_and_executors_can_be_copied(again):
    """Also after they were used; a copy of an executor has no graphs yet."""
    target = TableModel(torch.eye(11).roll(1, 1) + 0.01)
    graphs = RecordingExecutor(max_captured=3)
    for draft in (sm.NgramDrafter(11, shortest=1), sm.ModelDrafter(target)):
        options = {"draft": draft, "max_new_tokens": 12, "sampling": sm.SamplingParams(temperature=1.0, seed=1)}
        expected = lists(sm.generate(target, [[1, 2, 1]], executor=graphs, **options))
        options["draft"] = again(draft)
        assert lists(sm.generate(target, [[1, 2, 1]], executor=again(graphs), **options)) == expected
        assert lists(sm.generate(target, [[1, 2, 1]], executor=again(EagerExecutor()), **options)) == expected
    assert again(graphs)._max_captured == 3


@pytest.mark.parametrize(
    "again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_drafter_that_keeps_its_sampler_can_be_copied(again):
    target = TableModel(torch.eye(11).roll(1, 1) + 0.01)
    draft, options = Keeping(), {"max_new_tokens": 12, "on_token": lambda row, token: None}
    expected = lists(sm.generate(target, [[1, 2, 1]], draft=draft, **options))
    assert lists(sm.generate(target, [[1, 2, 1]], draft=again(draft), **options)) == expected
