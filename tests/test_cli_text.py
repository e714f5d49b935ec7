"""The command line with tokenizers of every kind: spaces, bytes, special tokens and stop strings."""

import json

import pytest

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
