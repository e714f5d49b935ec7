"""Whatever a client sends, it gets an error in OpenAI's form, and others get their texts."""

import functools
import json
import re
import socket
import typing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import PROMPT, ask, complete, expected

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from speculative_mamba.serve.fields import CHAT, COMPLETION, NEUTRAL_CHAT, NEUTRAL_COMPLETION

HUGE, DEEP = 10**400, "[" * 100_000
# JSON values that are wrong for most fields, by their type.
WRONG = {"text": "x", "number": 0.5, "negative": -2, "huge": HUGE, "flag": True, "list": [[]], "object": {"x": {}}}
# What each field takes of those.
TAKES = {
    "flag": ("skip_special_tokens", "echo", "ignore_eos", "stream", "use_draft", "add_special_tokens",
             "parallel_tool_calls"),
    "text": ("user", "stop", "prompt", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "number": ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    "negative": ("presence_penalty", "frequency_penalty"),
    "object": ("metadata", "prompt_cache_options", "chat_template_kwargs"),
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hello"}]


@functools.cache
def usual_text():
    return expected()


@pytest.fixture(autouse=True)
def _unharmed(url):
    yield
    assert complete(url).json["choices"][0]["text"] == usual_text()


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_values_of_every_wrong_type_for_every_field(url, chat):
    """Catches: True as a number, a number as a text, an overflow in the conversion."""
    path = "chat/completions" if chat else "completions"
    needed = {"messages": MESSAGES} if chat else {"prompt": PROMPT}
    readers = CHAT | NEUTRAL_CHAT if chat else COMPLETION | NEUTRAL_COMPLETION
    for name in readers:
        for kind, value in WRONG.items():
            if name in TAKES.get(kind, ()) or (chat and (name, kind) == ("logprobs", "flag")):
                continue
            reply = ask(f"{url}/v1/{path}", {**needed, name: value})
            assert reply.status >= 400, (name, kind)
            status, param, code = reply.error
            assert (status, param.partition(".")[0]) == (404 if code == "model_not_found" else 400, name), (name, kind)
            assert name in reply.json["error"]["message"], (name, kind)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": None}, (400, "prompt", None)), ({"prompt": ""}, (400, "prompt", None)),
        ({"prompt": []}, (400, "prompt", None)), ({"prompt": [""]}, (400, "prompt", None)),
        ({"prompt": [[]]}, (400, "prompt", None)), ({"prompt": [1, "a"]}, (400, "prompt", None)),
        ({"prompt": [1.5]}, (400, "prompt", None)), ({"prompt": [-1]}, (400, "prompt", None)),
        ({"prompt": [256]}, (400, "prompt", None)), ({"prompt": [HUGE]}, (400, "prompt", None)),
        ({"prompt": [True]}, (400, "prompt", None)), ({"prompt": [[1], 2]}, (400, "prompt", None)),
        ({"prompt": "\ud800"}, (400, "prompt", None)), ({"prompt": ["a"] * 10**5}, (400, "n", None)),
        ({"prompt": [300] * 10**5}, (400, "prompt", "context_length_exceeded")),
        ({"prompt": "a" * 8181}, (400, "prompt", "context_length_exceeded")),
        ({"max_tokens": 8182}, (400, "prompt", "context_length_exceeded")),
        ({"max_tokens": 2**31 - 1}, (400, "prompt", "context_length_exceeded")),
        ({"max_tokens": 0}, (400, "max_tokens", None)), ({"n": 0}, (400, "n", None)), ({"n": 129}, (400, "n", None)),
        ({"prompt": ["a", "b"], "n": 65}, (400, "n", None)), ({"logprobs": 21}, (400, "logprobs", None)),
        ({"echo": True, "logprobs": 0}, (400, "echo", "unsupported_value")), ({"seed": 2**63}, (400, "seed", None)),
        ({"seed": [1]}, (400, "seed", None)),
        ({"stop": ""}, (400, "stop", None)), ({"stop": ["a"] * 17}, (400, "stop", None)),
        ({"stop": "a" * 257}, (400, "stop", None)), ({"stop": ["a", 1]}, (400, "stop", None)),
        ({"stop": "\ud800"}, (400, "stop", None)), ({"top_p": 0}, (400, "top_p", None)),
        ({"stop_token_ids": [256]}, (400, "stop_token_ids", None)),
        ({"logit_bias": {"a": 1}}, (400, "logit_bias", None)), ({"logit_bias": {"-1": 1}}, (400, "logit_bias", None)),
        ({"logit_bias": {"256": 1}}, (400, "logit_bias", None)), ({"logit_bias": {"١": 1}}, (400, "logit_bias", None)),
        ({"logit_bias": {"1": "a"}}, (400, "logit_bias", None)), ({"logit_bias": [1]}, (400, "logit_bias", None)),
        ({"logit_bias": {"9" * 30: 1}}, (400, "logit_bias", None)),
        ({"stream_options": {"include_usage": True}}, (400, "stream_options", None)),
        ({"stream": True, "stream_options": {"x": 1}}, (400, "stream_options.x", "unsupported_parameter")),
        ({"stream": True, "stream_options": {"include_usage": 1}}, (400, "stream_options.include_usage", None)),
        ({"model": "gpt-9"}, (404, "model", "model_not_found")),
        ({"best_of": 2}, (400, "best_of", "unsupported_value")),
        ({"suffix": "a"}, (400, "suffix", "unsupported_value")),
        ({"tools": []}, (400, "tools", "unsupported_parameter")),
        ({"": 1}, (400, "''", "unsupported_parameter")), ({"a\nb": 1}, (400, "'a\\nb'", "unsupported_parameter")),
        ({"skip_special_tokens": False}, (400, "skip_special_tokens", "unsupported_value")),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refused_completions(url, fields, error):
    assert complete(url, **fields).error == error


def test_a_chat_without_a_template_is_one_line(url):
    reply = ask(f"{url}/v1/chat/completions", {"messages": MESSAGES})
    assert reply.error == (400, "messages", None) and "has no chat template" in reply.json["error"]["message"]


def body(**fields):
    return {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "JSON"), (b"{", "JSON"), (b"[]", "JSON object"), (b"null", "JSON object"), (b'"a"', "JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"), (b'{"prompt": "a", "top_p": Infinity}', "Infinity"),
        (b'{"prompt": "\xff"}', "UTF-8"), (b"\xff\xfe{", "UTF-8"), (b'{"prompt": "a\x00"}', "JSON"),
        (DEEP.encode(), "nested"), (b'{"n": ' + b"9" * 5000 + b"}", "JSON"), (b"\xef\xbb\xbf{}", "JSON"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bodies_that_are_no_object_of_json(url, data, word):
    reply = ask(f"{url}/v1/completions", data)
    assert reply.error == (400, None, None) and word in reply.json["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_bodies_of_another_type(url, kind):
    """Any page of the web may send those without asking."""
    reply = ask(f"{url}/v1/completions", json.dumps(body()).encode(), Content_Type=kind)
    assert reply.error == (415, None, None)


def test_a_type_with_a_charset(url):
    reply = ask(f"{url}/v1/completions", body(), Content_Type="Application/JSON; charset=utf-8")
    assert reply.json["choices"][0]["text"] == expected()


@pytest.mark.parametrize(
    ("method", "path", "error"),
    [
        ("GET", "/v2", (404, None, "unknown_url")), ("POST", "/v1/embeddings", (404, None, "unknown_url")),
        ("GET", "/v1/completions", (405, None, None)), ("DELETE", "/v1/models", (405, None, None)),
        ("GET", "/..%2f..%2fetc/passwd", (404, None, "unknown_url")), ("POST", "/", (405, None, None)),
        ("GET", "/docs", (404, None, "unknown_url")), ("GET", "/openapi.json", (404, None, "unknown_url")),
    ],
)  # fmt: skip
def test_other_addresses(url, method, path, error):
    reply = ask(url + path, method=method)
    assert reply.error == error and (reply.headers["allow"] is not None) == (error[0] == 405)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\n\n\n", b"GET / HTTP/9\r\n\r\n", b"GET /" + b"a" * 10**5, b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda data: str(data[:30]),
)  # fmt: skip
def test_what_is_no_http(url, data):
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(2**16)
        assert re.match(rb"HTTP/1.1 4\d\d |$", answer), answer


def documented(chat: bool) -> dict[str, str]:
    """What docs/serve.md says of every field: works, no effect or refused."""
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|", text.split("| field |")[1], re.MULTILINE)
    column = 2 if chat else 1
    return {name: row[column] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_every_field_of_the_api_works_or_is_refused_as_documented(url, chat):
    """Of OpenAI's API as its own client has it, and what the documents name besides."""
    completions = pytest.importorskip("openai.types.completion_create_params", reason="openai is not installed")
    chats = pytest.importorskip("openai.types.chat.completion_create_params")
    params = (chats if chat else completions).CompletionCreateParamsStreaming
    said = documented(chat)
    assert set(typing.get_type_hints(params)) <= set(said)
    works, neutral = (CHAT, NEUTRAL_CHAT) if chat else (COMPLETION, NEUTRAL_COMPLETION)
    assert {name for name, what in said.items() if what.startswith("works")} == set(works)
    assert {name for name, what in said.items() if what.startswith("no effect")} == set(neutral)
    path, needed = (
        ("chat/completions", {"messages": MESSAGES}) if chat else ("completions", {"prompt": PROMPT, "max_tokens": 1})
    )
    for name in set(said) - set(works) - set(neutral):
        assert said[name] in ("refused", "–"), name
        reply = ask(f"{url}/v1/{path}", {**needed, name: {"type": "json_object"}})
        assert reply.error == (400, name, "unsupported_parameter")
        assert ask(f"{url}/v1/{path}", {**needed, name: None}).json.get("error", {}).get("param") in (None, "messages")
