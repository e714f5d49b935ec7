"""Conversations as text: what transformers writes, or one line that says why not."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
from tokenizers import processors

import speculative_mamba as sm
from speculative_mamba.models.chat import read_chat_template
from speculative_mamba.testing.text import byte_level_tokenizer, write_chain

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
INST = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate,\n not ' + message['role']) }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{% else %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""
JSON = """{% for message in messages %}{{ message.role }}: {{ message | tojson(indent=2) }}
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{{ pad_token }}{{ thinking }}"""
DATE = "{{ strftime_now('%d %B %Y') }}{% for message in messages %}{{ message.content }}{% endfor %}"
BLOCKS = """{%- set seen = namespace(count=0) %}
{%- macro shown(text) %}<{{ text }}>{% endmacro %}
    {% for message in messages %}
        {% if message.role == 'system' %}{% continue %}{% endif %}
        {% set seen.count = seen.count + 1 %}
        {% generation %}{{ shown(message.content) }}{% endgeneration %}

        {% if seen.count == 2 %}{% break %}{% endif %}
    {% endfor %}
{{ dict(count=seen.count) }}"""
NAMED = [{"name": "tool_use", "template": JSON}, {"name": "default", "template": CHATML}]
TURNS = [
    {"role": "user", "content": " Where is <s> the naïve café? "},
    {"role": "assistant", "content": "Here & <there>.", "name": None},
    {"role": "user", "content": "Thanks 🙂"},
]
TOKENS = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "pad_token": None}


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """A checkpoint without a template, whose tokenizer puts a BOS before a text."""
    tokenizer = byte_level_tokenizer(SPECIALS)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return write_chain(tmp_path_factory.mktemp("chat") / "model", tokenizer, ["a", "b"])


@pytest.fixture
def folder(blank, tmp_path):
    """folder(template, file): a checkpoint with this template in ``tokenizer_config.json`` or a file of its own."""

    def write(template, **settings):
        for file in blank.iterdir():
            if not (tmp_path / file.name).exists():
                (tmp_path / file.name).symlink_to(file)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS, "chat_template": template, **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def refusal(model, messages=TURNS, **variables):
    with pytest.raises(ValueError) as error:
        model.chat_prompt(messages, **variables)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        (CHATML, {}), (CHATML, {"add_generation_prompt": False}), (INST, {}), (JSON, {}), (JSON, {"thinking": True}),
        (NAMED, {}), (NAMED, {"tools": [{"type": "function", "function": {"name": "find<>"}}]}), (DATE, {}),
        (BLOCKS, {}),
    ],
    ids=["ChatML", "no generation prompt", "turns", "JSON", "a variable", "named", "tools", "date", "blocks"],
)  # fmt: skip
def test_a_conversation_is_written_as_transformers_writes_it(folder, template, variables):
    """Catches: blocks that are not trimmed, `<` as an escape, a second BOS, the template of another name."""
    transformers = pytest.importorskip("transformers")
    path = folder(template)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    expected = {"add_generation_prompt": True, **variables}
    model = sm.load_model(path)
    for messages in (TURNS, TURNS[:1], [{"role": "user", "content": ""}]):
        text = oracle.apply_chat_template(messages, tokenize=False, **expected)
        assert model.chat_template.render(messages, **variables) == text
        ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **expected)
        assert model.chat_prompt(messages, **variables) == ids


def test_a_file_of_its_own_comes_first(folder):
    path = folder(JSON)
    (path / "chat_template.jinja").write_text(CHATML)
    assert read_chat_template(path).sources == {"default": CHATML}
    assert sm.load_model(path).chat_prompt(TURNS)[0] == 256


@pytest.mark.parametrize("settings", [{}, {"added_tokens_decoder": {}}], ids=["older", "newer"])
def test_special_tokens_in_a_file_of_their_own(folder, settings):
    """Older tokenizers have them there; beside ``added_tokens_decoder`` the file says nothing."""
    transformers = pytest.importorskip("transformers")
    path = folder("{{ bos_token }}{{ eos_token }}{{ unk_token }}", **settings)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "[INST]"}, "unk_token": "<s>"}))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    text = oracle.apply_chat_template(TURNS, tokenize=False)
    assert read_chat_template(path).render(TURNS) == text == ("<s></s>" if settings else "[INST]</s><s>")


@pytest.mark.parametrize(
    "settings",
    [
        {"image_token": "<image>", "add_bos_token": True},
        {"extra_special_tokens": {"image_token": {"content": "<image>", "__type": "AddedToken"}, "boi": "<boi>"}},
        {"model_specific_special_tokens": {"boi": "<boi>"}}, {"extra_special_tokens": ["<image>"]},
    ],
    ids=str,
)  # fmt: skip
def test_special_tokens_of_other_names(folder, settings):
    transformers = pytest.importorskip("transformers")
    path = folder("{{ image_token }}|{{ boi }}|{{ bos_token }}", **settings)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert read_chat_template(path).render(TURNS) == oracle.apply_chat_template(TURNS, tokenize=False)


def test_a_model_with_its_template_is_copied(folder):
    model = sm.load_model(folder(CHATML))
    ids = model.chat_prompt(TURNS)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.chat_prompt(TURNS) == ids


def test_no_template_is_one_line(blank):
    model = sm.load_model(blank)
    assert model.chat_template is None and "has no chat template" in refusal(model)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('no\nsystem role') }}", "refuses the messages: no system role"),
        ("{{ raise_exception(5) }}", "refuses the messages: 5"),
        ("{{ raise_exception('no ' * 9999) }}", "refuses the messages: no no no"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
        ("{{ strftime_now.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% include 'other' %}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% generation %}", "TemplateSyntaxError"),
        ("{{ nothing.there }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ '\ud800' }}", "not valid Unicode"),
        ([{"name": "rag", "template": CHATML}], "no default chat template, only 'rag'"),
        ([], "chat_template must be"),
        (["{{ 1 }}"], "chat_template must be"),
        ([{"name": "default", "template": 3}], "chat_template must be"),
        ({"default": CHATML}, "chat_template must be"),
        (3, "chat_template must be"),
    ],
    ids=str,
)
def test_a_template_that_refuses_or_fails_or_reaches_too_far_is_one_line(folder, template, word):
    assert word in refusal(sm.load_model(folder(template)))


def test_roles_that_do_not_alternate(folder):
    model = sm.load_model(folder(INST))
    assert refusal(model, [*TURNS, TURNS[0]]).endswith(
        "refuses the messages: Conversation roles must alternate, not user"
    )


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "list of dicts"), ("Hello", "list of dicts"), (TURNS[0], "list of dicts"), (None, "list of dicts"),
        (["Hello"], "list of dicts"), ([{"content": "a"}], "needs a role"),
        ([{"role": 1, "content": "a"}], "needs a role"),
        ([{"role": "user"}], "needs a content"), ([{"role": "user", "content": None}], "needs a content"),
        ([{"role": "user", "content": 5}], "needs a content"), ([{"role": "user", "contents": "a"}], "needs a content"),
        ([{"role": "user", "content": b"a"}], "made of texts"), ([SimpleNamespace(role="user")], "made of texts"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)  # fmt: skip
def test_messages_of_another_kind(folder, messages, word):
    assert word in refusal(sm.load_model(folder(CHATML)), messages)


def test_variables_of_another_kind(folder):
    assert "made of texts" in refusal(sm.load_model(folder(CHATML)), tools=[print])


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
        ("special_tokens_map.json", b"[]", "special_tokens_map.json"),
        ("special_tokens_map.json", b'{"unk_token": 5}', "unk_token"),
    ],
)
def test_broken_files(folder, file, content, word):
    path = folder(CHATML)
    (path / file).write_bytes(content)
    assert word in refusal(sm.load_model(path))


def test_the_template_is_the_one_that_came_with_the_weights(folder):
    """Catches: it is read when the first conversation is written, from what lies there by then."""
    path = folder(CHATML)
    model = sm.load_model(path, mmap=False)
    expected = model.chat_template.render(TURNS)
    model = sm.load_model(path, mmap=False)
    folder(INST)
    assert model.chat_template.render(TURNS) == expected
