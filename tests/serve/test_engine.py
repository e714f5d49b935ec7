"""Requests join and leave, and each gets the text that ``generate`` gives for it alone."""

import asyncio
import dataclasses
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import WAIT, alone, pair, ring

import speculative_mamba as sm
from speculative_mamba.decode.sampling import Sampler
from speculative_mamba.layers.cache import AttentionCache
from speculative_mamba.serve import scheduler
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.recording import RecordingExecutor

MIX = (
    sm.SamplingParams(),
    sm.SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=3),
    sm.SamplingParams(temperature=1.3, repetition_penalty=1.3, seed=4),
    sm.SamplingParams(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={3: 2.0}, seed=5),
    sm.SamplingParams(logit_bias={token: -0.1 * token for token in range(40)}),
)


class Gate:
    """A drafter that proposes nothing, and waits in every round until it may."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.entered, self.may_pass = threading.Event(), threading.Event()

    def begin(self, prompts, lookahead, sampler): ...

    def propose(self, rows, accepted, lookahead):
        self.entered.set()
        assert self.may_pass.wait(WAIT)
        return torch.empty(len(rows), 0, dtype=torch.int64), None


def mixed(source: random.Random, vocabulary: int, text: list[int] | None = None) -> sm.Request:
    """Any prompt, parameters, stops and budget."""
    length = source.choice([1, 2, 5, 30, 90])
    prompt = [source.randrange(vocabulary) for _ in range(length)]
    if text is not None:
        at = source.randrange(len(text) - length)
        prompt = text[at : at + length]
    return sm.Request(
        prompt, source.choice([1, 2, 7, 24]), source.choice(MIX),
        stop_token_ids=source.choice([None, (), (3, 8, 21)]),
        stop_strings=source.choice([(), ("the",), (". ", "and")]) if text is not None else (),
        use_draft=source.random() < 0.7, logprobs=source.choice([None, None, 0, 3]),
    )  # fmt: skip


def assert_is_alone(target, request, output, expected, complete=True) -> None:
    """Tokens and log-probabilities bit for bit, text, and why it ended. A cancelled one is the start of it."""
    tokens, logits = expected.sequences[0].tolist()[len(request.prompt) :], expected.logits[0]
    count = len(output.tokens)
    if output.finish_reason == "cancelled" and not complete:
        tokens = tokens[:count]
    else:
        assert output.finish_reason == expected.finish_reasons[0]
    assert output.tokens == tokens == [token.token for token in output.outputs]
    assert output.text == "".join(token.text for token in output.outputs)
    assert output.prompt_tokens == len(request.prompt) and 0 <= output.accepted_tokens <= output.draft_tokens
    assert sum(token.drafted for token in output.outputs) == output.accepted_tokens
    assert request.use_draft or not output.draft_tokens
    if request.logprobs is not None:
        logprobs = logits.log_softmax(-1)
        for at, token in enumerate(output.outputs):
            assert token.logprob == logprobs[at, token.token].item()
            values, _ = logprobs[at].topk(request.logprobs)
            assert [value for _, value in token.top_logprobs] == values.tolist()
            assert all(logprobs[at, other].item() == value for other, value in token.top_logprobs)
    if isinstance(target, sm.MambaLM) and target.tokenizer is not None:
        stop = output.finish_reason == "eos"
        whole = target.tokenizer.decode(tokens[: count - stop], skip_special_tokens=False)
        if output.finish_reason in ("length", "eos"):
            assert output.text == whole
        if output.finish_reason == "stop":
            [end] = {whole.find(stop) for stop in request.stop_strings} - {-1}
            assert output.text == whole[:end]


@pytest.mark.parametrize("kind", [sm.EagerExecutor, RecordingExecutor])
@pytest.mark.parametrize("models", ["mamba1", "mamba2-in-llama", "embedded"])
def test_every_text_is_that_of_its_request_alone(kind, models) -> None:
    """Threads submit at random, some cancel, and prompts are read in parts; rows are fewer than requests."""
    (target, draft), text = pair(models), None
    if models == "embedded":
        text = target.tokenizer.encode("The morning was fine, and he said that the end of it " * 9).ids

    def client(seed: int) -> list:
        source, done = random.Random(seed), []
        for _ in range(6):
            asked, cancels = mixed(source, target.vocab_size, text), source.random() < 0.2
            completion = engine.submit(asked)
            if cancels:
                next(iter(completion), None)
                completion.cancel()
            done.append((asked, completion.result(WAIT)))
        return done

    with (
        sm.Engine(target, draft=draft, lookahead=3, acceptance="coupled", max_batch_size=3, executor=kind()) as engine,
        ThreadPoolExecutor(5) as clients,
    ):
        done = [one for results in clients.map(client, range(5)) for one in results]
        stats = engine.stats()
    for asked, output in done:
        assert_is_alone(target, asked, output, alone(target, asked), complete=False)
    assert stats.running == stats.queued == 0 and sum(stats.requests.values()) == len(done) == 30
    assert stats.generated_tokens == sum(len(output.tokens) for _, output in done)
    assert stats.prompt_tokens == sum(output.prompt_tokens for _, output in done)
    assert stats.draft_tokens == sum(output.draft_tokens for _, output in done) > 0
    assert stats.accepted_tokens == sum(output.accepted_tokens for _, output in done)


def test_under_rejection_greedy_texts_are_exact() -> None:
    """Beside sampled ones."""
    target, draft = pair("mamba1")
    source = random.Random(1)
    asked = [mixed(source, target.vocab_size) for _ in range(16)]
    with sm.Engine(target, draft=draft, max_batch_size=4) as engine:
        outputs = [completion.result(WAIT) for completion in [engine.submit(one) for one in asked]]
    greedy = [(one, output) for one, output in zip(asked, outputs, strict=True) if one.sampling.greedy]
    assert 2 < len(greedy) < 14
    for one, output in greedy:
        assert_is_alone(target, one, output, alone(target, one))


@pytest.mark.parametrize("draft", ["ngram", None])
def test_other_drafts(draft) -> None:
    target, source = pair("mamba2")[0], random.Random(2)
    asked = [mixed(source, target.vocab_size) for _ in range(9)]
    with sm.Engine(target, draft=draft, acceptance="coupled", max_batch_size=2) as engine:
        for one, completion in [(one, engine.submit(one)) for one in asked]:
            assert_is_alone(target, one, completion.result(WAIT), alone(target, one))


def test_asyncio() -> None:
    """Many streams in one event loop; one is left, and its row goes to another."""
    target, draft = pair("mamba1")
    source = random.Random(3)
    asked = [mixed(source, target.vocab_size) for _ in range(12)]

    async def one(completion):
        return [token async for token in completion]

    async def leaves(completion):
        async for token in completion:
            completion.cancel()
            return token

    async def all_of_them(engine):
        long = dataclasses.replace(asked[0], max_new_tokens=10**6, stop_token_ids=())
        left = asyncio.ensure_future(leaves(engine.submit(long)))
        completions = [engine.submit(one) for one in asked]
        streams = await asyncio.wait_for(asyncio.gather(*map(one, completions)), WAIT)
        assert isinstance(await left, sm.TokenOutput)
        return completions, streams

    with sm.Engine(target, draft=draft, acceptance="coupled", max_batch_size=2) as engine:
        completions, streams = asyncio.run(all_of_them(engine))
    for one_asked, completion, stream in zip(asked, completions, streams, strict=True):
        output = completion.result(0)
        assert output.outputs == stream and completion.done
        assert (completion.draft_tokens, completion.accepted_tokens) == (output.draft_tokens, output.accepted_tokens)
        assert_is_alone(target, one_asked, output, alone(target, one_asked))


def test_several_iterate_and_again_when_all_is_there() -> None:
    with sm.Engine(ring()) as engine, ThreadPoolExecutor(3) as readers:
        completion = engine.submit(sm.Request([3], 20))
        streams = list(readers.map(lambda _: [token.token for token in completion], range(3)))
        assert streams == [list(range(4, 24))] * 3 == [[token.token for token in completion]] * 3
        assert engine.submit(sm.Request([3], 0)).result(0).finish_reason == "length"


def test_a_row_forgets_who_had_it() -> None:
    """Its stops, its bias, and whether tokens are drafted for it."""
    target = ring()
    with sm.Engine(target, draft=target, max_batch_size=1) as engine:
        odd = sm.Request([0], 9, sm.SamplingParams(logit_bias={9: -float("inf")}), (4, 6), use_draft=False)
        stopped, whole = engine.submit(odd).result(WAIT), engine.submit(sm.Request([0], 9)).result(WAIT)
        assert (stopped.tokens, stopped.finish_reason, stopped.draft_tokens) == ([1, 2, 3, 4], "eos", 0)
        assert (whole.tokens, whole.finish_reason) == (list(range(1, 10)), "length") and whole.accepted_tokens > 5
        assert engine.submit(odd).result(WAIT) == stopped


def test_the_queue_is_bounded() -> None:
    """What waits can be cancelled without ever having had a row."""
    gate = Gate(40)
    with sm.Engine(ring(), draft=gate, max_batch_size=1, max_queue_size=2) as engine:
        first = engine.submit(sm.Request([0], 3))
        assert gate.entered.wait(WAIT)
        second, third = engine.submit(sm.Request([5], 3)), engine.submit(sm.Request([9], 3))
        assert (engine.stats().running, engine.stats().queued, engine.stats().alive) == (1, 2, True)
        with pytest.raises(sm.QueueFullError, match=r"^2 requests are waiting already; retry later$"):
            engine.submit(sm.Request([7], 3))
        with pytest.raises(TimeoutError, match="not complete after 0 s"):
            first.result(0)
        second.cancel()
        gate.may_pass.set()
        assert second.result(WAIT).finish_reason == "cancelled" and second.result().tokens == []
        assert first.result(WAIT).tokens == [1, 2, 3] and third.result(WAIT).tokens == [10, 11, 12]
        assert list(second) == []
    assert engine.stats().requests == {"cancelled": 1, "length": 2}


def test_a_completion_that_nobody_holds_gives_its_row_back() -> None:
    with sm.Engine(ring(), max_batch_size=1) as engine:
        completion = engine.submit(sm.Request([0], 2**31 - 1))
        assert next(iter(completion)).token == 1
        del completion
        assert engine.submit(sm.Request([7], 2)).result(WAIT).tokens == [8, 9]
    assert engine.stats().requests == {"cancelled": 1, "length": 1}


def test_closing() -> None:
    """With drain all are served; without, and when nobody holds the engine, they end as they are."""
    engine = sm.Engine(ring(), max_batch_size=1)
    completions = [engine.submit(sm.Request([start], 9)) for start in range(5)]
    engine.close()
    assert [completion.result(0).tokens[0] for completion in completions] == [1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
        engine.submit(sm.Request([0]))
    engine.close()
    assert not engine.stats().alive
    for drop in (lambda engine: engine.close(drain=False), lambda engine: None):
        engine = sm.Engine(ring(), max_batch_size=1)
        completions = [engine.submit(sm.Request([start], 2**31 - 1)) for start in range(3)]
        next(iter(completions[0]))
        drop(engine)
        jobs, thread = [completion._job for completion in completions], engine._scheduler._thread
        del engine, completions
        thread.join(WAIT)
        assert [job.output.finish_reason for job in jobs] == ["cancelled"] * 3


def test_a_broken_row_takes_no_other_along() -> None:
    table = torch.eye(40).roll(1, dims=1)
    table[7] = torch.nan
    with sm.Engine(TableModel(table), max_batch_size=4) as engine:
        completions = [engine.submit(sm.Request([start], 9)) for start in (4, 9, 6, 20, 7, 25)]
        for completion, start in zip(completions, (4, 9, 6, 20, 7, 25), strict=True):
            if start in (9, 20, 25):
                assert completion.result(WAIT).tokens == list(range(start + 1, start + 10))
                continue
            tokens = []
            with pytest.raises(ValueError, match="logits are NaN"):
                tokens += (token.token for token in completion)
            with pytest.raises(ValueError, match="logits are NaN"):
                completion.result(WAIT)
    assert engine.stats().requests == {"error": 3, "length": 3}


@pytest.mark.parametrize("extreme", [{"top_p": 1e-300}, {"min_p": 1 - 1e-16}])
def test_parameters_that_round_to_a_bound_break_no_round(extreme: dict) -> None:
    """Catches: in float32 they were 0 and 1, where no token could be drawn, and the round failed for all."""
    with sm.Engine(ring()) as engine:
        completion = engine.submit(sm.Request([1], 3, sm.SamplingParams(temperature=1.0, **extreme)))
        assert completion.result(WAIT).tokens == [2, 3, 4]


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_whole_numbers_beyond_64_bits_are_parameters(name: str) -> None:
    """Catches: a tensor takes no such number, and the round failed for all."""
    params = sm.SamplingParams(**{"temperature": 1.0, name: 10**25})
    assert type(getattr(params, name)) is float
    with sm.Engine(ring()) as engine:
        engine.submit(sm.Request([1], 3, params)).result(WAIT)


def test_a_prompt_that_cannot_be_read_takes_no_other_along(monkeypatch) -> None:
    admit = Sampler.admit

    def refusing(self, row, prompt, params, *others):
        if params.seed == 3:
            raise ValueError("not this one")
        admit(self, row, prompt, params, *others)

    monkeypatch.setattr(Sampler, "admit", refusing)
    with sm.Engine(ring(), max_batch_size=2) as engine:
        completions = [engine.submit(sm.Request([seed], 5, sm.SamplingParams(seed=seed))) for seed in range(6)]
        for seed, completion in enumerate(completions):
            if seed == 3:
                with pytest.raises(ValueError, match=r"^not this one$"):
                    completion.result(WAIT)
            else:
                assert completion.result(WAIT).tokens == list(range(seed + 1, seed + 6))


class FailsOnce(Gate):
    """Raises in its first round."""

    def __init__(self, vocab_size: int, error: Exception) -> None:
        super().__init__(vocab_size)
        self.error = error

    def propose(self, rows, accepted, lookahead):
        proposal = super().propose(rows, accepted, lookahead)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return proposal


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nmore of it"), ValueError("bad"), MemoryError()])
def test_a_round_that_fails_ends_those_that_run(error) -> None:
    """Those that wait are served, and so are later ones."""
    draft = FailsOnce(40, error)
    with sm.Engine(ring(), draft=draft, max_batch_size=2) as engine:
        completions = [engine.submit(sm.Request([start], 5)) for start in range(2)]
        assert draft.entered.wait(WAIT)
        completions += [engine.submit(sm.Request([start], 5)) for start in range(2, 5)]
        draft.may_pass.set()
        ended = []
        for start, completion in enumerate(completions):
            try:
                assert completion.result(WAIT).tokens == list(range(start + 1, start + 6))
            except RuntimeError as failure:
                ended.append(start)
                assert str(failure).startswith(f"a round of the engine failed: {type(error).__name__}: ")
                assert "\n" not in str(failure) and failure.__cause__ is error
        assert ended in ([0], [0, 1])  # the second may have come after the round began
        assert engine.submit(sm.Request([9], 2)).result(WAIT).tokens == [10, 11]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_program_leaves_nobody_waiting() -> None:
    draft = FailsOnce(40, KeyError("of a drafter"))
    engine = sm.Engine(ring(), draft=draft, max_batch_size=1)
    completions = [engine.submit(sm.Request([start], 5)) for start in range(3)]
    draft.may_pass.set()
    for completion in completions:
        with pytest.raises(RuntimeError, match=r"^the engine has broken down$"):
            completion.result(WAIT)
    with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
        engine.submit(sm.Request([0]))
    assert not engine.stats().alive
    engine.close()


def test_memory_is_made_at_the_start() -> None:
    """For texts as long as they may get, also those that are not drafted; longer ones are refused."""
    target, draft = pair("mamba2-in-llama")
    with sm.Engine(target, draft=draft, max_batch_size=1, max_length=300) as engine:
        caches = [*engine._scheduler._loop.batch.round.tensors()]
        assert engine.cache_bytes == engine.stats().cache_bytes == sum(cache.nbytes for cache in caches)
        assert len(engine.submit(sm.Request([5] * 200, 100, stop_token_ids=())).result(WAIT).tokens) == 100
        engine.submit(sm.Request([5], 9, stop_token_ids=(), use_draft=False)).result(WAIT)
        round = engine._scheduler._loop.batch.round
        assert [cache.data_ptr() for cache in round.tensors()] == [cache.data_ptr() for cache in caches]
        [attention] = [layer for layer in round.draft.layers if isinstance(layer, AttentionCache)]
        assert attention.lengths[0, 0] <= 10, "keys of the text before"
        with pytest.raises(ValueError, match=r"^the prompt's 200 tokens and max_new_tokens 101 exceed the engine's"):
            engine.submit(sm.Request([5] * 200, 101))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "is empty"), ({"prompt": [61]}, "outside the vocabulary"), ({"prompt": "text"}, "got text"),
        ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"sampling": None}, "sampling"), ({"sampling": sm.SamplingParams(seed=[1])}, "one seed"),
        ({"sampling": sm.SamplingParams(logit_bias={61: 1.0})}, "logit_bias"),
        ({"sampling": sm.SamplingParams(logit_bias=dict.fromkeys(range(600), 1.0))}, "logit_bias"),
        ({"stop_token_ids": [61]}, "stop_token_ids"), ({"stop_token_ids": "a"}, "stop_token_ids"),
        ({"stop_strings": ["a"]}, "tokenizer"), ({"stop_strings": "a"}, "stop_strings"),
        ({"use_draft": 1}, "use_draft"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_served(change, message) -> None:
    with sm.Engine(pair("mamba1")[0]) as engine, pytest.raises(ValueError, match=message) as caught:
        engine.submit(dataclasses.replace(sm.Request([1]), **change))
    assert "\n" not in str(caught.value) and engine.stats().prompt_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": "auto"}, "lookahead"), ({"lookahead": 16}, "lookahead"), ({"acceptance": "no"}, "acceptance"),
        ({"max_batch_size": 0}, "max_batch_size"), ({"max_queue_size": 0}, "max_queue_size"),
        ({"max_length": 0}, "max_length"), ({"prefix_cache_bytes": -1}, "prefix_cache_bytes"),
        ({"executor": "fast"}, "executor"), ({"executor": "graph"}, "CUDA device"), ({"draft": "bigram"}, "draft"),
        ({"draft": Gate(40)}, "vocabularies"), ({"draft": Gate(61), "executor": RecordingExecutor()}, "is Python"),
    ],
)  # fmt: skip
def test_engines_that_cannot_be(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sm.Engine(pair("mamba1")[0], **options)
    with pytest.raises(ValueError, match="target must be a model"):
        sm.Engine("builtin:target")


def test_prompts_are_read_between_rounds(monkeypatch) -> None:
    """A long prompt stops nobody: one that came with it is through while it is read."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 4)
    ended, end = [], scheduler.Job.end
    monkeypatch.setattr(scheduler.Job, "end", lambda job, *rest: (ended.append(job.request.prompt), end(job, *rest)))
    (target, draft), asked = pair("mamba1"), [sm.Request([5] * 1500, 3), sm.Request([3], 30)]
    with sm.Engine(target, draft=draft, acceptance="coupled", max_batch_size=2) as engine:
        with engine._scheduler._changed:  # both are there when the first is taken
            completions = [engine.submit(one) for one in asked]
        for one, completion in zip(asked, completions, strict=True):
            assert_is_alone(target, one, completion.result(WAIT), alone(target, one))
    assert ended == [[3], [5] * 1500]


@torch.inference_mode()
def test_an_engine_that_is_opened_in_inference_mode() -> None:
    """Catches: its own thread could not write into memory that was made there."""
    target, draft = pair("mamba1")
    asked = sm.Request([1, 2, 3], 12)
    with sm.Engine(target, draft=draft, max_batch_size=2) as engine:
        assert_is_alone(target, asked, engine.submit(asked).result(WAIT), alone(target, asked))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_no_engine() -> None:
    """Catches: whoever submitted there waited for ever, since threads are not forked."""
    target, _ = pair("mamba1")
    with sm.Engine(target) as engine:
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                engine.submit(sm.Request([1], 2)).result(WAIT)
            except RuntimeError as error:
                os._exit(str(error) != "the engine is closed")
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
