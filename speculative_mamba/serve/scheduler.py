"""Jobs in the rows of one batch, served on a thread of its own: between two rounds they come and go."""

import queue
import threading
import time
from collections import Counter, deque

import torch

from ..decode import Batch, DecodeLoop, RowTokens
from ..decode.drafts import Draft, Drafter, as_draft
from ..decode.executors import Executor
from ..decode.logprobs import token_logprobs
from ..decode.lookahead import FixedLookahead
from ..models.runner import LanguageModel
from .completion import Job, TokenOutput
from .prefix_cache import PrefixCache

PREFILL_TOKENS = 256  # of prompts that are read between two rounds, one prompt's at a time
PREFILL_ROUNDS = 2  # or as many as so many rounds verify, if those are more
RECENT = 10.0  # seconds
# What may go wrong in a round, and with the next ones right again: no memory, bad values, a file that was changed.
_FAILURES = (RuntimeError, ValueError, MemoryError, OSError)


class QueueFullError(RuntimeError):
    """The queue has no place; retry later."""


class Scheduler:
    """The rows of an engine. ``submit`` and ``close`` may be called by any thread.

    prefix_cache: None keeps no states. stats: of ``DecodeLoop``, over all of its time. requests: how many ended, by
    finish reason. cached_tokens: of prompts, that the prefix cache knew. cache_bytes: the memory of the models' caches.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel | Drafter | Draft | None,
        executor: Executor,
        *,
        lookahead: int,
        coupled: bool,
        rows: int,
        max_queue_size: int,
        max_length: int | None,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self._target, self._draft, self._executor = target, draft, executor
        self._lookahead = FixedLookahead(0 if draft is None else lookahead)
        self._coupled, self._rows, self._max_length = coupled, rows, max_length
        self._max_queue_size, self._prefix_cache = max_queue_size, prefix_cache
        self._prefill_tokens = max(PREFILL_TOKENS, PREFILL_ROUNDS * rows * (self._lookahead.all[0] + 1))
        self._changed = threading.Condition()  # of what follows
        self._waiting: dict[Job, None] = {}
        self._running: dict[int, Job] = {}
        self._closing = False
        self._recent: deque[tuple[float, int]] = deque()  # times, and tokens that came
        # A completion may be collected, and so cancelled, in any line of any thread: that takes no lock.
        self._cancelled: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.requests: Counter[str] = Counter()
        self.cached_tokens = 0
        with torch.no_grad(), executor:
            self._loop = self._open()
        self.stats = self._loop.stats
        self.cache_bytes = sum(tensor.nbytes for tensor in self._loop.batch.round.tensors())
        self._thread = threading.Thread(target=self._run, name="speculative-mamba-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """
        Raises:
            QueueFullError: too many wait.
            RuntimeError: the engine is closed, or is that of a process from which this one was forked.
        """
        with self._changed:
            if not self.alive:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self._max_queue_size:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; retry later")
            self._waiting[job] = None
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Takes effect before the next round; where none runs, there is nothing to cancel."""
        self._cancelled.put(job)

    def counts(self) -> tuple[int, int, float]:
        """Jobs that wait, jobs that run, and tokens per second of late."""
        with self._changed:
            self._forget()
            return len(self._waiting), len(self._running), sum(tokens for _, tokens in self._recent) / RECENT

    @property
    def alive(self) -> bool:
        """Whether it takes jobs and serves them."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: bool) -> None:
        """Serves all that are there, or cancels them, and takes no more. Returns when the thread has ended."""
        with self._changed:
            self._closing = True
            for job in () if drain else (*self._waiting, *self._running.values()):
                self.cancel(job)
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.no_grad(), self._executor:
                while self._round():
                    pass
                self._loop.close()
        finally:
            with self._changed:
                self._closing = True
                left = [*self._waiting, *self._running.values()]
                self._waiting, self._running = {}, {}
            for job in left:
                self._end(job, "error", RuntimeError("the engine has broken down"))

    def _round(self) -> bool:
        """A round of the rows that generate, and what is due before it. Waits for work; False if none will come."""
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            if not (self._waiting or self._running):
                return False
        try:
            self._cancel()
            self._admit()
            self._read()
            if self._loop.batch.generating():
                self._loop.step()
        except _FAILURES as error:
            self._break_off(error)
        self._collect()
        return True

    def _cancel(self) -> None:
        while not self._cancelled.empty():
            job = self._cancelled.get()
            if job in self._waiting:
                with self._changed:
                    del self._waiting[job]
                self._end(job, "cancelled")
            for index, running in self._running.items():
                if running is job and self._loop.batch.rows[index].finish_reason is None:
                    self._loop.batch.retire(index, "cancelled")
        self._collect()

    def _admit(self) -> None:
        """Jobs that wait get the rows that are free."""
        for index in set(range(self._rows)) - set(self._running):
            with self._changed:
                job = next(iter(self._waiting), None)
                if job is None:
                    return
                del self._waiting[job]
                self._running[index] = job
            request, states = job.request, (None, None)
            if self._prefix_cache is not None:
                states = self._prefix_cache.find(request.prompt)
            job.cached_tokens = 0 if states[0] is None else len(states[0].tokens)
            self.cached_tokens += job.cached_tokens
            self._loop.admit(
                index, request.prompt, request.sampling, request.max_new_tokens, rng_key=request.rng_key,
                states=states, stop_token_ids=request.stop_token_ids, stream=job.stream, use_draft=request.use_draft,
                output_logits=request.logprobs is not None, chunk=self._prefill_tokens,
            )  # fmt: skip

    def _read(self) -> None:
        """Goes on with prompts; those that are read are kept."""
        for index in self._loop.read(self._prefill_tokens):
            if self._prefix_cache is not None:
                self._prefix_cache.store(*self._loop.batch.snapshot(index))

    def _commit(self, committed: list[RowTokens]) -> None:
        """Hands out what a round gave: all at once, because whoever waits takes turns with this thread from then on."""
        extended = []
        for index, tokens, drafted in committed:
            row, job = self._loop.batch.rows[index], self._running[index]
            texts = enumerate(zip(tokens, row.pieces or [""] * len(tokens), strict=True))
            outputs = [TokenOutput(token, piece, at < drafted) for at, (token, piece) in texts]
            if row.output_logits:
                known = token_logprobs(row.logits[-1], tokens, job.request.logprobs)
                outputs = [TokenOutput(*output[:3], *its) for output, its in zip(outputs, known, strict=True)]
            row.pieces, row.logits = [], []
            extended.append((job, outputs, row.tested, row.accepted))
        for job, *gained in extended:
            job.extend(*gained)
        with self._changed:
            self._recent.append((time.monotonic(), sum(len(tokens) for _, tokens, _ in committed)))
            self._forget()

    def _forget(self) -> None:
        before = time.monotonic() - RECENT
        while self._recent and self._recent[0][0] < before:
            self._recent.popleft()

    def _collect(self) -> None:
        """Rows whose texts are complete become free."""
        batch = self._loop.batch
        for index, job in list(self._running.items()):
            row = batch.rows[index]
            if row is None or row.finish_reason is None:
                continue
            if self._prefix_cache is not None:
                self._prefix_cache.store(*batch.snapshot(index))
            with self._changed:
                del self._running[index]
            self._end(job, row.finish_reason, row.error)

    def _end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        self.requests[reason] += 1
        job.end(reason, error)

    def _break_off(self, error: Exception) -> None:
        """A round failed: nobody knows what the rows hold, so their requests end with it, and others may follow."""
        with self._changed:
            jobs, self._running = list(self._running.values()), {}
        line = str(error).partition("\n")[0]
        for job in jobs:
            failure = RuntimeError(f"a round of the engine failed: {type(error).__name__}: {line}")
            failure.__cause__ = error
            self._end(job, "error", failure)
        self._loop.close()
        self._loop = self._open()
        self._loop.stats = self.stats

    def _open(self) -> DecodeLoop:
        batch = Batch(self._rows, isolate_errors=True)
        draft = self._draft
        if draft is not None:
            draft = as_draft(draft, self._target, batch.texts, self._executor.captures)
        models = [self._target] if draft is None or draft.model is None else [self._target, draft.model]
        self._executor.check(models, None)
        loop = DecodeLoop(
            self._target, draft, batch, self._executor, self._lookahead, coupled=self._coupled,
            on_commit=self._commit, prompt_length=self._max_length or 0,
        )  # fmt: skip
        if self._max_length is not None:
            batch.round.reserve(self._max_length + self._lookahead.all[0] + 1)
        return loop
