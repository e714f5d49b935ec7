"""OpenAI's API over HTTP: routes, limits, streams."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .completion import Completion, TokenOutput
from .engine import Engine
from .fields import ApiError
from .metrics import CONTENT_TYPE, ServerMetrics
from .protocol import Call, ServedModel, model_not_found, read_chat, read_completion
from .responses import Answer
from .scheduler import QueueFullError

_JSON = "application/json"
_CLIENT_GONE = 499  # as nginx has it; nobody reads it
_FAILURES = (ValueError, RuntimeError, MemoryError, OSError)  # of the engine, by which a call may end
_LOG = logging.getLogger(__name__)
_ERROR_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 413: {"Connection": "close"},
    429: {"Retry-After": "1"},
}  # fmt: skip
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a call. body_s: seconds in which its body must come. calls: at once, those included whose answer
    is still being sent."""

    body_bytes: int = 8 * 2**20
    body_s: float = 60.0
    calls: int = 2048


def create_app(
    engine: Engine, served: ServedModel, *, api_key: str | None = None, limits: Limits = Limits()
) -> FastAPI:
    """The application: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/models``, ``/health``, ``/metrics``, and a
    page at ``/``.

    engine: runs the model of ``served``, and is the caller's to close. api_key: what calls of ``/v1`` must bear; None
    for no key.
    """
    api = _Api(engine, served, api_key, limits)
    app = FastAPI(openapi_url=None, exception_handlers={
        ApiError: lambda _, error: _refusal(error),
        HTTPException: lambda request, error: _refusal(_about_route(request, error), error.headers),
        ClientDisconnect: lambda _, error: Response(status_code=_CLIENT_GONE),
        Exception: lambda _, error: _refusal(_refused(error)),
    })  # fmt: skip
    page = resources.files(__package__).joinpath("page.html").read_bytes()
    app.add_api_route("/", lambda: Response(page, media_type="text/html", headers=_PAGE_HEADERS), methods=["GET"])
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", lambda: Response(api.metrics.text(), media_type=CONTENT_TYPE), methods=["GET"])
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(api.authorise)])
    v1.add_api_route("/models", api.models, methods=["GET"])
    v1.add_api_route("/models/{name:path}", api.model, methods=["GET"])
    v1.add_api_route("/completions", api.completions, methods=["POST"])
    v1.add_api_route("/chat/completions", api.chat_completions, methods=["POST"])
    app.include_router(v1)
    app.add_middleware(_CountCalls, metrics=api.metrics, limit=limits.calls)
    return app


def http_server(app: ASGIApp) -> uvicorn.Server:
    """Its ``run(sockets=[…])`` serves until SIGTERM or SIGINT: then nothing new is taken, and what is under way is
    answered. The signal is raised again at the end."""
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, log_level="error", access_log=False,
        server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """A second Ctrl-C breaks answers off; that is no error."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _Api:
    def __init__(self, engine: Engine, served: ServedModel, api_key: str | None, limits: Limits) -> None:
        self._engine, self._served, self._limits = engine, served, limits
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._created = int(time.time())
        self.metrics = ServerMetrics(engine.stats)

    async def authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(what, code="invalid_api_key", status=401)

    async def health(self) -> Response:
        if not self._engine.stats().alive:
            raise ApiError("the engine does not run", status=503, kind="server_error")
        return _json({"status": "ok"})

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, name: str) -> Response:
        if name != self._served.name:
            raise model_not_found(name, self._served)
        return _json(self._described())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    def _described(self) -> dict:
        served = self._served
        return {
            "id": served.name, "object": "model", "created": self._created, "owned_by": "speculative_mamba",
            "max_model_len": served.max_length, "draft": served.draft, "chat": served.chats,
        }  # fmt: skip

    async def _answer(self, request: Request, read: Callable[[object, ServedModel], Call]) -> Response:
        started = time.monotonic()
        body = await _read_body(request, self._limits)
        call, completions = await asyncio.to_thread(self._submit, body, read)
        if call.stream:
            return _EventStream(self._events(call, completions, started), completions)
        try:
            await _unless_gone(self._collect(completions, started), request)
        except _FAILURES as error:
            raise _refused(error) from None
        finally:
            _cancel(completions)
        return _json(Answer(call, self._served).body([completion.result() for completion in completions]))

    def _submit(self, body: bytes, read: Callable[[object, ServedModel], Call]) -> tuple[Call, list[Completion]]:
        """In a thread of its own: long prompts take long to encode."""
        call = read(_parse(body), self._served)
        completions: list[Completion] = []
        try:
            for request in call.requests:
                completions.append(self._engine.submit(request))
        except _FAILURES as error:
            _cancel(completions)
            raise _refused(error) from None
        return call, completions

    async def _collect(self, completions: Sequence[Completion], started: float) -> None:
        async for _ in self._outputs(completions, started):
            pass

    async def _events(self, call: Call, completions: Sequence[Completion], started: float) -> AsyncIterator[bytes]:
        answer = Answer(call, self._served)
        yield _events_of(answer.first_chunks())
        try:
            async for outputs in self._outputs(completions, started):
                yield _events_of(
                    answer.last_chunk(index, completions[index].result())
                    if output is None
                    else answer.token_chunk(index, output, completions)
                    for index, output in outputs
                )
            if call.include_usage:
                yield _events_of([answer.usage_chunk([completion.result() for completion in completions])])
        except _FAILURES as error:
            yield _events_of([_refused(error).body()])
        yield b"data: [DONE]\n\n"

    async def _outputs(
        self, completions: Sequence[Completion], started: float
    ) -> AsyncIterator[list[tuple[int, TokenOutput | None]]]:
        """Tokens of all choices, each with its choice's index, and None where a choice ends: what has come since the
        last time. A slow reader gets more at once.

        Raises:
            what a completion raises.
        """
        ready: list[tuple[int, TokenOutput | None]] = []
        news = asyncio.Event()

        async def follow(index: int, completion: Completion) -> None:
            async for output in completion:
                ready.append((index, output))
                news.set()
            if completion.result().finish_reason == "cancelled":
                raise RuntimeError("the server ends")
            ready.append((index, None))

        tasks = [asyncio.create_task(follow(*numbered)) for numbered in enumerate(completions)]
        for task in tasks:
            task.add_done_callback(lambda _: news.set())
        waiting, complete = True, False
        try:
            while not complete:
                await news.wait()
                news.clear()
                for task in tasks:
                    if task.done():
                        task.result()
                complete = all(task.done() for task in tasks)
                if ready and waiting:
                    self.metrics.first_token.observe(time.monotonic() - started)
                    waiting = False
                outputs = ready[:]
                ready.clear()
                if outputs:
                    yield outputs
            self.metrics.duration.observe(time.monotonic() - started)
        finally:
            for task in tasks:
                task.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, the completions end with it."""

    def __init__(self, events: AsyncIterator[bytes], completions: Sequence[Completion]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._completions)


class _CountCalls:
    """Refuses calls beyond ``limit``, and counts the others by status. A call is whatever sends a body."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, limit: int) -> None:
        self._app, self._metrics, self._limit = app, metrics, limit
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(status=message["status"]).inc()
            await send(message)

        if self._under_way >= self._limit:
            busy = QueueFullError(f"{self._limit} calls are under way already; retry later")
            await _refusal(_refused(busy))(scope, receive, counting)
            return
        self._under_way += 1
        with self._metrics.under_way.track_inprogress():
            try:
                await self._app(scope, receive, counting)
            finally:
                self._under_way -= 1


async def _read_body(request: Request, limits: Limits) -> bytes:
    """
    Raises:
        ApiError: it is of another type, too large, or does not come.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ApiError(f"the body must be JSON, sent with Content-Type: {_JSON}", status=415)
    too_large = ApiError(f"the body must be at most {limits.body_bytes} bytes", code="body_too_large", status=413)
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limits.body_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_s)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not come within {limits.body_s:g} s", status=408) from None


def _parse(body: bytes) -> object:
    """
    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.loads(body.decode(), parse_constant=_no_json)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body must be UTF-8; byte {error.start} is not") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body must be JSON: {error}") from None


def _no_json(constant: str) -> object:
    raise ValueError(f"{constant} is no number of JSON")


async def _unless_gone(work: Awaitable[None], request: Request) -> None:
    """Waits for ``work``, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _cancel(completions: Sequence[Completion]) -> None:
    for completion in completions:
        completion.cancel()


def _about_route(request: Request, error: HTTPException) -> ApiError:
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(f"there is no {what} here", code="unknown_url", status=404)
    return ApiError(f"{what}: {error.detail}", status=error.status_code)


def _refused(error: Exception) -> ApiError:
    """What a client is told of an error; what is no fault of its own is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(str(error), code="queue_full", status=429, kind="rate_limit_error")
    if isinstance(error, ValueError):
        return ApiError(str(error))
    line = " ".join(f"the server failed: {type(error).__name__}: {error}".split())
    _LOG.error(line)
    return ApiError(line, status=500, kind="server_error")


def _refusal(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return _json(error.body(), error.status, headers or _ERROR_HEADERS.get(error.status))


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dump(value), status, headers, _JSON)


def _events_of(chunks: Iterable[dict]) -> bytes:
    return b"".join(b"data: " + _dump(chunk) + b"\n\n" for chunk in chunks)


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
