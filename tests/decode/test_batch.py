"""Rows come and go between rounds while others run: a row's text is that of the row alone, whatever its neighbours."""

import dataclasses
import itertools
import random

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode.drafts import as_draft
from speculative_mamba.decode.lookahead import FixedLookahead
from speculative_mamba.decode.sampling import bias_capacity
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

both_kinds = pytest.mark.parametrize("kind", [RecordingExecutor, sm.EagerExecutor])
MIX = (
    sm.SamplingParams(),
    sm.SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=3),
    sm.SamplingParams(temperature=1.3, repetition_penalty=1.3, seed=4),
    sm.SamplingParams(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={3: 2.0}, seed=5),
)


@dataclasses.dataclass
class Request:
    """A text that somebody wants, so many rounds after the first."""

    prompt: list[int]
    max_new_tokens: int
    params: sm.SamplingParams = MIX[0]
    arrives: int = 0
    retired_after: int | None = None  # tokens
    use_draft: bool = True
    stops: tuple[int, ...] = ()


class Clients:
    """Admits each request to the first row that is free when it has arrived, and keeps what became of it."""

    def __init__(self, requests: list[Request], chunk: int | None) -> None:
        self.chunk = chunk
        self.waiting = sorted(requests, key=lambda request: request.arrives)
        self.running: dict[int, Request] = {}
        self.done: list[tuple[Request, object]] = []

    def visit(self, loop: sm.DecodeLoop, now: int) -> bool:
        batch = loop.batch
        for index, request in list(self.running.items()):
            row = batch.rows[index]
            new = len(row.tokens) - len(request.prompt)
            if request.retired_after is not None and new >= request.retired_after and row.finish_reason is None:
                batch.retire(index)
            if row.finish_reason is not None:
                self.done.append((self.running.pop(index), row))
        for index in set(range(len(batch.rows))) - set(self.running):
            if self.waiting and self.waiting[0].arrives <= now:
                self.running[index] = request = self.waiting.pop(0)
                loop.admit(
                    index, request.prompt, request.params, request.max_new_tokens, use_draft=request.use_draft,
                    stop_token_ids=request.stops, output_logits=True, chunk=self.chunk,
                )  # fmt: skip
        return bool(self.waiting or self.running)


def serve(target, draft, requests, rows, executor, lookahead=3, coupled=True, chunk=None):
    """Runs all requests in a batch of so many rows, whose prompts are read so many tokens at a time."""
    batch = sm.Batch(rows)
    chooser = FixedLookahead(lookahead if draft is not None else 0)
    draft = draft and as_draft(draft, target, batch.texts, executor.captures)
    clients, now = Clients(requests, chunk), 0
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(target, draft, batch, executor, chooser, coupled=coupled)
        while clients.visit(loop, now):
            loop.read(chunk or 1)
            loop.step()
            now += 1
        loop.close()
    return clients.done


def alone(target, request, **options):
    params = dataclasses.replace(request.params, seed=[request.params.seed])
    return sm.generate(
        target, [request.prompt], max_new_tokens=request.max_new_tokens, sampling=params, stop_token_ids=request.stops,
        output_logits=True, **options,
    )  # fmt: skip


def check(target, done, requests, **options):
    assert len(done) == len(requests)
    for request, row in done:
        expected = alone(target, request, **options)
        text, logits = expected.sequences[0].tolist(), expected.logits[0]
        if request.retired_after is not None and row.finish_reason == "stop":
            new = len(row.tokens) - len(request.prompt)
            assert request.retired_after <= new
            text, logits = text[: len(row.tokens)], logits[:new]
        assert row.tokens == text
        assert_bitwise_equal(torch.cat(row.logits), logits, f"logits of {request}")


def requests_of(prompt, seed, count=7, sampled=True):
    """Prompts, budgets, stops and arrivals drawn at random; some are given up after a few tokens, some undrafted."""
    source = random.Random(seed)
    return [
        Request(
            prompt(source.choice([1, 2, 5, 30, 66]), seed=source.randrange(9)), source.choice([1, 2, 7, 15]),
            source.choice(MIX) if sampled else MIX[0], source.randrange(25), source.choice([None, None, 3]),
            source.random() < 0.7, source.choice([(), (5, 17), (3, 8, 21)]),
        )
        for _ in range(count)
    ]  # fmt: skip


@both_kinds
@pytest.mark.parametrize("draft", ["near", "random", "ngram", None])
@pytest.mark.parametrize("seed", range(2))
def test_a_row_is_what_it_is_alone(pair, prompt, kind, draft, seed) -> None:
    """Greedy and coupled rows of any parameters and stop tokens side by side: text and logits, bit for bit."""
    models, requests = pair(), requests_of(prompt, seed)
    draft = models.drafts.get(draft, draft and sm.NgramDrafter(61, shortest=1))
    for chunk in (None, 16):
        done = serve(models.target, draft, requests, 3, kind(), chunk=chunk)
        check(models.target, done, requests, acceptance="coupled")


@both_kinds
@pytest.mark.parametrize("kind_of_target", ["mamba2-in-llama", "llama"])
@pytest.mark.parametrize("mode", ["snapshots", "replay"])
def test_of_any_architecture(family, prompt, kind, kind_of_target, mode) -> None:
    """A row that comes again begins with a fresh state, and memory grows while others run."""
    target, drafts = family(kind_of_target, 0, mode)
    requests = [
        dataclasses.replace(request, prompt=request.prompt * 3) for request in requests_of(prompt, 5, sampled=False)
    ]
    for name, chunk in (("near", None), ("llama", 40)):
        check(target, serve(target, drafts[name], requests, 2, kind(), chunk=chunk), requests)


@both_kinds
def test_under_rejection_sampling_too(pair, prompt, kind) -> None:
    """The draws of a row are its own, and so are the draft's."""
    models, requests = pair(), requests_of(prompt, 7)
    for lookahead in (1, 4):
        executor = kind()
        done = serve(models.target, models.drafts["near"], requests, 3, executor, lookahead, coupled=False)
        for request, row in done:
            draft = models.drafts["near"] if request.use_draft else None
            text = alone(models.target, request, draft=draft, lookahead=lookahead).sequences[0].tolist()
            assert row.tokens == text[: len(row.tokens)] and (
                len(row.tokens) == len(text) or row.finish_reason == "stop"
            )


def test_a_plain_drafter_is_told_of_rows_that_come(pair, prompt, plain) -> None:
    """Its ``begin`` gets the texts of all rows as they are then."""
    target = pair().target
    requests = [Request(prompt(3), 9), Request(prompt(5), 4), Request(prompt(8), 9, arrives=3)]
    texts = [plain(target, request.prompt, 9)[0] for request in requests]

    class Looks(ScriptedDraft):
        """Knows all texts, and finds each row's among them."""

        began = 0

        def begin(self, prompts, lookahead, sampler):
            self.began += 1
            for text in prompts:
                assert text == [0] or any(text == whole[: len(text)] for whole in texts)

        def propose(self, rows, accepted, lookahead):
            self._texts = [next((text for text in texts if text[: len(row)] == row), [0]) for row in rows]
            return super().propose(rows, accepted, lookahead)

    draft = Looks([[]], 61, lambda row, at: at % 3 != 0)
    done = serve(target, draft, requests, 2, sm.EagerExecutor())
    assert draft.began == 2
    check(target, done, requests)


def test_a_row_that_was_given_up_and_taken_while_rounds_are_queued(pair, prompt, plain) -> None:
    """What those rounds commit belongs to nobody."""
    target, executor, batch = pair().target, RecordingExecutor(), sm.Batch(2)
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(target, as_draft(target, target, batch.texts, True), batch, executor, FixedLookahead(3))
        for index in range(2):
            loop.admit(index, prompt(4, seed=index), MIX[0], 30)
        for _ in range(2):
            loop.step()
        assert executor.pending == 2 and batch.rows[0].tokens == prompt(4)
        batch.retire(0, "cancelled")
        loop.admit(0, prompt(7), MIX[0], 12)
        while batch.generating():
            loop.step()
    assert batch.rows[0].tokens == plain(target, prompt(7), 12)[0]
    assert batch.rows[1].tokens == plain(target, prompt(4, seed=1), 30)[0]
    assert batch.rows[0].finish_reason == "length"


def test_a_row_that_is_generating_is_not_given_away(pair, prompt) -> None:
    batch, executor = sm.Batch(1), sm.EagerExecutor()
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(pair().target, None, batch, executor, FixedLookahead(0))
        with pytest.raises(ValueError, match="row 0"):
            loop.admit(0, prompt(3), MIX[0], 0)
        loop.admit(0, prompt(3), MIX[0], 5)
        with pytest.raises(ValueError, match="row 0 is still generating"):
            loop.admit(0, prompt(4), MIX[0], 5)
    assert batch.rows[0].tokens == prompt(3)


def test_one_capture_serves_every_mix(pair, prompt) -> None:
    """Sampling parameters are data."""
    executor, models = RecordingExecutor(), pair()
    for seed in range(2):
        requests = requests_of(prompt, seed, 4)
        check(models.target, serve(models.target, models.drafts["near"], requests, 2, executor), requests,
              acceptance="coupled")  # fmt: skip
    assert executor.num_captures == 1 and bias_capacity(MIX) == 16


@both_kinds
def test_rows_go_on_while_a_prompt_is_read(pair, prompt, plain, kind) -> None:
    """A row that generates gains in every round; the one whose prompt is read gains nothing before its end."""
    target, executor, batch = pair().target, kind(), sm.Batch(2)
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(target, as_draft(target, target, batch.texts, True), batch, executor, FixedLookahead(1))
        loop.admit(0, prompt(4), MIX[0], 60)
        for _ in range(3):
            loop.step()
        loop.admit(1, prompt(66), MIX[0], 5, chunk=16)
        lengths, through = [], []
        while not through:
            assert batch.generating() == [0] and list(batch.reading) == [1]
            through = loop.read(16)
            loop.step()
            lengths.append(len(batch.rows[0].tokens))
        assert through == [1] and len(lengths) == 5, "65 tokens of the target, 66 of the draft, 16 of each at a time"
        assert all(after == before + 2 for before, after in itertools.pairwise(lengths[2:]))
        while batch.generating():
            loop.step()
    for index, (given, count) in enumerate([(prompt(4), 60), (prompt(66), 5)]):
        assert batch.rows[index].tokens == plain(target, given, count)[0]


@both_kinds
def test_a_row_is_given_up_while_its_prompt_is_read(pair, prompt, plain, kind) -> None:
    target, executor, batch = pair().target, kind(), sm.Batch(1)
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(target, as_draft(target, target, batch.texts, True), batch, executor, FixedLookahead(2))
        loop.admit(0, prompt(66), MIX[0], 5, chunk=16)
        loop.read(20)
        batch.retire(0, "cancelled")
        assert not batch.reading and loop.read(20) == []
        loop.admit(0, prompt(30), MIX[0], 9)
        while batch.generating():
            loop.step()
    assert batch.rows[0].tokens == plain(target, prompt(30), 9)[0]


@both_kinds
def test_a_broken_row_ends_alone(kind) -> None:
    """Its logits are NaN behind one token; all others end as they would without it."""
    table = torch.eye(20).roll(1, dims=1)
    table[7] = torch.nan
    target, executor, batch = TableModel(table), kind(), sm.Batch(3, isolate_errors=True)
    with torch.no_grad(), executor:
        loop = sm.DecodeLoop(target, None, batch, executor, FixedLookahead(0))
        for index, token in enumerate((4, 9, 11)):
            loop.admit(index, [token], MIX[0], 8)
        while batch.generating():
            loop.step()
    assert [row.finish_reason for row in batch.rows] == ["error", "length", "length"]
    assert [row.tokens for row in batch.rows] == [[4, 5, 6, 7], list(range(9, 18)), list(range(11, 20))]
    assert str(batch.rows[0].error).startswith("row 0, position 0 of the window: logits are NaN")
    assert batch.rows[1].error is None and batch.snapshot(0) == (None, None)


def test_generate_tells_how_far_prompts_are_read(pair, prompt):
    """A part at a time, with the text and the bits of one; what a cache has read does not come again."""
    models, told, cache = pair(), [], sm.GenerationCache()
    options = {"draft": models.drafts["near"], "max_new_tokens": 4, "stop_token_ids": (), "output_logits": True}
    prompts = [prompt(1300), prompt(700)]
    watched = sm.generate(models.target, prompts, cache=cache, on_prefill=told.append, **options)
    assert sum(told) == 1300 + 700 and len(told) == 3 + 2 and max(told) == 512
    plain = sm.generate(models.target, prompts, **options)
    for row in range(2):
        assert torch.equal(watched.sequences[row], plain.sequences[row])
        assert_bitwise_equal(watched.logits[row], plain.logits[row], f"row {row}")
    told.clear()
    sm.generate(models.target, cache.sequences, cache=cache, on_prefill=told.append, **options)
    assert sum(told) < 20
