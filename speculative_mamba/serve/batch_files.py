"""Files of prompts: each line a call of OpenAI's API, or a prompt; each result a line of another file."""

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

from ..ops.values import shown
from .completion import Completion, RequestOutput
from .engine import Engine
from .fields import ApiError
from .protocol import Call, ServedModel, read_chat, read_completion
from .responses import Answer

ID = "batch_req_"  # as OpenAI's begin
_READERS = {"/v1/completions": read_completion, "/v1/chat/completions": read_chat}
_WINDOW = 8  # times the engine's rows: lines among which those of similar length are run together


def id_family(options: Mapping[str, object]) -> str:
    """What the ids of results begin with that were made with these options."""
    return f"{ID}{_digest(repr(sorted(options.items())).encode(), 8)}_"


def _digest(data: bytes, length: int) -> str:
    return hashlib.sha256(data).hexdigest()[:length]


@dataclass(frozen=True)
class Line:
    """A line of the input that is not blank. number: from 1. id: of its result; it stands for number and content.
    ended: whether it has a line end, which the last may lack."""

    number: int
    data: bytes
    id: str
    ended: bool = True


def read_lines(path: Path, family: str) -> Iterator[Line]:
    """
    Raises:
        ValueError: it is no plain file.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no plain file; lines are read twice, so write them to one first")
        for number, data in enumerate(file, 1):
            text = data.rstrip(b"\r\n")
            ended = data.endswith(b"\n")
            if text.strip():
                yield Line(number, text, f"{family}{_digest(b'%d %s' % (number, text), 24)}", ended)
            if not ended:
                return  # what is written behind it meanwhile would be its own rest


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_again(path: Path, family: str, ids: Iterable[str]) -> Iterator[Line]:
    """Lines that were read before, and those that were added behind them. ids: of all that were read before.

    Raises:
        ValueError: they are others now; or as ``read_lines``.
        OSError: as ``read_lines``.
    """
    for known, line in zip_longest(ids, read_lines(path, family)):
        if known is None and not line.ended:
            return  # it is still being written
        if known is not None and (line is None or line.id != known):
            where = "and lacks lines" if line is None else f"in line {line.number}"
            raise ValueError(
                f"{path} was changed during this run, {where}; with the former input the same command goes on, "
                "for a new one name another output"
            )
        yield line


class LineError(ApiError):
    """A line that is no call."""


@dataclass
class BatchCounts:
    """Of one run: lines with results, those among them that were refused; new tokens, drafted ones, accepted ones."""

    lines: int = 0
    refused: int = 0
    tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class BatchRunner:
    """Answers lines with an engine, many at a time.

    served: the model for calls of OpenAI's API. plain: the model for plain lines, which are a prompt, or an object with
    ``prompt`` or ``messages`` and what else the API knows; defaults: what a plain line says where it is silent. rows:
    of the engine. seed: of lines that name none. ordered: results come in the order of the lines, else as they come.

    The text of a line is that of the line alone, whatever runs beside it, greedy or coupled.
    """

    engine: Engine
    served: ServedModel
    plain: ServedModel
    defaults: Mapping[str, object]
    rows: int
    seed: int = 0
    ordered: bool = True
    counts: BatchCounts = field(default_factory=BatchCounts)

    def records(self, lines: Iterable[Line]) -> Iterator[dict]:
        """The results of lines: OpenAI's, with the line's number beside."""
        lines, running = iter(lines), deque()
        pool = ThreadPoolExecutor(2 * self.rows)  # the engine always has the next at hand
        try:
            while True:
                if window := list(islice(lines, _WINDOW * self.rows)):
                    running.append(self._start(window, pool))
                if len(running) > bool(window):
                    yield from self._collect(running.popleft())
                elif not window:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, window: list[Line], pool: ThreadPoolExecutor) -> list[Future]:
        """Queues lines, the longest first; their results in the order of the lines."""
        work = [_Work.read(line, self) for line in window]
        futures = {}
        for one in sorted(work, key=lambda one: one.length, reverse=True):
            futures[one.line.number] = pool.submit(self._answer, one)
        return [futures[one.line.number] for one in work]

    def _collect(self, futures: list[Future]) -> Iterator[dict]:
        for future in futures if self.ordered else as_completed(futures):
            record, outputs = future.result()
            self.counts.lines += 1
            self.counts.refused += not outputs
            for output in outputs:
                self.counts.tokens += len(output.tokens)
                self.counts.draft_tokens += output.draft_tokens
                self.counts.accepted_tokens += output.accepted_tokens
            yield record

    def _answer(self, work: "_Work") -> tuple[dict, list[RequestOutput]]:
        error, outputs = work.error, []
        if error is None:
            completions: list[Completion] = []
            try:
                for request in work.call.requests:
                    completions.append(self.engine.submit(request))
                outputs = [completion.result() for completion in completions]
            except ValueError as refusal:
                error = ApiError(str(refusal))
                for completion in completions:
                    completion.cancel()
        head = {"id": work.line.id, "line": work.line.number, "custom_id": work.custom_id}
        if isinstance(error, LineError):
            message = f"line {work.line.number}: {error}"
            return {**head, "response": None, "error": {"code": error.code, "message": message}}, []
        body = Answer(work.call, work.served).body(outputs) if error is None else error.body()
        response = {"status_code": 200 if error is None else error.status, "request_id": work.line.id, "body": body}
        return {**head, "response": response, "error": None}, outputs


@dataclass
class _Work:
    """What a line asks for, or why it cannot be had."""

    line: Line
    served: ServedModel | None = None
    call: Call | None = None
    custom_id: str | None = None
    error: ApiError | None = None

    @property
    def length(self) -> int:
        """Tokens of a text, at most."""
        requests = self.call.requests if self.call else ()
        return max((len(request.prompt) + request.max_new_tokens for request in requests), default=0)

    @staticmethod
    def read(line: Line, runner: BatchRunner) -> "_Work":
        work = _Work(line)
        try:
            asked = _parse(line.data)
            asked = {"prompt": asked} if isinstance(asked, str) else asked
            if not isinstance(asked, dict):
                raise LineError(f"must be an object or a prompt, got {shown(asked)}", code="invalid_line")
            custom_id = asked.get("custom_id")
            work.custom_id = custom_id if isinstance(custom_id, str) else None
            if asked.keys() & {"method", "url", "body"}:
                work.served, (read, body) = runner.served, _openai_call(asked)
            else:
                own = {name: value for name, value in asked.items() if name != "custom_id"}
                work.served, body = runner.plain, {**runner.defaults, **own}
                read = read_chat if "messages" in body else read_completion
            if body.get("stream"):
                raise ApiError("a result is written when its text is complete; leave out stream", param="stream")
            work.call = read({**body, "seed": runner.seed if body.get("seed") is None else body["seed"]}, work.served)
        except ApiError as error:
            work.error = error
        except ValueError as error:
            work.error = ApiError(str(error))
        return work


def _parse(data: bytes) -> object:
    """
    Raises:
        LineError: it is no JSON.
    """
    try:
        return json.loads(data.decode(), parse_constant=_no_json)
    except UnicodeDecodeError as error:
        raise LineError(f"must be UTF-8; byte {error.start} is not", code="invalid_utf8") from None
    except RecursionError:
        raise LineError("is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise LineError(f"must be JSON: {error}", code="invalid_json") from None


def _no_json(constant: str) -> object:
    raise ValueError(f"{constant} is no number of JSON")


def _openai_call(asked: dict) -> tuple[Callable[[object, ServedModel], Call], dict]:
    """Reader and body of a line in OpenAI's form.

    Raises:
        LineError: it has another.
    """
    for name, kind, what in (("custom_id", str, "a text"), ("url", str, "a text"), ("body", dict, "an object")):
        if not isinstance(asked.get(name), kind):
            raise LineError(f"{name} must be {what}, got {shown(asked.get(name))}", code="invalid_line")
    if asked.get("method") != "POST":
        raise LineError(f"method must be POST, got {shown(asked.get('method'))}", code="invalid_method")
    if asked["url"] not in _READERS:
        raise LineError(f"url must be {' or '.join(_READERS)}, got {shown(asked['url'])}", code="invalid_url")
    return _READERS[asked["url"]], asked["body"]
