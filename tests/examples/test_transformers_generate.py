"""The program that a user pastes runs, and says what is so."""

from pathlib import Path

import pytest

from examples import transformers_generate
from speculative_mamba.testing.text import byte_level_tokenizer

transformers = pytest.importorskip("transformers")


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(["<eos>"]), eos_token="<eos>"
    )
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "eos_token_id": 256}
    for seed, name in enumerate(("target", "draft")):
        transformers.set_seed(seed)
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    capsys.readouterr()
    transformers_generate.main(str(tmp_path / "target"), str(tmp_path / "draft"), "It is")
    out = capsys.readouterr().out
    assert "the same text: True" in out and out.splitlines()[2].startswith("It is")
