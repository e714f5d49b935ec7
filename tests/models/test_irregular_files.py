"""Files of a checkpoint that are there, but are no files: an error that names them, and never a wait."""

import os

import pytest

import speculative_mamba as sm

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to(os.devnull),
    "folder": os.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("absent"),
}


def folder_with(checkpoint, name, kind):
    """A checkpoint of which one file is none."""
    path = checkpoint().folder / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    return path.parent


def refusal(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_files_of_a_model(checkpoint, name, kind):
    """Catches: a pipe is waited for, and what is no file counts as a file that is not there."""
    assert name in refusal(sm.load_model, folder_with(checkpoint, name, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_needed_later(checkpoint, name, kind):
    model = sm.load_model(folder_with(checkpoint, name, kind))
    assert name in refusal((lambda: model.tokenizer) if name == "tokenizer.json" else lambda: model.chat_template)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_gguf_file(tmp_path, kind):
    KINDS[kind](tmp_path / "x.gguf")
    assert "x.gguf cannot be read: it is a pipe or a device" in refusal(sm.load_model, tmp_path / "x.gguf")
