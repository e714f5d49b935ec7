"""Chats: a model that comes with a template, by OpenAI's own client; what is no conversation is refused."""

import pytest
from servers import ANSWER, ask, events

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="the extra [test] is not installed")

KIND = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def url(chatty):
    return chatty


@pytest.fixture(scope="module")
def model(chat_model):
    return chat_model


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(url, **fields):
    return ask(f"{url}/v1/chat/completions", {"messages": [USER], "temperature": 0, **fields})


def prompt_tokens(model, messages, **variables):
    return len(model.chat_prompt(messages, **variables))


def test_a_conversation(client, model):
    """Its answer can be sent back as the client gives it."""
    made = client.chat.completions.create(model="chatty", messages=[USER], temperature=0)
    assert (made.object, made.choices[0].finish_reason) == ("chat.completion", "stop")
    assert (made.choices[0].message.role, made.choices[0].message.content) == ("assistant", ANSWER)
    assert made.usage.prompt_tokens == prompt_tokens(model, [USER])
    assert made.usage.completion_tokens == len(ANSWER) + 1
    details = made.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0 == details.rejected_prediction_tokens
    messages = [USER, made.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    again = client.chat.completions.create(model="chatty", messages=messages, temperature=0)
    plain = [USER, {"role": "assistant", "content": ANSWER}, messages[-1]]
    assert again.usage.prompt_tokens == prompt_tokens(model, plain) and again.choices[0].message.content == ANSWER


def test_a_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="chatty", messages=[USER], temperature=0, stream=True, stream_options=options, n=2
    )
    *chunks, last = list(stream)
    assert last.choices == [] and last.usage.completion_tokens == 2 * (len(ANSWER) + 1)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(piece.delta.content or "" for piece in own) == ANSWER
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["stop"]
        assert [piece.drafted for piece in own[1:-1]].count(True) == 8, "two rounds of four and one of the target's"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logprobs(url, stream):
    reply = chat(url, logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk["choices"][0] for chunk in (events(reply) if stream else [reply.json])]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == [*ANSWER, "<|im_end|>"]
    assert [bytes(entry["bytes"]).decode() for entry in entries] == [*ANSWER, "<|im_end|>"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] > entry["top_logprobs"][1]["logprob"]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": [{**KIND, "role": "developer"}, USER]}, [KIND, USER]),
        ({"messages": [{**USER, "name": "Ann"}]}, [{**USER, "name": "Ann"}]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "é"}]}]},
            [{"role": "user", "content": "a\né"}],
        ),
    ],
    ids=["developer", "name", "parts"],
)  # fmt: skip
def test_messages(url, model, fields, messages):
    assert chat(url, **fields).json["usage"]["prompt_tokens"] == prompt_tokens(model, messages)


def test_variables_of_the_template(url, model):
    reply = chat(url, chat_template_kwargs={"tone": "kindly"})
    assert reply.json["usage"]["prompt_tokens"] == prompt_tokens(model, [USER], tone="kindly")


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 3}, "Hey", "length"), ({"max_completion_tokens": 3}, "Hey", "length"),
        ({"stop": ","}, "Hey", "stop"), ({"ignore_eos": True, "max_tokens": 11}, ANSWER, "length"),
        ({"seed": 1, "temperature": None, "n": 1}, ANSWER, "stop"),
        ({"store": False, "metadata": {}, "tools": [], "tool_choice": "none"}, ANSWER, "stop"),
        ({"response_format": {"type": "text"}, "modalities": ["text"]}, ANSWER, "stop"),
    ],
    ids=str,
)  # fmt: skip
def test_fields(url, fields, text, reason):
    choice = chat(url, **fields).json["choices"][0]
    assert (choice["message"]["content"][: len(text)], choice["finish_reason"]) == (text, reason)


def test_a_bias_names_tokens(url, model):
    comma, exclamation = model.tokenizer.encode(",!").ids
    reply = chat(url, logit_bias={str(comma): -1000, str(exclamation): 100}, max_tokens=4)
    assert reply.json["choices"][0]["message"]["content"] == "Hey!"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"messages": None}, (400, "messages", None)), ({"messages": []}, (400, "messages", None)),
        ({"messages": ["a"]}, (400, "messages", None)), ({"messages": [{}]}, (400, "messages[0].role", None)),
        ({"messages": [USER, {"role": "owner", "content": "a"}]}, (400, "messages[1].role", None)),
        ({"messages": [{"role": "tool", "content": "a"}]}, (400, "messages[0].role", None)),
        ({"messages": [{"role": ["user"], "content": "a"}]}, (400, "messages[0].role", None)),
        ({"messages": [{"role": "user"}]}, (400, "messages[0].content", None)),
        ({"messages": [{"role": "user", "content": 5}]}, (400, "messages[0].content", None)),
        ({"messages": [{"role": "user", "content": ["a"]}]}, (400, "messages[0].content", None)),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            (400, "messages[0].content", None),
        ),
        ({"messages": [{**USER, "name": 5}]}, (400, "messages[0].name", None)),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, (400, "messages[0].tool_calls", "unsupported_parameter")),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, (400, "messages", None)),
        ({"messages": [{"role": "user", "content": "refuse"}]}, (400, "messages", None)),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, (400, "messages", "context_length_exceeded")),
        ({"max_tokens": 200}, (400, "messages", "context_length_exceeded")),
        ({"max_tokens": 3, "max_completion_tokens": 4}, (400, "max_tokens", None)),
        ({"top_logprobs": 2}, (400, "top_logprobs", None)), ({"logprobs": 2}, (400, "logprobs", None)),
        ({"chat_template_kwargs": {"messages": []}}, (400, "chat_template_kwargs", None)),
        ({"chat_template_kwargs": {"self": 1}}, (400, "chat_template_kwargs", None)),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, (400, "chat_template_kwargs", None)),
        ({"tools": [{"type": "function"}]}, (400, "tools", "unsupported_value")),
        ({"response_format": {"type": "json_object"}}, (400, "response_format", "unsupported_value")),
        ({"prompt": "a"}, (400, "prompt", "unsupported_parameter")),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refused(url, fields, error):
    assert chat(url, **fields).error == error
    assert chat(url).json["choices"][0]["message"]["content"] == ANSWER
