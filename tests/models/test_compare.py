"""The command line's own check of losslessness on pairs of every kind, as a user would run it."""

import json
import string
from pathlib import Path

import pytest
from published import FORMATS, VOCABULARY
from tokenizers import Tokenizer, models

from speculative_mamba import compare
from speculative_mamba.cli import main

CHARACTERS = (string.ascii_letters + string.digits + " .")[:VOCABULARY]


@pytest.fixture(autouse=True)
def few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_MOST", 2)


def folder_of(name: str, folder: Path, seed: int) -> str:
    folder.mkdir()
    if name == "mamba1":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "tie_word_embeddings": False}
        config = transformers.MambaConfig(vocab_size=VOCABULARY, **sizes)
        transformers.MambaForCausalLM(config).save_pretrained(folder)
    else:
        FORMATS[name](folder, seed)
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(CHARACTERS)}, merges=[]))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("rollback", ["auto", "snapshots", "replay"])
@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("mamba2attn-state-spaces", "llama-hf"),
        ("mamba-in-llama", "llama-hf"),
        ("mamba2-in-llama", "llama-hf"),
        ("mamba2-hf", "mamba2-state-spaces"),
        ("falcon-mamba-hf", "mamba1"),
        ("llama-hf", "mamba2-hf"),
        ("mamba1", "ngram"),
        ("mamba2-hf", "ngram"),
    ],
)
def test_compare_finds_equal_tokens(
    target: str, draft: str, rollback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_target", folder_of(target, tmp_path / "target", 0), "--rollback", rollback]
    if draft == "ngram":
        arguments += ["--draft", "ngram"]
    else:
        arguments += ["--model_draft", folder_of(draft, tmp_path / "draft", 1)]
    options = ["--prompt", "abcabcabc def", "--n_tokens_to_generate", "20", "--threads", "1", "--compare", "--json"]
    assert main([*arguments, *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["compare"]["tokens_equal"] is True
    assert len(report["tokens"]) == report["stats"]["tokens"] > 0


@pytest.mark.parametrize("size", [VOCABULARY - 1, VOCABULARY])
def test_vocabularies_are_compared_before_weights_are_read(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the sizes are equal, and the tokens not."""
    folders = [folder_of("mamba2-state-spaces", tmp_path / name, 0) for name in ("target", "draft")]
    vocabulary = {character: size - 1 - i for i, character in enumerate(CHARACTERS[:size])}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(f"{folders[1]}/tokenizer.json")
    for folder in folders:
        Path(folder, "pytorch_model.bin").write_bytes(b"not read")
    assert main(["--model_target", folders[0], "--model_draft", folders[1]]) == 2
    written = capsys.readouterr()
    assert "draft and target have different vocabularies" in written.err and not written.out


def test_weights_that_are_copied_give_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("mamba2-hf", tmp_path / "target", 0)
    texts = []
    for options in ([], ["--no_mmap"], ["--no-mmap", "--dtype", "float32"]):
        assert main(["--model_target", folder, "--prompt", "abc", "--n_tokens_to_generate", "9", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("abc") and len(set(texts)) == 1
