"""What comes of a request, token by token, and whoever waits for it."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..models.text import TextStream
from .request import CheckedRequest


class TokenOutput(NamedTuple):
    """A new token. text: what this token completes; "" if nothing yet, never half a character, nothing of a stop.
    drafted: it came from the draft. logprob, top_logprobs: the target's natural logarithms, of it and of the likeliest
    tokens with their ids, before bias, penalties and temperature."""

    token: int
    text: str
    drafted: bool
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class RequestOutput:
    """A complete text. tokens: new ones, a stop token included. text: without what stopped it. finish_reason: "eos",
    "stop", "length" or "cancelled". cached_tokens: of the prompt, from the prefix cache. draft_tokens: that were
    tested; accepted_tokens: those of them that stood."""

    tokens: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int
    outputs: list[TokenOutput]


class Job:
    """A request on its way through an engine: what has come of it so far, and who wants to be told.

    One thread calls ``extend``, then ``end`` once; any may read. cancel: whom to tell that nobody wants the rest.
    """

    def __init__(self, request: CheckedRequest, stream: TextStream | None, cancel: "Callable[[Job], None]") -> None:
        self.request, self.stream, self.cancel = request, stream, cancel
        self.cached_tokens = self.draft_tokens = self.accepted_tokens = 0
        self.outputs: list[TokenOutput] = []
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def extend(self, outputs: list[TokenOutput], draft_tokens: int, accepted_tokens: int) -> None:
        """New tokens, and the counts of the draft's that were tested and that stood, so far."""
        self.draft_tokens, self.accepted_tokens = draft_tokens, accepted_tokens  # before whoever reads sees the tokens
        self.outputs += outputs
        self._tell()

    def end(self, finish_reason: str, error: Exception | None = None) -> None:
        tokens, text = [output.token for output in self.outputs], "".join(output.text for output in self.outputs)
        self.output = RequestOutput(
            tokens, text, finish_reason, len(self.request.prompt), self.cached_tokens, self.draft_tokens,
            self.accepted_tokens, self.outputs,
        )  # fmt: skip
        self.error = error
        self.ended.set()
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    @contextlib.contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Meanwhile it is called whenever there is more."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


class Completion:
    """A request that was submitted: iterate over its tokens as they come, in a thread or in asyncio, or wait for all.

    Several may iterate; each sees every token. A completion that nobody holds any more is cancelled.
    """

    def __init__(self, job: Job, engine: object) -> None:
        self._job = job
        self._engine = engine  # stays open as long as somebody waits

    def __iter__(self) -> Iterator[TokenOutput]:
        """Tokens as they come; ends with the text.

        Raises:
            Exception: the request's own error, behind the tokens that came before it.
        """
        told, seen = queue.SimpleQueue(), 0
        with self._job.telling(lambda: told.put(None)):
            while True:
                ended, fresh = self._job.ended.is_set(), self._job.outputs[seen:]
                yield from fresh
                seen += len(fresh)
                if ended:
                    break
                told.get()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        """The same for asyncio; the event loop does not wait."""
        loop, more, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed
                loop.call_soon_threadsafe(more.set)

        with self._job.telling(tell):
            while True:
                more.clear()
                ended, fresh = self._job.ended.is_set(), self._job.outputs[seen:]
                for output in fresh:
                    yield output
                seen += len(fresh)
                if ended:
                    break
                if not fresh:
                    await more.wait()
        self._raise()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The complete text. timeout: in seconds.

        Raises:
            TimeoutError: it is not complete by then; it goes on.
            Exception: the request's own error.
        """
        if not self._job.ended.wait(timeout):
            raise TimeoutError(f"the request is not complete after {timeout} s")
        self._raise()
        return self._job.output

    def cancel(self) -> None:
        """Ends it within a round, with what there is by then; nothing happens if it is complete."""
        if not self.done:
            self._job.cancel(self._job)

    @property
    def done(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self._job.ended.is_set()

    @property
    def draft_tokens(self) -> int:
        """Drafted tokens that were tested so far."""
        return self._job.draft_tokens

    @property
    def accepted_tokens(self) -> int:
        """Those of them that stood."""
        return self._job.accepted_tokens

    def _raise(self) -> None:
        if self._job.error is not None:
            raise self._job.error

    def __del__(self) -> None:
        self.cancel()
