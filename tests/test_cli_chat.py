"""``--chat`` without a prompt: turns that go on from the cache, and what ends an answer or all."""

import io
import json
import signal
import sys

import pytest

import speculative_mamba as sm
from speculative_mamba.cli import session
from speculative_mamba.cli.chat import Conversation
from speculative_mamba.streams import Terminated
from speculative_mamba.testing.text import byte_level_tokenizer, write_chain

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
REWRITING = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else 'gone' }}")


def write_model(folder, template):
    """A model that answers "Hi" and ends."""
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    write_chain(folder, tokenizer, [":", "H", "i", end], eos=end)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "chatty", TEMPLATE)


@pytest.fixture
def converse(run, monkeypatch):
    """converse(model, lines, *options) → (exit code, stdout, stderr)."""

    def call(model, lines, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        return run("--model_target", model, "--chat", "--draft", "none", *options)

    return call


@pytest.fixture
def read(monkeypatch):
    """Per call of a model's ``prefill``, how many tokens it was to read."""
    whole, counts = sm.MambaLM.prefill, []

    def prefill(self, tokens, cache, row):
        counts.append(len(tokens))
        whole(self, tokens, cache, row)

    monkeypatch.setattr(sm.MambaLM, "prefill", prefill)
    return counts


def rendered(target, turns):
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return target.chat_prompt(messages)


def test_a_turn_reads_what_is_new(converse, chatty, read):
    """Of each prompt: what was said since the last answer, and its last token, but for the one that a round reads."""
    code, out, _ = converse(chatty, b"one\n\n  \ntwo and a half\nthree\n", "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [turn["text"] for turn in turns] == ["Hi"] * 3
    target = sm.load_model(chatty)
    said = [rendered(target, turns) for turns in (["one"], ["one", "Hi", "two and a half"])]
    assert [turn["prompt_tokens"] for turn in turns[:2]] == said
    lengths = [len(turn["prompt_tokens"]) for turn in turns]
    known = [length + 2 for length in lengths]  # H, i; the end of text was not read
    assert read == [lengths[0] - 1, lengths[1] - 1 - known[0], lengths[2] - 1 - known[1]]


def test_answers_are_streamed_and_stdout_has_nothing_else(converse, chatty):
    code, out, err = converse(chatty, b"one\ntwo\n/exit\nthree\n")
    assert (code, out) == (0, "Hi\nHi\n") and "error" not in err
    assert err.count("tokens/s") == 2 and err.count("backend") == 1, "the models are named once"
    assert converse(chatty, b"no end of line")[:2] == (0, "Hi\n")
    assert converse(chatty, b"")[:2] == (0, "")


def test_a_template_that_rewrites_earlier_turns_is_read_anew(converse, tmp_path, read):
    model = write_model(tmp_path / "model", REWRITING)
    code, out, _ = converse(model, b"one\ntwo\n", "--json")
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and read == [len(first["prompt_tokens"]) - 1, len(second["prompt_tokens"]) - 1]
    assert second["prompt_tokens"] == rendered(sm.load_model(model), ["one", "Hi", "two"])


def test_a_refused_message_is_as_if_it_was_not_said(converse, chatty):
    code, out, err = converse(chatty, b"one\nno\ncaf\xe9\ntwo\n", "--json")
    assert code == 0 and sum("error" in line for line in err.splitlines()) == 2 and "refuses the messages: not" in err
    second = json.loads(out.splitlines()[-1])["prompt_tokens"]
    assert second == rendered(sm.load_model(chatty), ["one", "Hi", "two"])


def test_ctrl_c_ends_an_answer_alone(converse, chatty, monkeypatch):
    """The next turn goes on behind what there is of it. Before the first token, the question was not asked."""
    asked, after = [], iter([1, 0, None])

    def generate(target, prompts, *, on_commit, **options):
        asked.append(prompts[0])
        count, told = next(after), 0

        def interrupting(committed):
            nonlocal told
            on_commit(committed)
            told += len(committed)
            if told == count:
                raise KeyboardInterrupt

        if count == 0:
            raise KeyboardInterrupt
        return sm.generate(target, prompts, on_commit=interrupting, **options)

    monkeypatch.setattr(session, "generate", generate)
    code, out, err = converse(chatty, b"one\ntwo\nthree\n")
    assert (code, out) == (0, "H\n\nHi\n") and "interrupted after 1 tokens" in err
    target = sm.load_model(chatty)
    assert asked == [rendered(target, turns) for turns in (["one"], ["one", "H", "two"], ["one", "H", "three"])]


def test_a_signal_ends_all(converse, chatty, monkeypatch):
    def generate(*arguments, **options):
        raise Terminated(signal.SIGTERM)

    monkeypatch.setattr(session, "generate", generate)
    assert converse(chatty, b"one\ntwo\n")[:2] == (143, "\n")


def test_what_no_message_could_repair_is_said_at_once(converse, chatty, tmp_path):
    plain = write_chain(tmp_path / "plain", byte_level_tokenizer(), ["a", "b"])
    for model, extra, reason in ((str(plain), [], "has no chat template"), (chatty, ["--system", "no"], "not that")):
        code, out, err = converse(model, b"one\n", *extra)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and reason in err


def test_tokens_are_those_that_were_generated(chatty):
    """Where a model did not write a text as its tokenizer would, the cache's own tokens stay."""
    target = sm.load_model(chatty)
    conversation = Conversation(target)
    prompt = conversation.ask("one")
    sm.generate(target, [prompt], max_new_tokens=1, cache=conversation.cache)
    conversation.answered(prompt, [])
    known = conversation.cache.sequences[0]
    assert conversation.ask("two")[: len(known)] == known == [*prompt, target.tokenizer.token_to_id("H")]
