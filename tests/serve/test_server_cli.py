"""``speculative-mamba serve``: bad input is one line and exit code 2."""

import socket
import sys

import pytest

from speculative_mamba.cli import serve
from speculative_mamba.serve.protocol import ServedModel, recommended_sampling

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "-1"], "--port"), (["--port", "65536"], "--port"), (["--port", "a"], "--port"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"), (["--host", "a\0b"], "cannot listen on"),
        (["--host", "8.8.8.8"], "cannot listen on 8.8.8.8"), (["--api_key", ""], "--api_key must be"),
        (["--api_key", "two words"], "--api_key must be"), (["--api_key", "schlüssel"], "--api_key must be"),
        (["--max_batch_size", "0"], "--max_batch_size"), (["--max_queue_size", "0"], "--max_queue_size"),
        (["--max_length", "1"], "--max_length"), (["--max_body_mb", "0"], "--max_body_mb"),
        (["a", "b"], "unrecognized"), (["--served_model_name", ""], "--served_model_name"),
        (["a", "--model_target", "b"], "named twice"), (["/nowhere"], "/nowhere"), (["--K", "16"], "lookahead (K)"),
        (["--K", "auto"], "lookahead (K)"), (["--acceptance", "x"], "--acceptance"), (["--prompt", "a"], "--prompt"),
    ],
    ids=lambda value: " ".join(value).replace("\0", "NUL") if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input(run, arguments, words):
    code, out, err = run("serve", *(["--port", "0"] if "--port" not in arguments else []), *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_a_port_that_is_taken(run, taken):
    code, out, err = run("serve", "--port", taken)
    assert (code, out) == (2, "") and f"cannot listen on 127.0.0.1, port {taken}" in err and err.count("\n") == 1


def test_options_that_do_nothing_are_said(run):
    code, out, err = run("serve", "--port", "0", "--draft", "none", "--K", "16")
    assert (code, out) == (2, "") and len(err.splitlines()) == 2
    assert "--K has no effect: without a draft nothing is drafted" in err.splitlines()[0]


def test_an_empty_key_in_the_environment_is_no_open_door(run, monkeypatch):
    monkeypatch.setenv("SPECULATIVE_MAMBA_API_KEY", "")
    code, out, err = run("serve", "--port", "0")
    assert (code, out) == (2, "") and "SPECULATIVE_MAMBA_API_KEY must be" in err and err.count("\n") == 1


@pytest.mark.parametrize("library", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_its_libraries(run, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    for module in ("openai_api", "metrics"):
        monkeypatch.delitem(sys.modules, f"speculative_mamba.serve.{module}", raising=False)
        monkeypatch.delattr(f"speculative_mamba.serve.{module}", raising=False)
    code, out, err = run("serve", "--port", "0")
    assert (code, out) == (2, "") and f"{library}, which is not installed" in err and '".[serve]"' in err


def test_a_model_that_recommends_what_is_not_supported(run, chat_model, tmp_path):
    for file in chat_model.chat_template.origin.parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4}')
    code, out, err = run("serve", str(tmp_path), "--port", "0")
    assert (code, out) == (2, "") and "num_beams = 4" in err and "--no_default_sampling" in err and err.count("\n") == 1


def test_help_names_every_option(run):
    code, out, _ = run("serve", "--help")
    assert code == 0 and {"--host", "--api-key", "--model_draft", "--cg", "MODEL"} <= set(out.replace(",", " ").split())


@pytest.mark.parametrize(
    ("host", "key", "lines"), [("127.0.0.1", None, 1), ("::1", None, 1), ("0.0.0.0", "k", 1), ("0.0.0.0", None, 2)]
)
def test_the_address_is_said_and_who_may_use_it(capsys, host, key, lines):
    with serve.bind(host, 0) as listener:
        serve.announce(listener, ServedModel(None, "pair", 8), key)
        shown = f"[{host}]" if ":" in host else host
        said = capsys.readouterr().err.splitlines()
    assert len(said) == lines and said[0].split()[-1].startswith(f"http://{shown}:")
    assert all("whoever reaches" in line for line in said[1:])


class Recommends:
    def __init__(self, default_sampling):
        self.default_sampling = default_sampling


def test_default_sampling():
    """What the model states, else OpenAI's; greedy only if a request says so."""
    from speculative_mamba import SamplingParams

    stated = SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert recommended_sampling(Recommends(stated)) == stated
    assert recommended_sampling(Recommends(SamplingParams())) == SamplingParams(temperature=1.0)
