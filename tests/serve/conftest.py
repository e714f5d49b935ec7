"""Servers that the tests share."""

import json
from collections.abc import Iterator

import pytest
from servers import ANSWER, server_process, server_thread

import speculative_mamba as sm
from speculative_mamba.serve import Engine
from speculative_mamba.serve.protocol import ServedModel
from speculative_mamba.testing.text import byte_level_tokenizer, write_chain

TEMPLATE = """{% for message in messages %}
{% if message.content == 'refuse' %}{{ raise_exception('not that') }}{% endif %}
{{- '<|im_start|>' + message['role'] + ('=' + message['name'] if message['name'] else '') + '\n' + message['content'] }}
{{- '<|im_end|>' + '\n' }}{% endfor %}{% if tone %}{{ tone }}{% endif %}{{ '<|im_start|>assistant\n' }}"""


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server of the embedded pair. Under coupled acceptance a seed alone says what the text is."""
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    with server_process("--acceptance", "coupled") as (url, _):
        yield url


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> sm.MambaLM:
    """It has a chat template, and answers every conversation alike."""
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>"])
    letters = tokenizer.encode("\n" + ANSWER, add_special_tokens=False).ids
    assert len(set(letters)) == len(letters), "each letter has one that follows"
    folder, end = tmp_path_factory.mktemp("chat") / "model", tokenizer.token_to_id("<|im_end|>")
    write_chain(folder, tokenizer, [*letters, end], eos=end)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return sm.load_model(folder)


@pytest.fixture(scope="module")
def chatty(chat_model: sm.MambaLM) -> Iterator[str]:
    """A server of it."""
    served = ServedModel(chat_model, "chatty", 200)
    with Engine(chat_model, draft=chat_model, max_length=200) as engine, server_thread(engine, served) as url:
        yield url
