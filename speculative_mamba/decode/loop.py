"""The rounds of a batch, queued and collected."""

import time
from collections.abc import Callable, Sequence

import torch

from ..models.identity import IdentityKey, backend_of
from ..models.runner import LanguageModel
from ..ops.commit_tokens import BatchState, Record
from .batch import Batch, RowTokens
from .cache import GenerationCache
from .drafts import Draft
from .executors import Executor
from .lookahead import AdaptiveLookahead, FixedLookahead
from .round import Round
from .sampling import LogitsProcessor, Sampler, SamplingParams, bias_capacity, mix_of
from .stats import GenerationStats

AHEAD = 256  # tokens for which memory is made at a time


class DecodeLoop:
    """A batch on an executor: rounds are launched, their records are collected, rows come and go between them.

    params: those of all rows to come; None: any may come. prompt_length, max_new_tokens: of the longest row, for which
    memory is made at once. For use within ``with executor:``.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: Draft | None,
        batch: Batch,
        executor: Executor,
        lookahead: AdaptiveLookahead | FixedLookahead,
        params: Sequence[SamplingParams] | None = None,
        *,
        coupled: bool = False,
        processor: LogitsProcessor | None = None,
        on_commit: Callable[[list[RowTokens]], None] | None = None,
        on_prefill: Callable[[int], None] | None = None,
        prompt_length: int = 0,
        max_new_tokens: int = 0,
    ) -> None:
        began = time.perf_counter()
        self.batch, self._executor, self._lookahead = batch, executor, lookahead
        self._on_commit, self._on_prefill = on_commit, on_prefill
        self._window = max(lookahead.all) + 1
        self._skipped = False  # whether the draft was left out of the last round
        counts = [0] * (self._window - 1)
        self.stats = GenerationStats(tested_per_position=counts, accepted_per_position=list(counts))

        every_mix = executor.captures or params is None

        def make() -> Round:
            state = BatchState.empty(len(batch.rows), self._window, target.device)
            sampler = Sampler(
                params, target.vocab_size, state, coupled=coupled,
                every_mix=every_mix,
                backend=backend_of(target), processor=processor, texts=batch if processor else None,
            )  # fmt: skip
            return Round(target, draft, sampler, state, executor.captures)

        drafted = () if draft is None else draft.identity()
        mix = bias_capacity(params) if every_mix else mix_of(params)
        key = IdentityKey(target), *drafted, len(batch.rows), lookahead.all, mix, coupled, processor is None
        entries = prompt_length + min(max_new_tokens, AHEAD) + self._window
        # An engine's thread and an executor's later calls work on this memory, where there may be no inference mode.
        with torch.inference_mode(False), torch.no_grad():
            batch.round = executor.prepare(key, make, entries, lookahead.all)
        self._draft = batch.round.draft
        self.stats.setup_s = time.perf_counter() - began

    def admit(
        self, index: int, prompt: Sequence[int], params: SamplingParams, max_new_tokens: int, **options: object
    ) -> None:
        """``Batch.admit``, with memory for the text."""
        began = time.perf_counter()
        self._ensure_capacity(len(prompt) + min(max_new_tokens, AHEAD) + self._window)
        self.batch.admit(index, prompt, params, max_new_tokens, **options)
        self.stats.prompt_tokens += len(prompt)
        self.stats.prefill_s += time.perf_counter() - began

    def read(self, tokens: int) -> list[int]:
        """Goes on with the prompts that are being read, by about so many tokens; rows take turns, so that a short
        prompt does not wait for a long one. Rows that are through, and generate from now on."""
        began, reading, through = time.perf_counter(), self.batch.reading, []
        while tokens > 0 and reading:
            index = next(iter(reading))
            read = self.batch.read(index)
            tokens -= read
            if read and self._on_prefill is not None:
                self._on_prefill(read)
            if index not in reading:
                through.append(index)
            elif tokens <= 0:
                reading[index] = reading.pop(index)  # to the end
        self.stats.prefill_s += time.perf_counter() - began
        return through

    def step(self) -> None:
        """Queues a round, and books the oldest if more are pending than should be."""
        began = time.perf_counter()
        if self._draft is not None:
            self._draft.ready()
        ready = time.perf_counter()
        self._launch()
        while self._executor.pending > self._executor.queue_depth:
            self._collect()
        self.stats.prefill_s += ready - began
        self.stats.decode_s += time.perf_counter() - ready

    def _launch(self) -> None:
        """Queues the next round, unless the last tokens have come meanwhile."""
        lookahead = self._lookahead.next()
        if self._lookahead.dropped and self.stats.draft_dropped_at is None:
            self.stats.draft_dropped_at = self.stats.rounds
        if lookahead and self._skipped and self._draft.stateful:
            self._catch_up()
        self._ensure_capacity(0)
        active = self.batch.generating()
        if not active:
            return
        rows = [self.batch.rows[index] for index in active]
        if not self._executor.captures:  # what goes beyond every row's budget need not be drafted
            drafting = [row.remaining for row in rows if row.use_draft]
            lookahead = self.batch.round.trimmed(lookahead, max(drafting, default=1) - 1)
        self._skipped = not lookahead
        self.batch.launching()
        self._executor.launch(lookahead, any(row.output_logits for row in rows))

    def _catch_up(self) -> None:
        """The draft reads what came in rounds without it."""
        self._drain()
        for index in self.batch.generating():
            row = self.batch.rows[index]
            if row.draft_at is None:  # nothing is drafted for it
                continue
            (slot, length), row.draft_at = row.draft_at, None
            state = self._draft.snapshot(index, slot, row.tokens[:length])
            self._draft.prefill(index, row.tokens, state)
            row.draft_at = 0, len(row.tokens)

    def _ensure_capacity(self, entries: int) -> None:
        """Memory for so many tokens in a row, and for those of the rounds that are queued and of the next one."""
        executor = self._executor
        if executor.captures and not executor.fits(max(entries, self._entries(executor.pending * self._window))):
            self._drain()
            with torch.inference_mode(False), torch.no_grad():
                executor.grow(max(entries, self._entries(AHEAD)))

    def _entries(self, tokens: int) -> int:
        """What the longest text takes when each row has so many more, within its budget, and a window is verified."""
        rows = [row for row in self.batch.rows if row is not None]
        return max((len(row.tokens) + min(row.remaining, tokens) for row in rows), default=0) + self._window

    def _drain(self) -> None:
        while self._executor.pending:
            self._collect()

    def _collect(self) -> None:
        """Waits for the oldest round, and appends to each row what it gained."""
        stats = self.stats
        result, record, seconds = self._executor.collect()
        tested, accepted = stats.tested, stats.accepted
        fresh = self.batch.commit(result, record, stats)
        stats.rounds += bool(fresh)
        stats.draft_s += result.draft_s
        stats.verify_s += result.verify_s
        # Rows beside whose tokens none counts are as good as refused ones.
        unmatched = sum([record[row][Record.NUM_DRAFT_TOKENS] == 0 for row, *_ in fresh]) if result.proposed else 0
        self._lookahead.observe(result.proposed, stats.tested - tested + unmatched, stats.accepted - accepted, seconds)
        if fresh and self._on_commit is not None:
            self._on_commit(fresh)

    def close(self, cache: GenerationCache | None = None, prompts: Sequence[list[int]] = ()) -> None:
        """No more rounds; the batch keeps its texts. They and their states go into the cache, if there is one.

        prompts: for rows that were not admitted any more.
        """
        try:
            if cache is not None:
                self._save(cache, prompts)
        finally:
            self.stats.measure_memory(self.batch.round.state.last.device)
            self.batch.round = None  # what is on the device is freed at once, not when cycles are looked for
            self._executor.close()

    def _save(self, cache: GenerationCache, prompts: Sequence[list[int]]) -> None:
        texts = [list(prompt) for prompt in prompts]
        targets, drafts = list(cache.target_states), list(cache.draft_states)
        for index, row in enumerate(self.batch.rows):
            if row is not None:
                texts[index] = list(row.tokens)
                target_state, draft_state = self.batch.snapshot(index)
                targets[index] = target_state or targets[index]
                drafts[index] = draft_state or drafts[index]
        cache.store(texts, targets, drafts)
