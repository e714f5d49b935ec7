"""Continuous batching: requests join free rows and leave, and each text is that of its request alone."""

import weakref
from dataclasses import dataclass

from ..decode.drafts import Draft, Drafter, NgramDrafter
from ..decode.executors import Executor, as_executor
from ..decode.inputs import check_generation, check_models
from ..decode.sampling import SamplingParams
from ..models.runner import LanguageModel
from ..models.text import TextStream
from ..models.tokenizer import tokenizer_of
from ..ops.values import is_int, shown
from .completion import Completion, Job
from .prefix_cache import PrefixCache
from .request import Request, checked
from .scheduler import Scheduler


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was opened. queued, running: requests at this moment. requests: those that ended, by
    finish reason, "error" among them. prompt_tokens: of requests that got a row; cached_tokens: those of them that the
    prefix cache knew. draft_tokens: that were tested; accepted_tokens: those of them that stood. tokens_per_s: of the
    last ten seconds. cache_bytes: of the models' caches. alive: whether requests are taken and served."""

    queued: int
    running: int
    max_batch_size: int
    max_queue_size: int
    requests: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    rounds: int
    draft_tokens: int
    accepted_tokens: int
    tokens_per_s: float
    cache_bytes: int
    prefix_cache_bytes: int
    prefix_cache_entries: int
    alive: bool


class Engine:
    """Serves requests as they come, in the rows of one batch, on a thread of its own.

    Greedy text is bit for bit that of ``generate`` for the request alone, whoever else is served; so is sampled text
    with ``acceptance="coupled"``. Under ``"rejection"`` sampled text has the distribution of plain sampling.

    target, draft, lookahead, acceptance, executor: as of ``generate``; a ``GraphExecutor`` is to be of its own.
    max_batch_size: rows. max_queue_size: requests that may wait for one. max_length: tokens of the longest text, prompt
    included, for which memory is made at once; None: memory grows with the texts. prefix_cache_bytes: for the states of
    prompts and turns that were read; 0 keeps none. cache_bytes: what the models' caches take.

    A request that goes wrong ends with its error and no other does. If a whole round fails, for want of memory or the
    like, the running requests end with that error, and those that wait are served.

    Raises:
        ValueError: an argument is out of range, or the models do not fit together.
    """

    def __init__(
        self,
        target: LanguageModel,
        *,
        draft: LanguageModel | Drafter | Draft | str | None = None,
        lookahead: int = 4,
        acceptance: str = "rejection",
        max_batch_size: int = 8,
        max_queue_size: int = 1024,
        max_length: int | None = None,
        prefix_cache_bytes: int = 0,
        executor: Executor | str = "eager",
    ) -> None:
        check_models(target, draft)
        if not is_int(lookahead):
            raise ValueError(f"lookahead (K) of an engine must be a whole number from 1 to 15, got {shown(lookahead)}")
        check_generation(
            target, 1, lookahead=lookahead, max_new_tokens=1, sampling=SamplingParams(), acceptance=acceptance
        )
        limits = {"max_batch_size": max_batch_size, "max_queue_size": max_queue_size, "max_length": max_length}
        for name, value in limits.items():
            if not (is_int(value) and value >= 1) and not (name == "max_length" and value is None):
                raise ValueError(f"{name} must be a whole number of at least 1, got {shown(value)}")
        if not is_int(prefix_cache_bytes) or prefix_cache_bytes < 0:
            raise ValueError(
                f"prefix_cache_bytes must be a whole number of at least 0, got {shown(prefix_cache_bytes)}"
            )
        draft = NgramDrafter(target.vocab_size) if isinstance(draft, str) else draft
        executor = as_executor(executor)
        self.target, self.draft = target, draft
        self.max_batch_size, self.max_queue_size, self.max_length = max_batch_size, max_queue_size, max_length
        self._tokenizer = tokenizer_of(target)
        self._prefix_cache = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._scheduler = Scheduler(
            target, draft, executor, lookahead=lookahead, coupled=acceptance == "coupled", rows=max_batch_size,
            max_queue_size=max_queue_size, max_length=max_length, prefix_cache=self._prefix_cache,
        )  # fmt: skip
        self.cache_bytes = self._scheduler.cache_bytes
        self._finalizer = weakref.finalize(self, self._scheduler.close, False)  # also when the interpreter ends

    def submit(self, request: Request) -> Completion:
        """Queues a request; any thread may.

        Raises:
            ValueError: the request cannot be served.
            QueueFullError: too many wait; retry later.
            RuntimeError: the engine is closed.
        """
        asked = checked(request, self.target, self.max_length)
        stream = None
        if self._tokenizer is not None:
            stream = TextStream(self._tokenizer, asked.stop_strings, asked.prompt)
        job = Job(asked, stream, self._scheduler.cancel)
        if asked.max_new_tokens:
            self._scheduler.submit(job)
        else:
            job.end("length")
        return Completion(job, self)

    def stats(self) -> EngineStats:
        queued, running, tokens_per_s = self._scheduler.counts()
        counted, kept = self._scheduler.stats, self._prefix_cache
        return EngineStats(
            queued, running, self.max_batch_size, self.max_queue_size, dict(self._scheduler.requests),
            counted.prompt_tokens, self._scheduler.cached_tokens, counted.tokens, counted.rounds, counted.tested,
            counted.accepted, tokens_per_s, self.cache_bytes, 0 if kept is None else kept.nbytes,
            0 if kept is None else len(kept), self._scheduler.alive,
        )  # fmt: skip

    def close(self, drain: bool = True) -> None:
        """Takes no more requests. drain: serves those that are there; else they are cancelled. Waits for that."""
        self._scheduler.close(drain)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)
