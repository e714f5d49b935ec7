"""Servers to ask, clients that ask them, and what they should answer."""

import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import speculative_mamba as sm
from speculative_mamba.models.text import TextStream

PROMPT, ANSWER = "She had not", "Hey, Bob!"
_SCRIPT = Path(sm.__file__).parent / "run.py"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None, str | None]:
        """Status, field and code of a refusal, which is one line in OpenAI's form."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 600
        return self.status, error["param"], error["code"]


@contextmanager
def server_process(*options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """``speculative-mamba serve`` on a free port: its address, and the process, which Ctrl-C ends well."""
    command = [sys.executable, str(_SCRIPT), "serve", "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        yield url, process
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def server_thread(
    engine: object, served: object, listener: socket.socket | None = None, **settings: object
) -> Iterator[str]:
    """The same application in a thread of this process: its address."""
    from speculative_mamba.serve.openai_api import create_app, http_server

    with listener or socket.create_server(("127.0.0.1", 0)) as listener:
        listener.listen()
        server = http_server(create_app(engine, served, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def ask(url: str, body: object = None, method: str | None = None, **headers: str) -> Reply:
    """One request. body: sent as JSON, or as it is if it is bytes."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    try:
        connection.request(method or ("GET" if body is None else "POST"), parts.path or "/", data, headers)
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def complete(url: str, **fields: object) -> Reply:
    """A greedy completion of a few tokens, but for what ``fields`` say."""
    return ask(f"{url}/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields})


def events(reply: Reply) -> list[dict]:
    """The chunks of a stream."""
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    *parts, end = reply.body.decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@functools.cache
def target() -> sm.MambaLM:
    return sm.load_model("builtin:target")


def expected(prompt: str | list[int] = PROMPT, tokens: int = 12, stop: tuple[str, ...] = (), **sampling: object) -> str:
    """The text that ``generate`` gives for this request alone, without a draft."""
    ids = target().tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    params = sm.SamplingParams(**sampling)
    result = sm.generate(target(), [ids], max_new_tokens=tokens, sampling=params, stop_strings=stop)
    stream = TextStream(target().tokenizer, stop, ids)
    return "".join(stream.push(token) for token in result.sequences[0][len(ids) :].tolist()) + stream.finish()
