"""Checkpoints of transformers that keep the same weights in other ways."""

import json
from pathlib import Path

import pytest
import torch
from published import FORMATS
from safetensors.torch import load_file, save_file
from test_published import IDS, logits

import speculative_mamba as sm

names = pytest.mark.parametrize(
    "name", ["llama-hf", "granite-hf", "granite-hybrid-hf", "lfm2-hf", "jamba-hf", "bamba-hf", "falcon-h1-hf"]
)
all_names = pytest.mark.parametrize("name", [*names.args[1], "nemotron-h-hf"])
WEIGHTS = "model.safetensors"


@names
def test_a_tied_head_need_not_be_stored(name: str, tmp_path: Path) -> None:
    oracle = FORMATS[name](tmp_path, 0, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model = sm.load_model(tmp_path)
    assert model.head is model.embedding
    torch.testing.assert_close(logits(model), oracle(IDS), rtol=0, atol=1e-4)


@names
def test_a_tied_head_may_be_stored(name: str, tmp_path: Path) -> None:
    """With the embedding's values it is the embedding; a head of its own is used, as transformers does."""
    oracle = FORMATS[name](tmp_path, 0, tie_word_embeddings=True)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    model = sm.load_model(tmp_path)
    assert model.head is model.embedding
    torch.testing.assert_close(logits(model), oracle(IDS), rtol=0, atol=1e-4)
    save_file(tensors | {"lm_head.weight": -head}, tmp_path / WEIGHTS)
    torch.testing.assert_close(logits(sm.load_model(tmp_path)), -oracle(IDS), rtol=0, atol=1e-4)


@all_names
@pytest.mark.parametrize("extra", ["model.layers.1.self_attn.sinks", "model.layers.0.experts.weight"])
def test_a_tensor_that_the_config_does_not_call_for_is_named(name: str, extra: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path, 0)
    save_file(load_file(tmp_path / WEIGHTS) | {extra: torch.ones(3)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"{extra}.*does not call for") as caught:
        sm.load_model(tmp_path)
    assert "\n" not in str(caught.value)


@all_names
def test_two_files_give_the_same_bits_as_one(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path, 0)
    whole = logits(sm.load_model(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == file}, tmp_path / file)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert torch.equal(logits(sm.load_model(tmp_path)), whole)


@names
def test_extra_keys_do_not_matter(name: str, tmp_path: Path) -> None:
    """Computed buffers beside the weights, and fields of config.json that no model reads."""
    FORMATS[name](tmp_path, 0)
    expected = logits(sm.load_model(tmp_path))
    save_file(
        load_file(tmp_path / WEIGHTS) | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        tmp_path / WEIGHTS,
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rescale": [1], "router_jitter": 0.5}))
    assert torch.equal(logits(sm.load_model(tmp_path)), expected)
