"""Calls that break off, wherever they do, leave executor and cache such that the next call is right."""

import dataclasses
import functools
import operator
import sys
import threading
from collections.abc import Callable, Sequence

import numpy
import pytest
import torch
from interrupts import run_traced

import speculative_mamba as sm
from speculative_mamba.decode.batch import Batch
from speculative_mamba.decode.executors import EagerExecutor
from speculative_mamba.decode.lookahead import AdaptiveLookahead, FixedLookahead
from speculative_mamba.decode.sampling import Sampler
from speculative_mamba.decode.stats import GenerationStats
from speculative_mamba.layers.cache import AttentionCache, MambaCache
from speculative_mamba.models.runner import ModelRunner
from speculative_mamba.testing import recording
from speculative_mamba.testing.models import TableModel, as_dtype
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.tolerance import assert_bitwise_equal

both_kinds = pytest.mark.parametrize("kind", [RecordingExecutor, EagerExecutor])


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException, after: int = 0) -> None:
    """From the call of that number on ``owner.name`` raises when it has done its work."""
    original, calls = getattr(owner, name), []

    def fails(*arguments: object, **options: object) -> object:
        result = original(*arguments, **options)
        calls.append(1)
        if len(calls) > after:
            raise error
        return result

    monkeypatch.setattr(owner, name, fails)


@both_kinds
@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (ModelRunner, "snapshot", MemoryError),
        (Sampler, "admit", KeyboardInterrupt),
        (Batch, "launching", KeyboardInterrupt),
    ],
    ids=["saving", "opening", "launching"],
)
def test_an_executor_is_given_back(pair, prompt, monkeypatch, kind, owner, name, error) -> None:
    models, executor = pair(), kind()
    options = {"draft": models.drafts["near"], "max_new_tokens": 9, "executor": executor}
    with monkeypatch.context() as patch:
        failing(patch, owner, name, error())
        with pytest.raises(error):
            sm.generate(models.target, [prompt(3)], cache=sm.GenerationCache(), **options)
    assert sm.generate(models.target, [prompt(3)], **options).stats.tokens == 9


INNER = ("model.py", "base.py", "sampling.py", "round.py", "stats.py", "inputs.py", "prompts.py")


def is_of_the_loop(path: str) -> bool:
    """What rounds and drafts do inside is left out."""
    folder, _, file = path.rpartition("/")
    return "/speculative_mamba/decode" in folder and file not in INNER


def interrupted_at(
    call: int,
    run: Callable[[], object],
    is_traced: Callable[[str], bool] = is_of_the_loop,
    events: tuple[str, ...] = ("call", "return"),
) -> bool:
    """Runs with a KeyboardInterrupt when for the ``call``-th time a function of a file that ``is_traced`` begins or
    ends, which is where signals arrive. Whether there were so many."""
    left = call

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal left
        if not is_traced(frame.f_code.co_filename):
            return None
        if event in events:
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    run_traced(trace, run)
    return left <= 0


@both_kinds
def test_an_interrupt_anywhere_leaves_executor_and_cache_right(kind) -> None:
    """The next call is right in this thread, while the error is still held, and in another."""
    target, executor = TableModel(torch.eye(11).roll(1, 1)), kind()

    def call(cache: sm.GenerationCache | None = None, prompts: Sequence = ([3, 4],)) -> list[int]:
        result = sm.generate(
            target, cache.sequences or prompts if cache else prompts, draft=sm.ModelDrafter(target), lookahead=2,
            max_new_tokens=7, executor=executor, cache=cache,
        )  # fmt: skip
        return result.sequences[0].tolist()

    call()
    at, interrupts = 1, 0
    while True:
        cache = sm.GenerationCache()
        if not interrupted_at(at, functools.partial(call, cache)):
            break
        interrupts += 1
        text = cache.sequences[0] if cache.sequences else [3, 4]
        assert text == [(3 + step) % 11 for step in range(len(text))]
        assert call(cache) == [(3 + step) % 11 for step in range(len(text) + 7)]
        at += 1 + at // 10
    assert interrupts > 15
    other = threading.Thread(target=call)
    other.start()
    other.join(5)
    assert not other.is_alive()


@both_kinds
@pytest.mark.parametrize("after", range(6))
def test_an_interrupt_while_a_row_is_booked(pair, prompt, plain, monkeypatch, assert_states_fit, kind, after) -> None:
    target, cache, given = pair().target, sm.GenerationCache(), prompt(9)
    options = {"draft": target, "lookahead": 4, "stop_token_ids": (), "cache": cache}
    with monkeypatch.context() as patch:
        failing(patch, GenerationStats, "count", KeyboardInterrupt(), after)
        try:
            sm.generate(target, [given], max_new_tokens=12, executor=kind(), **options)
        except KeyboardInterrupt:
            assert after < 3
    assert_states_fit(cache, complete=False)
    left = 30 - (len(cache.sequences[0]) - len(given))
    result = sm.generate(target, cache.sequences, max_new_tokens=left, **options)
    assert result.sequences[0].tolist() == plain(target, given, 30)[0]


@both_kinds
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupt_while_the_draft_catches_up(pair, prompt, monkeypatch, assert_states_fit, kind, after) -> None:
    models, cache = pair(), sm.GenerationCache()
    pattern = [2, 0, 0, 4]
    monkeypatch.setattr(FixedLookahead, "__init__", lambda self, most: vars(self).update(all=tuple(range(6)), at=-1))

    def next_lookahead(self: FixedLookahead) -> int:
        self.at += 1
        return pattern[self.at % len(pattern)]

    monkeypatch.setattr(FixedLookahead, "next", next_lookahead)
    failing(monkeypatch, sm.ModelDrafter, "prefill", KeyboardInterrupt(), 2 + after)
    with pytest.raises(KeyboardInterrupt):
        sm.generate(
            models.target, [prompt(9), prompt(12)], draft=models.drafts["near"], lookahead=5, max_new_tokens=30,
            stop_token_ids=(), cache=cache, executor=kind(),
        )  # fmt: skip
    assert_states_fit(cache, complete=False)


def test_a_cache_that_could_not_grow_is_dropped(family, prompt, monkeypatch) -> None:
    """The target's has grown when there is no memory for the draft's."""
    (target, drafts), executor = family("llama"), RecordingExecutor()
    options = {"draft": drafts["near"], "lookahead": 3, "max_new_tokens": 12, "stop_token_ids": ()}
    sm.generate(target, [prompt(9)], executor=executor, **options)
    with monkeypatch.context() as patch:
        failing(patch, sm.ModelDrafter, "reserve", torch.cuda.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            sm.generate(target, [prompt(200)], executor=executor, **options)
    expected = sm.generate(target, [prompt(9, 5)], **options).sequences[0]
    assert torch.equal(sm.generate(target, [prompt(9, 5)], executor=executor, **options).sequences[0], expected)


@both_kinds
@pytest.mark.parametrize(("architecture", "owner"), [("mamba1", MambaCache), ("llama", AttentionCache)])
def test_a_row_whose_state_was_restored_in_part_is_emptied(
    family, prompt, monkeypatch, kind, architecture, owner
) -> None:
    """Catches: a row that counts as fresh, though some of its layers hold the state of another text."""
    (target, _), executor, cache = family(architecture), kind(), sm.GenerationCache()
    options = {"max_new_tokens": 12, "stop_token_ids": (), "output_logits": True}
    text = sm.generate(target, [prompt(9)], cache=cache, **options).sequences[0].tolist()
    with monkeypatch.context() as patch:
        failing(patch, owner, "restore", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            sm.generate(target, [text], cache=cache, executor=executor, **options)
    expected = sm.generate(target, [prompt(9, 5)], **options).logits[0]
    assert_bitwise_equal(sm.generate(target, [prompt(9, 5)], executor=executor, **options).logits[0], expected)


def test_keys_and_values_grow_together(family, monkeypatch) -> None:
    """Catches: keys that have grown, from which the capacity is known, beside values for which there was no memory."""
    target, _ = family("llama")
    cache = next(layer for layer in target.new_cache(1, 2) if isinstance(layer, AttentionCache))
    before, original, calls = cache.tensors(), torch.Tensor.new_empty, []

    def full(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 2:
            raise MemoryError
        return original(tensor, *shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    with pytest.raises(MemoryError):
        cache.grow(cache.capacity + 64)
    assert all(map(operator.is_, cache.tensors(), before))


@pytest.mark.parametrize("kind", ["llama", "mamba1"])
def test_an_interrupt_anywhere_in_a_cache_leaves_captured_rounds_right(family, prompt, kind) -> None:
    """Of a call that goes on from a state, while rows are restored, emptied, read and saved. Catches: captured rounds
    that later calls find with what one that broke off left in their caches."""
    (target, _), executor, cache = family(kind), RecordingExecutor(), sm.GenerationCache()
    options = {"max_new_tokens": 3, "stop_token_ids": (), "output_logits": True}
    sm.generate(target, [prompt(5), prompt(70)], cache=cache, **options)
    goes_on, others = [[*text, 1] for text in cache.sequences], [prompt(3, 5), prompt(66, 5)]
    expected = sm.generate(target, others, **options).logits

    def call() -> None:
        sm.generate(target, goes_on, cache=cache.copy(), executor=executor, **options)

    call()
    at = 1
    while interrupted_at(at, call, lambda path: path.endswith(("models/runner.py", "layers/cache.py")), ("line",)):
        assert all(map(torch.equal, sm.generate(target, others, executor=executor, **options).logits, expected)), at
        if at % 2 == 0:
            executor.clear()
        at += 1 + at // 10
    assert at > 100


def test_memory_that_other_kinds_hold_is_freed_for_a_new_one(pair, prompt, monkeypatch) -> None:
    target, executor = pair().target, RecordingExecutor()
    sm.generate(target, [prompt(3)], max_new_tokens=4, executor=executor)
    prepared, held = executor._prepare, []

    def full_at_first(*arguments: object) -> object:
        held.append(executor.nbytes)
        if len(held) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return prepared(*arguments)

    monkeypatch.setattr(executor, "_prepare", full_at_first)
    assert sm.generate(target, [prompt(3)] * 2, max_new_tokens=4, executor=executor).stats.tokens == 8
    assert held[0] > held[1] == 0


def test_a_capture_that_was_interrupted_is_begun_anew(family, prompt, monkeypatch) -> None:
    (target, drafts), executor = family("llama"), RecordingExecutor()
    options = {"draft": drafts["near"], "lookahead": "auto", "max_new_tokens": 20, "stop_token_ids": ()}
    with monkeypatch.context() as patch:
        failing(patch, RecordingExecutor, "_capture", KeyboardInterrupt(), after=2)
        with pytest.raises(KeyboardInterrupt):
            sm.generate(target, [prompt(9)], executor=executor, **options)
    expected = sm.generate(target, [prompt(9)], max_new_tokens=20, stop_token_ids=()).sequences[0]
    for _ in range(2):
        assert torch.equal(sm.generate(target, [prompt(9)], executor=executor, **options).sequences[0], expected)


def test_other_scales_or_options_of_a_model_are_seen(pair, prompt) -> None:
    target, executor = dataclasses.replace(pair("q8_0").target), RecordingExecutor()
    changes = {
        "head": as_dtype(target.head.dequantized() * 3, "q8_0"),
        "config": dataclasses.replace(target.config, eps=0.1),
    }
    options = {"max_new_tokens": 4, "output_logits": True}
    sm.generate(target, [prompt(9)], executor=executor, **options)
    for name, value in changes.items():
        setattr(target, name, value)
        expected = sm.generate(target, [prompt(9)], **options).logits[0]
        assert torch.equal(sm.generate(target, [prompt(9)], executor=executor, **options).logits[0], expected), name


def test_a_drafter_with_another_model_is_seen(pair, prompt) -> None:
    models, executor = pair(), RecordingExecutor()
    draft, rates = sm.ModelDrafter(models.drafts["equal"]), []
    for model in (models.drafts["equal"], models.drafts["random"]):
        draft.model = model
        rates.append(sm.generate(models.target, [prompt(7)], draft=draft, executor=executor).stats.acceptance_rate)
    assert rates[0] == 1 > rates[1]


def test_auto_gives_up_an_ngram_draft_that_finds_nothing(monkeypatch) -> None:
    asked, chosen = [], AdaptiveLookahead.next
    monkeypatch.setattr(AdaptiveLookahead, "next", lambda self: asked.append(chosen(self)) or asked[-1])
    arrived = recording._Replayed
    monkeypatch.setattr(arrived, "wait", lambda self: (self.result, self._record, 1 + 0.3 * self.result.lookahead))
    target = TableModel(torch.eye(200).roll(1, 1))
    result = sm.generate(
        target, [[0]], draft="ngram", lookahead="auto", max_new_tokens=150, executor=RecordingExecutor()
    )
    assert result.stats.tested == 0 and asked.count(0) > 120


def test_what_a_drafter_hides_is_checked(pair, monkeypatch) -> None:
    class Elsewhere(TableModel):
        device = torch.device("cuda:1")

    class OtherNgrams(sm.NgramDrafter):
        def propose(self, *arguments: object) -> object:
            return super().propose(*arguments)

    class Nothing(sm.NgramDrafter):
        def propose(self, *arguments: object) -> None: ...

    target, graph = pair().target, {"executor": RecordingExecutor()}
    for draft, options, words in (
        (sm.ModelDrafter(Elsewhere(torch.eye(61))), {}, "draft and target are on two devices"),
        (OtherNgrams(61), graph, "OtherNgrams is Python"),
        (Nothing(61), {}, r"propose must return \(tokens, probs\), got NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            sm.generate(target, [[1, 2]], draft=draft, **options)


def test_whole_numbers_of_numpy_are_numbers(pair) -> None:
    for executor in ("eager", RecordingExecutor()):
        result = sm.generate(
            pair().target, [[1, 2]], draft="ngram", lookahead=numpy.int32(3), max_new_tokens=numpy.int32(5),
            stop_token_ids=(), executor=executor,
        )  # fmt: skip
        assert result.stats.tokens == 5


def test_times_of_a_replayed_round_are_of_the_whole(pair, prompt) -> None:
    models = pair()
    stats = sm.generate(
        models.target, [prompt(9)], draft=models.drafts["near"], max_new_tokens=12, executor=RecordingExecutor()
    ).stats
    assert stats.draft_s == stats.verify_s == 0 < stats.decode_s
