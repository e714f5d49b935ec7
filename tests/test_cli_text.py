"""The command line with tokenizers of every kind: spaces, bytes, special tokens and stop strings."""

import json

import pytest

import speculative_mamba as sm
from speculative_mamba.cli import session
from speculative_mamba.testing.text import byte_fallback_tokenizer, byte_level_tokenizer, write_chain


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A checkpoint with Llama's kind of tokenizer: "Hello" goes on with " world" and a line end, then ends."""
    tokenizer = byte_fallback_tokenizer(["▁Hello", "▁world"])
    chain = ["▁Hello", "▁world", "<0x0A>", "</s>"]
    return str(write_chain(tmp_path_factory.mktemp("models") / "llama-like", tokenizer, chain, eos=2))


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ([], "Hello world\n"),
        (["--stream"], "Hello world\n"),
        (["--no_skip_special_tokens"], "Hello world\n</s>"),
        (["--stop", " world"], "Hello"),
        (["--stop", "\n"], "Hello world"),
        (["--stop", "</s>"], "Hello world\n"),
        (["--stop", "\n</s>", "--stream"], "Hello world"),
    ],
    ids=" ".join,
)
def test_text_of_a_tokenizer_with_byte_fallback(run, llama_like, extra, text):
    code, out, _ = run("--model_target", llama_like, "--prompt", "Hello", *extra)
    assert (code, out) == (0, text + "\n")
    code, out, _ = run("--model_target", llama_like, "--prompt", "Hello", "--json", *extra)
    assert code == 0 and "Hello" + json.loads(out)["text"] == text


def test_a_stop_string_that_is_a_special_token(run, tmp_path):
    """It ends the text whether or not it is the model's end of text."""
    chain = ["a", "b", "<|im_end|>", "c", "d", "e"]
    folder = write_chain(tmp_path / "chat", byte_level_tokenizer(["<|im_end|>"]), chain)
    arguments = ["--model_target", str(folder), "--prompt", "a", "--n_tokens_to_generate", "5"]
    assert run(*arguments)[1].startswith("abcd")
    for extra in ([], ["--stream"], ["--no_skip_special_tokens"]):
        assert run(*arguments, "--stop", "<|im_end|>", *extra)[:2] == (0, "ab\n")
    assert run(*arguments, "--stop", "b<|im_end|>c")[1] == "a\n"
    assert run(*arguments, "--no_skip_special_tokens")[1].startswith("ab<|im_end|>cd")


def test_special_tokens_of_the_prompt(run, llama_like):
    def ids_and_notices(*arguments):
        _, out, err = run("--model_target", llama_like, "--json", *arguments)
        return json.loads(out)["prompt_tokens"], [line for line in err.splitlines() if "special_tokens" in line]

    hello = 259
    assert ids_and_notices("--prompt", "Hello") == ([1, hello], [])
    assert ids_and_notices("--prompt", "Hello", "--no_special_tokens") == ([hello], [])
    ids, notices = ids_and_notices("--prompt", "<s>Hello")
    assert ids == [1, 1, hello] and len(notices) == 1 and "<s>" in notices[0] and "once more" in notices[0]
    assert ids_and_notices("--prompt", "<s>Hello", "--no_special_tokens") == ([1, hello], [])


def test_a_target_alone_drafts_from_its_text(run, llama_like):
    code, _, err = run("--model_target", llama_like, "--prompt", "Hello")
    assert code == 0 and sum("--draft ngram" in line for line in err.splitlines()) == 1


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A checkpoint with ChatML's tokens and template, which answers "b" and ends."""
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    folder = write_chain(tmp_path_factory.mktemp("models") / "chatty", tokenizer, ["t", "b", end], eos=end)
    template = (
        "{% for m in messages %}{% if m.role == 'system' and m.content == '' %}{{ raise_exception('who\\nare you?') }}"
        "{% endif %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 40, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return str(folder)


@pytest.mark.parametrize("extra", [[], ["--stream"]], ids=["whole", "stream"])
def test_an_answer_alone_is_printed(run, chatty, extra):
    code, out, _ = run("--model_target", chatty, "--chat", "--prompt", "Hi", *extra)
    assert (code, out) == (0, "b\n")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--prompt", "Hi"], "<|im_start|>user Hi<|im_end|><|im_start|>assistant"),
        (["--prompt", ""], "<|im_start|>user <|im_end|><|im_start|>assistant"),
        (
            ["--prompt", "Hi", "--system", "Be kind."],
            "<|im_start|>system Be kind.<|im_end|><|im_start|>user Hi<|im_end|><|im_start|>assistant",
        ),
    ],
)
def test_the_messages_of_a_chat(run, chatty, extra, text):
    code, out, err = run("--model_target", chatty, "--chat", "--json", *extra)
    assert code == 0 and "has no effect" not in err
    tokenizer = sm.load_model(chatty).tokenizer
    assert json.loads(out)["prompt_tokens"] == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_chat_that_the_template_refuses_is_one_line(run, chatty, llama_like):
    code, out, err = run("--model_target", chatty, "--chat", "--system", "", "--prompt", "Hi")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "refuses the messages: who are you?" in err
    code, out, err = run("--model_target", llama_like, "--chat")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "has no chat template" in err


@pytest.mark.parametrize(
    ("extra", "idle"),
    [(["--system", "Be kind."], "--system"), (["--chat", "--no_special_tokens"], "--no_special_tokens")],
)
def test_options_of_a_chat_that_do_nothing(run, chatty, extra, idle):
    code, _, err = run("--model_target", chatty, "--prompt", "Hi", *extra)
    assert code == 0 and [line.split()[1] for line in err.splitlines() if "has no effect: " in line] == [idle]


@pytest.mark.parametrize(
    ("extra", "chosen"),
    [
        ([], {}),
        (["--default_sampling"], {"temperature": 0.6, "top_k": 40, "repetition_penalty": 1.05}),
        (
            ["--default-sampling", "--top_k", "0", "--seed", "3", "--repetition_penalty", "1"],
            {"temperature": 0.6, "seed": 3},
        ),
        (["--default_sampling", "--temperature", "0"], {"top_k": 40, "repetition_penalty": 1.05}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_sampling_that_a_model_recommends(run, chatty, monkeypatch, extra, chosen):
    """On request alone; options that are given win."""
    asked = []

    def generate(*arguments, **options):
        asked.append(options["sampling"])
        return sm.generate(*arguments, **options)

    monkeypatch.setattr(session, "generate", generate)
    code, _, err = run("--model_target", chatty, "--prompt", "Hi", "--n_tokens_to_generate", "2", *extra)
    assert code == 0 and asked == [sm.SamplingParams(**chosen)] and "has no effect" not in err
    said = "--default_sampling: temperature 0.6, top_k 40, repetition_penalty 1.05"
    assert sum(line.endswith(said) for line in err.splitlines()) == bool(extra)


def test_a_model_that_recommends_no_sampling(run, llama_like):
    code, out, err = run("--model_target", llama_like, "--prompt", "Hello", "--default_sampling")
    assert (code, out) == (0, "Hello world\n\n") and "--default_sampling has no effect" in err
