"""The terminal: prompts from elsewhere, colours of what the draft gave, bars, log-probabilities."""

import contextlib
import io
import json
import re
import sys
import threading

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba import streams
from speculative_mamba.cli import options, session
from speculative_mamba.testing.text import byte_level_tokenizer, write_chain

PROMPT = "She had not"
SHORT = ["--prompt", PROMPT, "--n_tokens_to_generate", "24"]
GREEN, USUAL = "\x1b[32m", "\x1b[39m"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stdin(monkeypatch):
    """stdin(data) makes these bytes what stdin holds."""

    def replace(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return replace


def plain(text):
    return text.replace(GREEN, "").replace(USUAL, "")


def test_prompts_from_stdin_and_from_a_file(run, stdin, tmp_path):
    """One line end behind the text goes, no other."""
    expected = run(*SHORT)[1]
    file = tmp_path / "prompt.txt"
    for end in ("", "\n", "\r\n"):
        stdin((PROMPT + end).encode())
        file.write_bytes((PROMPT + end).encode())
        assert run("--prompt", "-", *SHORT[2:])[1] == run("--prompt_file", str(file), *SHORT[2:])[1] == expected
    stdin(b"It was\n\n")
    assert run("--prompt", "-", "--n_tokens_to_generate", "0")[1] == "It was\n\n"


@pytest.mark.parametrize("extra", [["--prompt", "-"], ["--prompt_file"]], ids=["stdin", "file"])
def test_prompts_that_are_no_text(run, stdin, tmp_path, extra):
    bad, path = b"caf\xe9", tmp_path / "prompt.txt"
    stdin(bad)
    path.write_bytes(bad)
    arguments = [*extra, str(path)] if len(extra) == 1 else extra
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "not valid UTF-8: byte 3" in err
    stdin(b"\n")
    path.write_bytes(b"")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "prompt is empty" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt_file", "/absent"], "cannot read the prompt from /absent: No such file"),
        (["--prompt-file", "/"], "cannot read the prompt from /: Is a directory"),
        (["--prompt_file", "a\0b"], "null"),
        (["--prompt_file", "x", "--prompt", "y"], "are two prompts"),
        (["--chat", "--compare"], "--compare needs a --prompt"),
        (["--logprobs", "21"], "from 0 to 20"),
        (["--logprobs", "-1"], "from 0 to 20"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, arguments, reason):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and reason in err


def test_the_end_of_text_can_be_passed_over(run, tmp_path):
    tokenizer = byte_level_tokenizer(["<end>"])
    end = tokenizer.token_to_id("<end>")
    folder = str(write_chain(tmp_path / "model", tokenizer, ["a", "b", end, "c", "d"], eos=end))
    arguments = ["--model_target", folder, "--prompt", "a", "--n_tokens_to_generate", "4"]
    assert run(*arguments)[1] == "ab\n"
    code, out, _ = run(*arguments, "--ignore_eos", "--json")
    assert code == 0 and len(json.loads(out)["tokens"]) == 4 and json.loads(out)["text"].startswith("bcd")


@pytest.mark.parametrize("extra", [[], ["--draft", "none"], ["--temperature", "0.8", "--seed", "2"]], ids=" ".join)
def test_log_probabilities(run, extra):
    """Those of the target's own logits, whatever chose the token."""
    code, out, _ = run(*SHORT, "--json", "--logprobs", "3", *extra)
    report = json.loads(out)
    target = sm.load_model("builtin:target")
    ids = torch.tensor([report["prompt_tokens"] + report["tokens"]])
    logits = target.verify(ids, target.new_cache(1, ids.shape[1]), torch.zeros(1, dtype=torch.int32))
    its = torch.log_softmax(logits[0, len(report["prompt_tokens"]) - 1 : -1], -1)
    assert code == 0 and len(report["logprobs"]) == len(report["tokens"]) == 24
    for at, entry in enumerate(report["logprobs"]):
        assert entry["token"] == report["tokens"][at]
        assert entry["text"] == target.tokenizer.decode([entry["token"]])
        assert entry["logprob"] == its[at, entry["token"]].item()
        top = its[at].topk(3)
        assert [other["token"] for other in entry["top_logprobs"]] == top.indices.tolist()
        assert [other["logprob"] for other in entry["top_logprobs"]] == top.values.tolist()


def test_log_probabilities_as_a_table(run):
    usual, (code, out, err) = run(*SHORT), run(*SHORT, "--logprobs", "2")
    rows = [line for line in err.splitlines() if " | " in line]
    assert (code, out) == usual[:2] and len(rows) == 24 and all(line.count(" | ") == 2 for line in rows)
    assert "logprobs" not in json.loads(run(*SHORT, "--json")[1])
    assert json.loads(run(*SHORT, "--json", "--logprobs", "0")[1])["logprobs"][0]["top_logprobs"] == []


def test_what_the_draft_gave_is_green(run, monkeypatch):
    """On a terminal, and only there: everywhere else stdout holds the text alone."""
    committed = []
    target, draft = sm.load_pair("builtin:target", "builtin:draft")
    ids = target.tokenizer.encode(PROMPT).ids
    sm.generate(target, [ids], draft=draft, max_new_tokens=24, on_commit=committed.extend)
    expected = "".join(
        f"{GREEN}{character}{USUAL}" if drafted else character
        for (_, token, drafted) in committed
        for character in [target.tokenizer.decode([token])]
    )
    assert GREEN in expected and plain(expected) != expected.replace(GREEN, "", 1)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    outputs = []
    for variables in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", Terminal())
            run(*SHORT, "--stream")
            outputs.append(sys.stdout.getvalue())
    assert outputs == [PROMPT + expected + "\n", *[PROMPT + plain(expected) + "\n"] * 2]
    assert run(*SHORT, "--stream")[1] == outputs[1]


def test_a_character_has_the_colour_of_the_token_that_completes_it(run, monkeypatch):
    def generate(target, prompts, *, on_commit, **_):
        for drafted in ((True, False), (False, True)):
            tokens = zip(target.tokenizer.encode("é").ids, drafted, strict=True)
            on_commit([sm.CommittedToken(0, token, its) for token, its in tokens])
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "generate", generate)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    run(*SHORT, "--stream")
    assert sys.stdout.getvalue() == f"{PROMPT}é{GREEN}é{USUAL}\n"


def test_a_bar_on_a_terminal(monkeypatch):
    """One line that is drawn over and goes away; before text is written, if it is asked to."""
    monkeypatch.setattr(streams, "_REDRAWN_S", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    asked, seen = iter([None, 0.0, 0.5, 2.0]), threading.Event()

    def share():
        done = next(asked, None)
        if done == 2.0:
            seen.set()
        return done

    with streams.signs_of_life(lambda: "reading\n1000 tokens", share) as end:
        assert seen.wait(30)
        end()
        drawn = sys.stderr.getvalue()
        print("text", file=sys.stderr)
    lines = [re.sub(r", \d+ s", "", line) for line in drawn.split("\r")[1:]]
    text = "reading\\n1000 tokens\x1b[K"
    assert lines[:4] == [
        text, f"[{'.' * 24}]   0% {text}", f"[{'#' * 12}{'.' * 12}]  50% {text}", f"[{'#' * 24}] 100% {text}"
    ]  # fmt: skip
    assert lines[-1] == "\x1b[K" and sys.stderr.getvalue() == drawn + "text\n"


def test_nothing_is_drawn_for_what_is_quick(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with streams.signs_of_life(lambda: "loading", lambda: 0.5):
        pass
    monkeypatch.setattr(streams, "_REDRAWN_S", 0.001)
    asked = threading.Event()
    with streams.signs_of_life(asked.set):
        assert asked.wait(30)
    assert sys.stderr.getvalue() == ""


def test_a_bar_is_gone_before_streamed_text(run, monkeypatch):
    screen, drawn = Terminal(), threading.Event()

    def watched(line, was_drawn, draw=streams._draw):
        if "reading" in line or "generating" in line:
            drawn.set()
        return draw(line, was_drawn)

    def generate(target, prompts, *, on_commit, **more):
        assert drawn.wait(30)
        for token in target.tokenizer.encode(" heard").ids:
            on_commit([sm.CommittedToken(0, token, False)])
            drawn.clear()
            assert not drawn.wait(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(streams, "_draw", watched)
    monkeypatch.setattr(streams, "_REDRAWN_S", 0.001)
    monkeypatch.setattr(session, "generate", generate)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    assert run(*SHORT, "--stream")[0] == 130
    before, _, after = screen.getvalue().rpartition("\r\x1b[K")
    assert "reading 11 prompt tokens" in before and after.startswith(f"{PROMPT} heard\n")


def test_the_bar_follows_what_is_read(run, monkeypatch):
    """Prompt tokens, then new ones."""
    seen = []

    @contextlib.contextmanager
    def signs_of_life(describe, share):
        seen.append(share)
        yield lambda: None

    def generate(*arguments, on_prefill, on_commit, **more):
        def watched(told):
            def tell(value):
                told(value)
                seen.append(share())

            return tell

        share = seen.pop()
        seen.append(share())
        return sm.generate(*arguments, on_prefill=watched(on_prefill), on_commit=watched(on_commit), **more)

    monkeypatch.setattr(session, "signs_of_life", signs_of_life)
    monkeypatch.setattr(session, "generate", generate)
    assert run("--prompt", "a" * 1200, "--n_tokens_to_generate", "8", "--draft", "none")[0] == 0
    assert seen[:3] == [0.0, 512 / 1200, 1024 / 1200] and 0.99 < seen[3] <= 1
    assert seen[4:] == [made / 8 for made in range(1, 9)]


def test_the_bar_follows_what_is_loaded(run, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def signs_of_life(describe, share):
        seen.append((describe(), share()))
        yield lambda: None
        seen.append((describe(), share()))

    monkeypatch.setattr(options, "signs_of_life", signs_of_life)
    assert run("--n_tokens_to_generate", "0")[0] == 0
    assert seen == [("loading builtin:target", None), ("loading builtin:draft", 1.0)]
