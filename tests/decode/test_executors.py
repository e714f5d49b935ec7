"""Rounds that are replayed, two ahead of the host, give the text, logits and statistics of rounds that are run.

``RecordingExecutor`` replays tapes where ``GraphExecutor`` replays CUDA graphs: what depends on a value that Python
read stays what it was when the tape was made, with all rows left out.
"""

import dataclasses
import gc
import threading
import weakref

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode import executors, loop
from speculative_mamba.decode.executors import EagerExecutor
from speculative_mamba.decode.lookahead import FixedLookahead
from speculative_mamba.testing.models import ARCHITECTURES, TableModel, random_model, tiny_config
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.scripted import CapturableScript, ScriptedDraft, agree_at_rate
from speculative_mamba.testing.tolerance import assert_bitwise_equal

LENGTHS = (1, 2, 9, 66)
COSTS = ("setup_s", "prefill_s", "decode_s", "draft_s", "verify_s", "peak_bytes")
FILTERED = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 3}
SAMPLING = {
    "greedy": {},
    "coupled": {"sampling": sm.SamplingParams(**FILTERED), "acceptance": "coupled"},
    "rejection": {"sampling": sm.SamplingParams(**FILTERED)},
    "penalty": {"sampling": sm.SamplingParams(**FILTERED, repetition_penalty=1.3)},
}


@pytest.fixture
def executor() -> RecordingExecutor:
    return RecordingExecutor()


def outcome(result: sm.GenerationResult) -> tuple:
    """All but times and logits."""
    stats = {name: value for name, value in dataclasses.asdict(result.stats).items() if name not in COSTS}
    return [text.tolist() for text in result.sequences], result.finish_reasons, stats


def assert_same(result: sm.GenerationResult, expected: sm.GenerationResult) -> None:
    assert outcome(result) == outcome(expected)
    for mine, theirs in zip(result.logits or [], expected.logits or [], strict=True):
        assert_bitwise_equal(mine, theirs, "logits")


def both(executor: RecordingExecutor, target: object, prompts: list, **options: object) -> sm.GenerationResult:
    """Runs the same call twice; what the tapes gave."""
    expected = sm.generate(target, prompts, **options)
    result = sm.generate(target, prompts, executor=executor, **options)
    assert_same(result, expected)
    return result


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", ["random", "near", "equal", "ngram", None])
def test_every_lookahead_and_budget(pair, prompt, executor, sampling, draft) -> None:
    """Catches: limits read by Python; states or seed of the call before; left padding in every round."""
    models, prompts = pair(), [prompt(length) for length in LENGTHS]
    chosen = models.drafts.get(draft, draft)
    for turn, lookahead in enumerate((1, 2, 3, 4, 8)) if draft else [(0, 1), (1, 1)]:
        for budget in ((1, 5), (2, 14))[turn % 2]:  # the lookaheads take turns
            both(
                executor, models.target, prompts, draft=chosen, lookahead=lookahead, max_new_tokens=budget,
                stop_token_ids=(), output_logits=True, **SAMPLING[sampling],
            )  # fmt: skip
    assert executor.num_replays > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["snapshots", "replay"])
def test_every_architecture(family, prompt, executor, kind, mode) -> None:
    target, drafts = family(kind, 0, mode)
    for name in ("near", "llama"):
        both(
            executor, target, [prompt(length) for length in LENGTHS], draft=drafts[name], lookahead=3,
            max_new_tokens=11, stop_token_ids=(), output_logits=True,
        )  # fmt: skip


@pytest.mark.parametrize("draft", ["near", "ngram", None])
@pytest.mark.parametrize("batch", [1, 4])
def test_stop_tokens_at_every_place(pair, prompt, plain, executor, draft, batch) -> None:
    """Rows end in different rounds and at different places of a window; what was queued behind changes nothing.

    Catches: stop tokens of the call before.
    """
    models, prompts = pair(), [prompt(length) for length in LENGTHS][-batch:]
    new = {token for given in prompts for token in plain(models.target, given, 14)[0][len(given) :]}
    ended = set()
    for stop in sorted(new):
        result = both(
            executor, models.target, prompts, draft=models.drafts.get(draft, draft), lookahead=4, max_new_tokens=14,
            stop_token_ids=(stop,), output_logits=True,
        )  # fmt: skip
        ended.update(zip(result.finish_reasons, map(len, result.sequences), strict=True))
    assert len(ended) > 3 and executor.num_captures == 1, "stop tokens are data"


@pytest.mark.parametrize("pattern", [(0, 3), (2, 0, 0, 4), (1, 0, 5, 0), (4, 1, 3)], ids=str)
@pytest.mark.parametrize("draft", ["near", "equal", "ngram"])
def test_changing_lookaheads(pair, prompt, executor, monkeypatch, pattern, draft) -> None:
    """Adaptive lookahead does so. A draft model that was left out catches up.

    Catches: the largest K in every round; a draft that catches up before the queue is empty.
    """
    models, given = pair(), [prompt(length) for length in LENGTHS]
    monkeypatch.setattr(FixedLookahead, "__init__", lambda self, most: vars(self).update(all=tuple(range(6)), at=0))

    def next_lookahead(self: FixedLookahead) -> int:
        self.at += 1
        return pattern[self.at % len(pattern)]

    monkeypatch.setattr(FixedLookahead, "next", next_lookahead)
    options = {"draft": models.drafts.get(draft, draft), "lookahead": 5, "max_new_tokens": 31, "stop_token_ids": ()}
    both(executor, models.target, given, **options)
    assert executor.num_captures == 6


def test_auto_lookahead_gives_the_same_text(pair, prompt, executor) -> None:
    models, given = pair(), [prompt(length) for length in LENGTHS]
    options = {"max_new_tokens": 60, "stop_token_ids": ()}
    expected = sm.generate(models.target, given, **options)
    for draft in (models.drafts["near"], models.target, "ngram"):
        result = sm.generate(models.target, given, draft=draft, lookahead="auto", executor=executor, **options)
        assert [a.tolist() for a in result.sequences] == [b.tolist() for b in expected.sequences]


def test_one_capture_serves_prompts_of_any_length_and_any_seed(pair, prompt, executor) -> None:
    models = pair()
    for call, length in enumerate((3, 1, 200, 64, 2)):
        sampling = sm.SamplingParams(temperature=0.8, seed=call)
        both(
            executor, models.target, [prompt(length, seed=call)], draft=models.drafts["near"], lookahead=3,
            max_new_tokens=20 + call, sampling=sampling, stop_token_ids=(call,),
        )  # fmt: skip
    assert executor.num_captures == 1


@pytest.mark.parametrize("draft", ["near", "ngram"])
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_one_capture_serves_every_mix_of_parameters(pair, prompt, executor, acceptance, draft) -> None:
    """Greedy rows, sampled ones, penalties and bias of each row are data."""
    models, given = pair(), [prompt(length) for length in (3, 9, 40)]
    greedy, hot = sm.SamplingParams(), sm.SamplingParams(temperature=1.3, top_p=0.9, seed=5)
    counts = sm.SamplingParams(0.9, frequency_penalty=0.8, presence_penalty=0.4, logit_bias={7: 2.0, 9: -100}, seed=6)
    mixes = greedy, hot, [greedy, hot, counts], [counts, greedy, hot], [sm.SamplingParams(repetition_penalty=1.5)] * 3
    for sampling in mixes:
        both(
            executor, models.target, given, draft=models.drafts.get(draft, draft), lookahead=3, max_new_tokens=20,
            sampling=sampling, acceptance=acceptance, stop_token_ids=(),
        )  # fmt: skip
    assert executor.num_captures == 1


def test_a_cache_that_grows_is_captured_again(family, prompt, executor) -> None:
    """Catches: graphs kept after a cache has moved."""
    target, drafts = family("llama")
    for length in (3, 40, 200, 50):
        both(executor, target, [prompt(length)], draft=drafts["near"], lookahead=3, max_new_tokens=12)
    assert 1 < executor.num_captures < 4 and executor.nbytes > 0


@pytest.mark.parametrize("kind", ["mamba2-in-llama", "mamba1"])
@pytest.mark.parametrize("draft", ["llama", "ngram"])
def test_memory_that_follows_the_text(family, prompt, monkeypatch, kind, draft) -> None:
    """Whatever the budget; what is queued is not lost when a buffer moves."""
    (target, drafts), executor = family(kind), RecordingExecutor()
    options = {"draft": drafts.get(draft, draft), "lookahead": 3, "max_new_tokens": 2**31 - 1, "output_logits": True}
    given = [prompt(length) for length in (1, 9)]
    whole = sm.generate(target, given, max_new_tokens=80, stop_token_ids=())
    new = [text[len(p) :].tolist() for text, p in zip(whole.sequences, given, strict=True)]
    last = max(set(new[0]) & set(new[1]), key=lambda token: min(text.index(token) for text in new), default=new[0][-1])
    for ahead in (1, 17):
        monkeypatch.setattr(loop, "AHEAD", ahead)
        both(executor, target, given, stop_token_ids=(last, new[1][-1]), **options)
        assert executor.nbytes < 3_000_000
    assert executor.num_captures < 6


@pytest.mark.parametrize("draft", ["model", "ngram", "scripted", None])
def test_what_a_call_needed_is_freed_at_once(draft) -> None:
    """Not only when cycles are looked for, which may be long after a device is full."""
    target, other = (random_model(tiny_config(), seed=seed) for seed in (0, 1))
    drafts = {"model": other, "scripted": ScriptedDraft([[1, 2]], 61, lambda row, at: True)}
    held = weakref.ref(target)
    gc.collect()
    gc.disable()
    try:
        sm.generate(target, [[1, 2]], draft=drafts.get(draft, draft), max_new_tokens=6, cache=sm.GenerationCache())
        del target
        assert held() is None
    finally:
        gc.enable()


def test_a_named_executor_keeps_nothing_alive(monkeypatch) -> None:
    monkeypatch.setattr(executors, "GraphExecutor", RecordingExecutor)
    target, draft = (random_model(tiny_config(), seed=seed) for seed in (0, 1))
    held = [weakref.ref(target), weakref.ref(draft)]
    sm.generate(target, [[1, 2]], draft=draft, executor="graph")
    sm.generate(target, [[1, 2]], draft=sm.ModelDrafter(draft), executor="graph")
    del target, draft
    gc.collect()
    assert [model() for model in held] == [None, None]


@pytest.mark.parametrize("kind", ["llama", "mamba2-in-llama"])
def test_rows_that_are_together_longer_than_a_cache(family, prompt, executor, kind) -> None:
    """Each fits, so nothing may move when they are read.

    Catches: room for a prefill by the sum of all rows, which moves a captured cache.
    """
    target, drafts = family(kind)
    prompts = [prompt(length) for length in (40, 41, 43)]
    both(executor, target, prompts, draft=drafts["near"], lookahead=3, max_new_tokens=12, stop_token_ids=())


@pytest.mark.parametrize("draft", ["near", "ngram", None])
def test_going_on_from_a_cache(pair, prompt, executor, assert_states_fit, draft) -> None:
    """Rows that ended by a stop token or the budget left their state as it was, while the others went on."""
    models, given = pair(), [prompt(length) for length in LENGTHS]
    chosen, caches = models.drafts.get(draft, draft), [sm.GenerationCache(), sm.GenerationCache()]
    for budget, stops in ((7, (5, 17, 40)), (1, ()), (0, ()), (12, (3, 22, 60))):
        results = [
            sm.generate(
                models.target, cache.sequences or [list(text) for text in given], draft=chosen, lookahead=4,
                max_new_tokens=budget, stop_token_ids=stops, cache=cache, output_logits=True, executor=how,
            )
            for cache, how in zip(caches, ("eager", executor), strict=True)
        ]  # fmt: skip
        assert_same(results[1], results[0])
        assert_states_fit(caches[1])


def test_stop_strings_end_a_row_though_rounds_are_queued(chain, executor) -> None:
    """Which the host alone finds: the row has gone on meanwhile, unseen."""
    target = chain([bytes([65 + i]) for i in range(20)])
    for stop in ("D", "FG", "EFGH"):
        result = both(executor, target, [[0], [9]], draft="ngram", max_new_tokens=30, stop_strings=(stop,))
        assert result.finish_reasons[0] == "stop"


def test_after_a_stop_string_the_cache_goes_on_exactly(pair, prompt, executor, plain) -> None:
    """Catches: a state trusted though rounds were queued behind a stop string."""
    target, given = pair().target, prompt(5)
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={chr(0x100 + i): i for i in range(61)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    target = dataclasses.replace(target, load_tokenizer=lambda: tokenizer)
    text = plain(pair().target, given, 30)[0]
    for at in (6, 9, 14):
        cache = sm.GenerationCache()
        stop = tokenizer.decode([text[at]])
        first = sm.generate(target, [given], stop_strings=(stop,), cache=cache, executor=executor, stop_token_ids=())
        length = len(first.sequences[0])
        whole = sm.generate(
            target, cache.sequences, max_new_tokens=35 - length, cache=cache, executor=executor, stop_token_ids=()
        )
        assert whole.sequences[0].tolist() == text


def test_tokens_come_in_order_and_not_more_than_two_rounds_late(pair, prompt, executor) -> None:
    models, late = pair(), []

    def on_token(row: int, token: int) -> None:
        seen.append((row, token))
        late.append(executor.num_replays - rounds)

    class Counting(RecordingExecutor):
        def collect(self):
            nonlocal rounds
            rounds += 1
            return super().collect()

    for draft in (models.drafts["near"], None):
        executor, seen, rounds = Counting(), [], 0
        given = [prompt(3), prompt(9)]
        result = sm.generate(
            models.target, given, draft=draft, max_new_tokens=20, on_token=on_token, stop_token_ids=(),
            executor=executor,
        )  # fmt: skip
        for row, text in enumerate(result.sequences):
            assert [token for r, token in seen if r == row] == text[len(given[row]) :].tolist()
    assert 0 < max(late) <= 2


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("position", [0, 3, 7, 15])
def test_a_callback_that_raises_leaves_committed_text(pair, prompt, executor, assert_states_fit, position) -> None:
    models, cache, calls = pair(), sm.GenerationCache(), []

    def on_token(row: int, token: int) -> None:
        calls.append(token)
        if len(calls) > position:
            raise Interrupt

    options = {"draft": models.drafts["near"], "stop_token_ids": (), "cache": cache, "executor": executor}
    given = [prompt(5), prompt(2)]
    expected = sm.generate(models.target, given, max_new_tokens=30, stop_token_ids=()).sequences
    with pytest.raises(Interrupt):
        sm.generate(models.target, given, on_token=on_token, max_new_tokens=30, **options)
    assert_states_fit(cache, complete=False)
    for row, text in enumerate(cache.sequences):
        assert text == expected[row][: len(text)].tolist()
        rest = 30 + len(given[row]) - len(text)
    result = sm.generate(models.target, cache.sequences, max_new_tokens=rest, **options)
    assert result.sequences[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize("victim", ["target", "draft"])
def test_logits_that_become_nan_are_one_line(pair, prompt, executor, victim) -> None:
    models = pair()
    broken = dataclasses.replace(models.drafts["near"], head=models.drafts["near"].head * torch.nan)
    target, draft = (broken, models.target) if victim == "target" else (models.target, broken)
    for how in ("eager", executor):
        with pytest.raises(ValueError, match="NaN") as caught:
            sm.generate(target, [prompt(3), prompt(4)], draft=draft, executor=how)
        assert "\n" not in str(caught.value) and ("draft" in str(caught.value)) == (victim == "draft")
    both(executor, models.target, [prompt(3)], draft=models.drafts["near"])


@pytest.mark.parametrize("budget", range(1, 10))
def test_a_draft_that_breaks_beyond_the_budget_does_no_harm(executor, budget) -> None:
    """After token 4 its logits are NaN; the target's text is 0 1 2 3 4 5 0 …"""
    table = torch.eye(6).roll(1, 1) * 0.9 + 0.02
    target, draft = TableModel(table), TableModel(table.clone().index_fill_(0, torch.tensor([4]), torch.nan))
    for start in range(5):
        for lookahead in (1, 3, 4):
            options = {"draft": draft, "lookahead": lookahead, "max_new_tokens": budget, "stop_token_ids": ()}
            outcomes = []
            for how in ("eager", executor):
                try:
                    outcomes.append(outcome(sm.generate(target, [[start]], executor=how, **options)))
                except ValueError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1], (start, lookahead)


@pytest.mark.parametrize("ends", [{"stop_token_ids": (9,)}, {"stop_strings": ["89"]}], ids=["token", "string"])
@pytest.mark.parametrize("broken", ["target", "draft", "both"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_logits_that_break_behind_the_end_do_no_harm(chain, executor, ends, broken, sampling) -> None:
    """Plain decoding never sees them."""
    table = torch.eye(20).roll(1, 1) + 1e-9
    nan = table.index_fill(0, torch.tensor([9]), torch.nan)
    target, draft = (TableModel(nan if broken in (who, "both") else table) for who in ("target", "draft"))
    target.tokenizer = chain([str(token).encode() for token in range(20)]).tokenizer
    for prompts in ([[3]], [[3], [0, 1, 2, 3]], [[7]]):
        for lookahead in (1, 4, 15):
            options = {
                "lookahead": lookahead,
                "stop_token_ids": (),
                **ends,
                **SAMPLING[sampling],
                "output_logits": True,
            }
            result = both(executor, target, prompts, draft=draft, **options)
            assert all(text[-1] == 9 for text in result.sequences)
            assert not any(logits.isnan().any() for logits in result.logits)
            both(executor, target, [[3, 4, 5, 6, 7, 8, 9, 3], *prompts[1:]], draft="ngram", **options)


def test_a_weight_that_was_replaced_is_captured_again(pair, prompt, executor) -> None:
    """Catches: graphs kept after a weight has moved."""
    models = pair()
    target = dataclasses.replace(models.target)
    before = both(executor, target, [prompt(7)], draft=models.drafts["near"]).sequences[0]
    target.head = models.drafts["near"].head.clone()
    assert not torch.equal(both(executor, target, [prompt(7)], draft=models.drafts["near"]).sequences[0], before)
    target.head = target.head.bfloat16()
    both(executor, target, [prompt(7)], draft=models.drafts["near"])
    target.state_dtype = torch.float16
    both(executor, target, [prompt(7)], draft=models.drafts["near"], output_logits=True)
    target.embedding = target.embedding.as_strided(target.embedding.shape, (target.embedding.stride(0) // 2, 1))
    both(executor, target, [prompt(7)], draft=models.drafts["near"], output_logits=True)
    assert executor.num_captures == 5


def test_a_drafter_in_the_place_of_another_is_another(pair, prompt, executor) -> None:
    """Catches: kinds told apart by `id` alone."""
    models = pair()
    for name in ("equal", "random"):
        draft = sm.ModelDrafter(models.drafts[name])  # the second gets the address of the first
        both(executor, models.target, [prompt(7)], draft=draft, max_new_tokens=20, stop_token_ids=())
        del draft
    assert executor.num_captures == 2


def test_models_that_have_no_cache_to_reserve(executor) -> None:
    target, draft = (TableModel(torch.eye(5).roll(by, 1) + 0.01) for by in (1, 2))
    both(executor, target, [[1], [2, 3]], draft=draft, max_new_tokens=9)


def test_only_so_many_kinds_are_kept(pair, prompt) -> None:
    executor, target = RecordingExecutor(max_captured=2), pair().target
    for batch in (1, 2, 1, 3, 1, 2):
        both(executor, target, [prompt(3)] * batch, max_new_tokens=4)
    assert executor.num_captures == 4
    kept = executor.nbytes
    held = [weakref.ref(kind.round) for kind in executor._captured.values()]
    executor.clear()
    gc.collect()
    assert executor.nbytes == 0 < kept and not any(round() for round in held)
    with pytest.raises(ValueError, match="max_captured must be a whole number of at least 1, got 0"):
        RecordingExecutor(max_captured=0)


def test_threads_take_turns(pair, prompt, plain, executor) -> None:
    models, results = pair(), {}

    def call(length: int) -> None:
        results[length] = sm.generate(
            models.target, [prompt(length)], draft=models.drafts["near"], max_new_tokens=20, stop_token_ids=(),
            executor=executor,
        ).sequences[0]  # fmt: skip

    threads = [threading.Thread(target=call, args=(length,)) for length in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for length, text in results.items():
        assert text.tolist() == plain(models.target, prompt(length), 20)[0]
    assert len(results) == 6 and executor.num_captures == 1


@pytest.mark.parametrize("kind", [RecordingExecutor, EagerExecutor])
def test_a_call_within_a_call_is_refused(pair, prompt, kind) -> None:
    target, executor = pair().target, kind()

    def on_token(row: int, token: int) -> None:
        sm.generate(target, [prompt(2)], executor=executor)

    with pytest.raises(ValueError, match="of its own"):
        sm.generate(target, [prompt(3)], executor=executor, on_token=on_token)
    both(executor, target, [prompt(3)])


def test_graphs_cannot_be_cleared_while_they_run(pair, prompt, executor) -> None:
    with pytest.raises(ValueError, match="of its own"):
        sm.generate(pair().target, [prompt(3)], executor=executor, on_token=lambda row, token: executor.clear())


def test_an_ngram_drafter_may_serve_calls_within_calls(pair, prompt, plain) -> None:
    target, draft = pair().target, sm.NgramDrafter(61)

    def on_token(row: int, token: int) -> None:
        sm.generate(target, [prompt(5), prompt(6)], draft=draft, max_new_tokens=2)

    result = sm.generate(target, [prompt(9)], draft=draft, max_new_tokens=12, stop_token_ids=(), on_token=on_token)
    assert result.sequences[0].tolist() == plain(target, prompt(9), 12)[0]


def test_one_drafter_serves_several_kinds(pair, prompt, executor) -> None:
    """Each has memory of its own, also beside calls that are not replayed."""
    models = pair()
    draft = sm.ModelDrafter(models.drafts["near"])
    for batch in (1, 2, 1, 2):
        both(executor, models.target, [prompt(5)] * batch, draft=draft, max_new_tokens=12, stop_token_ids=())
    assert executor.num_captures == 2


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_a_scripted_proposer(pair, prompt, plain, executor, rate) -> None:
    models, prompts = pair(), [prompt(length) for length in LENGTHS]
    texts = [plain(models.target, given, 24)[0] for given in prompts]
    cost = sm.ModelDrafter(models.drafts["random"])
    draft = CapturableScript(texts, 61, agree_at_rate(rate), cost=cost)
    result = both(executor, models.target, prompts, draft=draft, max_new_tokens=24, stop_token_ids=())
    assert [text.tolist() for text in result.sequences] == texts
    assert rate or result.stats.accepted == 0
    assert rate < 1 or result.stats.acceptance_rate == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": "fast"}, "unknown executor 'fast'; choose from: eager, graph"),
        ({"executor": RecordingExecutor}, "unknown executor <class"),
        ({"executor": "graph"}, "needs a CUDA device, and the model is on cpu"),
        ({"logits_processor": lambda row, tokens, logits: logits}, "logits_processor is Python"),
        ({"draft": ScriptedDraft([[1]], 61, agree_at_rate(1))}, "ScriptedDraft is Python"),
    ],
    ids=["name", "class", "device", "processor", "drafter"],
)
def test_what_cannot_be_captured_is_refused(pair, options, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        sm.generate(pair().target, [[1, 2]], **{"executor": RecordingExecutor()} | options)
    assert "\n" not in str(caught.value)
