"""A server under pressure: full queues, clients that leave, read slowly or send too much, signals."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest
import torch
from servers import PROMPT, ask, complete, events, expected, server_process, server_thread, target

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from speculative_mamba.cli import serve
from speculative_mamba.serve import Engine
from speculative_mamba.serve.openai_api import Limits
from speculative_mamba.serve.protocol import ServedModel

SERVED = {"name": "pair", "max_length": 4096}


class Gate:
    """A drafter that proposes nothing, and waits while the gate is shut: no round ends."""

    def __init__(self):
        self.vocab_size = target().vocab_size
        self.open, self.reached = threading.Event(), threading.Event()

    def begin(self, prompts, lookahead, sampler):
        pass

    def propose(self, rows, accepted, lookahead):
        self.reached.set()
        assert self.open.wait(60)
        return torch.empty(len(rows), 0, dtype=torch.int64), None


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def serving(gate):
    """serving(**settings): a server of one row behind the gate, and its engine."""
    contexts = []

    def start(max_queue_size=64, listener=None, **settings):
        engine = Engine(target(), draft=gate, max_batch_size=1, max_queue_size=max_queue_size, max_length=4096)
        context = server_thread(engine, ServedModel(target(), **SERVED), listener, **settings)
        contexts.append((context, engine))
        return context.__enter__(), engine

    yield start
    gate.open.set()
    for context, engine in contexts:
        context.__exit__(None, None, None)
        engine.close(drain=False)


@pytest.fixture
def later():
    """later(url, …): a completion that is asked for in a thread of its own; join() gives the reply."""
    threads = []

    class Later(threading.Thread):
        def __init__(self, *arguments, **fields):
            super().__init__()
            self.arguments, self.fields = arguments, fields
            threads.append(self)
            self.start()

        def run(self):
            self.reply = complete(*self.arguments, **self.fields)

        def join(self, timeout=60):
            super().join(timeout)
            return self.reply

    yield Later
    for thread in threads:
        threading.Thread.join(thread, 60)


def connected(url, **fields):
    """A socket over which a completion was asked for."""
    parts = urlsplit(url)
    body = json.dumps({"prompt": PROMPT, "temperature": 0, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def metric(url, name):
    return float(re.search(rf"^speculative_mamba_{name} (.*)$", ask(f"{url}/metrics").body.decode(), re.MULTILINE)[1])


def wait_until(condition, what):
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail(what)


def test_a_full_queue_is_429_and_the_rest_are_served(gate, serving, later):
    url, engine = serving(max_queue_size=2)
    running = later(url)
    assert gate.reached.wait(60)
    waiting = [later(url, prompt="He said") for _ in range(2)]
    wait_until(lambda: engine.stats().queued == 2, "two wait")
    for fields in ({}, {"stream": True}, {"prompt": ["a", "b"]}):
        reply = complete(url, **fields)
        assert reply.error == (429, None, "queue_full") and reply.headers["retry-after"] == "1"
    assert ask(f"{url}/health").status == ask(f"{url}/metrics").status == ask(f"{url}/").status == 200
    gate.open.set()
    assert running.join().json["choices"][0]["text"] == expected()
    assert [one.join().json["choices"][0]["text"] for one in waiting] == [expected("He said")] * 2


def test_what_is_refused_in_part_leaves_nothing_in_the_queue(gate, serving, later):
    """Catches: texts of a refused call that nobody will read."""
    url, engine = serving(max_queue_size=2)
    running = later(url)
    assert gate.reached.wait(60)
    assert complete(url, prompt=["a", "b", "c"]).error == (429, None, "queue_full")
    gate.open.set()
    running.join()
    assert complete(url).json["choices"][0]["text"] == expected()
    assert engine.stats().requests == {"length": 2, "cancelled": 2}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_row(gate, serving, later, stream):
    """Catches: a text that is generated for nobody. It would take its 4,000 tokens."""
    url, engine = serving()
    connection = connected(url, max_tokens=4000, stream=stream)
    assert gate.reached.wait(60)
    waiting = later(url)
    wait_until(lambda: engine.stats().queued == 1, "one waits")
    connection.close()
    wait_until(lambda: metric(url, "calls_under_way") == 1, "the server has seen that the client left")
    gate.open.set()
    assert waiting.join().json["choices"][0]["text"] == expected()
    assert engine.stats().requests == {"cancelled": 1, "length": 1}
    assert engine.stats().generated_tokens < 20, "its row went within a round"


def test_clients_that_leave_the_queue(gate, serving, later):
    url, engine = serving()
    running = later(url)
    assert gate.reached.wait(60)
    connections = [connected(url, max_tokens=4000, n=2) for _ in range(3)]
    wait_until(lambda: engine.stats().queued == 6, "all wait")
    for connection in connections:
        connection.close()
    wait_until(lambda: metric(url, "calls_under_way") == 1, "the server has seen that the clients left")
    gate.open.set()
    running.join()
    wait_until(lambda: engine.stats().queued == 0, "the queue is empty")
    assert engine.stats().requests == {"length": 1, "cancelled": 6} and engine.stats().generated_tokens == 12


def test_ten_thousand_texts_in_the_queue(gate, serving):
    url, engine = serving(max_queue_size=10_000)
    connections = [connected(url, max_tokens=4000, n=128) for _ in range(78)]
    wait_until(lambda: engine.stats().queued == 78 * 128 - 1, "one runs, the rest waits")
    assert complete(url, n=128).error == (429, None, "queue_full") and ask(f"{url}/health").status == 200
    for connection in connections:
        connection.close()
    wait_until(lambda: metric(url, "calls_under_way") == 0, "the server has seen that the clients left")
    gate.open.set()
    wait_until(lambda: engine.stats().queued == 0, "within a round they are out of the queue")
    assert complete(url).json["choices"][0]["text"] == expected()
    assert engine.stats().generated_tokens < 30


def test_more_calls_than_the_limit(gate, serving, later):
    """Whatever they wait for: their bodies are not read."""
    url, _ = serving(limits=Limits(calls=1))
    running = later(url)
    assert gate.reached.wait(60)
    assert complete(url).error == (429, None, "queue_full")
    gate.open.set()
    running.join()
    assert complete(url).status == 200


@contextlib.contextmanager
def slow_reader(url):
    """It asks for a text with much about every token, more than all buffers hold, and reads nothing of it."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        connection.connect((parts.hostname, parts.port))
        body = json.dumps({"prompt": PROMPT, "max_tokens": 300, "stream": True, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield connection


def listener():
    made = serve.bind("127.0.0.1", 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
    return made


def test_a_slow_reader_holds_up_nobody(gate, serving):
    """Its own text is generated to the end, and lost only if it leaves."""
    gate.open.set()
    url, engine = serving(listener=listener())
    with slow_reader(url) as connection:
        assert complete(url).json["choices"][0]["text"] == expected()
        wait_until(lambda: engine.stats().requests == {"length": 2}, "both texts are complete")
        assert metric(url, "calls_under_way") == 1
        assert b"".join(iter(lambda: connection.recv(2**16), b"")).count(b"drafted") == 300
    wait_until(lambda: metric(url, "calls_under_way") == 0, "all is sent")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no TCP_USER_TIMEOUT")
def test_a_reader_that_takes_nothing_is_dropped(gate, serving, monkeypatch):
    gate.open.set()
    monkeypatch.setattr(serve, "STALLED_S", 1)
    url, _ = serving(listener=listener())
    with slow_reader(url):
        wait_until(lambda: metric(url, "calls_under_way") == 1, "it is served")
        wait_until(lambda: metric(url, "calls_under_way") == 0, "it is dropped")
    assert complete(url).json["choices"][0]["text"] == expected()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("expect", [True, False], ids=["Expect: 100-continue", "sent at once"])
def test_a_large_body_is_refused_and_not_read(url, expect, tmp_path):
    """100 MB, of which curl sends what the server takes."""
    (tmp_path / "body").write_bytes(b" " * 100_000_000)
    headers = ["-H", "Content-Type: application/json", "-H", "Expect: 100-continue" if expect else "Expect:"]
    form = "\n%{http_code} %{size_upload}"
    command = ["curl", "-sS", "-w", form, *headers, "--data-binary", f"@{tmp_path / 'body'}", f"{url}/v1/completions"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error, status, sent = *result.stdout.split("\n")[:1], *result.stdout.split()[-2:]
    assert status == "413" and json.loads(error)["error"]["code"] == "body_too_large"
    assert int(sent) <= (0 if expect else 20_000_000)
    assert complete(url).json["choices"][0]["text"] == expected()


def test_a_large_body_in_chunks(url):
    """Its length is not said; it ends where it is too long."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        part = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100:
                connection.sendall(part)
                sent += 1
        assert sent < 40 and connection.recv(2**16).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(serving):
    url, _ = serving(limits=Limits(body_s=0.05))
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        connection.sendall(head.encode())
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408 ")


def test_an_api_key(serving, gate):
    gate.open.set()
    url, _ = serving(api_key="secret")
    for path in ("models", "models/pair", "completions", "chat/completions"):
        reply = ask(f"{url}/v1/{path}", None if path.startswith("models") else {})
        assert reply.error == (401, None, "invalid_api_key") and reply.headers["www-authenticate"] == "Bearer"
    for wrong in ("secret", "Bearer", "Bearer Secret", "Bearer secret ", "Bearer s\xe9cret", "Basic secret"):
        if wrong.strip() != "Bearer secret":
            assert ask(f"{url}/v1/models", Authorization=wrong).error == (401, None, "invalid_api_key")
    assert ask(f"{url}/v1/models", Authorization="Bearer secret").json["data"][0]["id"] == "pair"
    assert {ask(f"{url}{path}").status for path in ("/", "/health", "/metrics")} == {200}


def test_a_request_that_fails_takes_no_other_along(serving, gate, monkeypatch):
    """The draft of its round breaks: an error of OpenAI's form, in a stream too, and the next ones are served."""
    gate.open.set()
    url, engine = serving()
    propose = Gate.propose
    monkeypatch.setattr(Gate, "propose", lambda *_: (_ for _ in ()).throw(RuntimeError("the draft broke")))
    status, _, _ = complete(url).error
    assert status == 500
    last = events(complete(url, stream=True))[-1]
    assert last["error"]["type"] == "server_error" and "the draft broke" in last["error"]["message"]
    monkeypatch.setattr(Gate, "propose", propose)
    assert complete(url).json["choices"][0]["text"] == expected()
    assert engine.stats().requests["error"] == 2


def test_a_signal_ends_the_server_when_all_is_answered():
    with server_process("--max_batch_size", "1") as (url, process):
        whole = complete(url, max_tokens=400).json["choices"][0]["text"]
        connections = [connected(url, max_tokens=400, stream=stream) for stream in (True, False)]
        wait_until(lambda: metric(url, "requests_waiting") == 1, "one runs and one waits")
        process.send_signal(signal.SIGTERM)
        answers = [b"".join(iter(lambda c=connection: c.recv(2**16), b"")) for connection in connections]
        assert process.wait(60) == 0 and process.stderr.read() == ""
    assert answers[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert json.loads(answers[1].partition(b"\r\n\r\n")[2])["choices"][0]["text"] == whole
    with pytest.raises(OSError):
        ask(f"{url}/health")
