"""Models in GGUF files: the same bits as from safetensors, and what comes with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FORMATS, random_hugging_face_model
from test_gguf_tokenizer import metadata, trained

import speculative_mamba as sm

gguf_files = pytest.importorskip("speculative_mamba.testing.gguf_files", reason="needs the gguf package")

IDS = [5, 9, 33, 2, 60, 17, 41, 8, 8, 25, 3, 50]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ONES = {
    "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0, "mlp_multipliers": [1.0, 1.0], "key_multiplier": 1.0,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0, "ssm_multipliers": [1.0] * 5,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mamba-hf", {}),
    ("mamba-hf", {"tie_word_embeddings": True, "use_conv_bias": False, "conv_kernel": 3}),
    ("falcon-mamba-hf", {"mixer_rms_eps": 1e-5}),
    ("mamba2-hf", {}),
    ("mamba2-hf", {"n_groups": 3, "tie_word_embeddings": True, "layer_norm_epsilon": 0.1}),
    ("llama-hf", {}),
    ("llama-hf", {"head_dim": 10, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("llama-hf", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0}}),
    ("granite-hf", {}),
    ("granite-hybrid-hf", {}),
    ("granite-hybrid-hf", {"position_embedding_type": "rope", "mamba_n_groups": 2, "tie_word_embeddings": True}),
    ("bamba-hf", {}),
    ("lfm2-hf", {}),
    ("lfm2-hf", {"tie_word_embeddings": True, "conv_L_cache": 4}),
    ("nemotron-h-hf", {}),
    ("jamba-hf", {}),
    ("jamba-hf", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("falcon-h1-hf", ONES),
    ("granite-moe-hf", {}),
    ("granite-moe-hybrid-hf", {}),
    ("lfm2-moe-hf", {"routed_scaling_factor": 1.5, "tie_word_embeddings": True}),
    ("lfm2-moe-hf", {"use_expert_bias": False, "norm_topk_prob": False, "tie_word_embeddings": True}),
    ("nemotron-h-moe-hf", {}),
    ("jamba-moe-hf", {}),
]
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(folder: Path, name: str, stored: torch.dtype = torch.float32, **config: Any) -> Path:
    """A tiny checkpoint in Hugging Face's format."""
    folder.mkdir()
    if name == "mamba-hf":
        random_hugging_face_model(**config).save_pretrained(folder)
    else:
        FORMATS[name](folder, 0, **config)
    if stored is not torch.float32:
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        save_file({key: tensor.to(stored) for key, tensor in load_file(file).items()}, file)
    return folder


def logits(model: sm.MambaLM, ids: list[int] = IDS) -> torch.Tensor:
    slot = torch.zeros(1, dtype=torch.int32)
    return model.verify(torch.tensor([ids]), model.new_cache(1, len(ids)), slot)[0]


def greedy(model: sm.MambaLM, count: int = 24, **options: Any) -> list[int]:
    result = sm.generate(model, [IDS[:5]], max_new_tokens=count, stop_token_ids=(), **options)
    return result.sequences[0].tolist()


@pytest.mark.parametrize(("name", "config"), CASES)
def test_logits_are_those_from_safetensors_bit_for_bit(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    folder = write(tmp_path / name, name, **config)
    expected = logits(sm.load_model(folder))
    model = sm.load_model(gguf_files.write_gguf(folder, tmp_path / "model.gguf"))
    assert torch.equal(logits(model), expected)
    assert model.files, "the weights stay in the mapped file"
    copied = sm.load_model(tmp_path / "model.gguf", mmap=False)
    assert not copied.files and torch.equal(logits(copied), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["mamba-hf", "mamba2-hf", "llama-hf", "granite-hybrid-hf", "lfm2-hf"])
def test_sixteen_bits_are_those_from_safetensors_bit_for_bit(tmp_path: Path, name: str, kind: str) -> None:
    folder = write(tmp_path / name, name, STORED[kind])
    model = sm.load_model(gguf_files.write_gguf(folder, tmp_path / "model.gguf", kind))
    assert model.embedding.dtype is STORED[kind]
    expected = sm.load_model(folder)
    assert torch.equal(logits(model), logits(expected))
    assert greedy(model) == greedy(expected)


def test_dtype_converts_what_a_file_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "granite-hybrid-hf")
    path = gguf_files.write_gguf(folder, tmp_path / "model.gguf")
    for dtype in ("bfloat16", "float16"):
        model = sm.load_model(path, dtype=dtype)
        assert torch.equal(logits(model), logits(sm.load_model(folder, dtype=dtype)))


def test_multipliers_of_falcon_h1_are_part_of_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "falcon-h1-hf")
    expected = logits(sm.load_model(folder))
    model = sm.load_model(gguf_files.write_gguf(folder, tmp_path / "model.gguf"))
    assert ((logits(model) - expected).norm() / expected.norm()).item() < 2e-6
    assert greedy(model) == greedy(sm.load_model(folder))


def test_either_name_of_the_epsilon_of_nemotron_h(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "nemotron-h-hf", layer_norm_epsilon=0.1)
    expected = logits(sm.load_model(folder))
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
        without = {f"nemotron_h.attention.{name}": None}
        model = sm.load_model(gguf_files.write_gguf(folder, tmp_path / f"{name}.gguf", metadata=without))
        assert torch.equal(logits(model), expected)


def test_factors_of_rotary_frequencies_are_read(tmp_path: Path) -> None:
    """Llama 3's scaling, which a GGUF file has as what each frequency is divided by."""
    rope = {
        "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    folder = write(tmp_path / "model", "llama-hf", rope_parameters=rope)
    scaled = sm.load_model(folder)
    plain = [theta for theta in (50.0 ** (-i / 6) for i in range(0, 6, 2))]
    factors = [a / b for a, b in zip(plain, scaled.config.blocks[0].inv_freq, strict=True)]
    assert factors != [1.0] * 3
    path = gguf_files.write_gguf(folder, tmp_path / "model.gguf", tensors={"rope_freqs.weight": torch.tensor(factors)})
    model = sm.load_model(path)
    assert model.config.blocks[0].inv_freq == pytest.approx(scaled.config.blocks[0].inv_freq, rel=1e-6)
    assert torch.allclose(logits(model), logits(scaled), rtol=1e-4, atol=1e-4)


def test_any_draft_leaves_the_text_as_it_is(tmp_path: Path) -> None:
    """Of another format and another architecture."""
    folders = {name: write(tmp_path / name, name) for name in ("mamba-hf", "llama-hf", "granite-hybrid-hf")}
    paths = {name: gguf_files.write_gguf(folder, tmp_path / f"{name}.gguf", "BF16") for name, folder in folders.items()}
    plain = {name: greedy(sm.load_model(path)) for name, path in paths.items()}
    for target in paths:
        for draft in (folders["mamba-hf"], paths["llama-hf"], paths["granite-hybrid-hf"]):
            pair = sm.load_pair(paths[target], draft)
            assert greedy(pair[0], draft=pair[1]) == plain[target], (target, draft)


@pytest.fixture
def with_text(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a tokenizer and a chat template, and the GGUF file made from it."""
    tokenizer = trained("llama-bpe")
    size = tokenizer.get_vocab_size()
    folder = write(tmp_path / "folder", "llama-hf", vocab_size=size + 3, eos_token_id=tokenizer.token_to_id("<|end|>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"chat_template": template, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    values = metadata(tokenizer, "llama-bpe", padding=3) | {"tokenizer.chat_template": template}
    return folder, gguf_files.write_gguf(folder, tmp_path / "model.gguf", metadata=values)


def test_tokenizer_ends_padding_and_chats_are_those_of_the_folder(with_text: tuple[Path, Path]) -> None:
    folder, file = (sm.load_model(path) for path in with_text)
    assert file.vocab_size == folder.vocab_size < folder.config.stored_vocab_size
    assert file.vocabulary.tokens == folder.vocabulary.tokens
    assert file.eos_token_id in (folder.eos_token_id, (folder.eos_token_id,))
    assert file.tokenizer.encode("The cat ").ids == folder.tokenizer.encode("The cat ").ids
    messages = [{"role": "user", "content": "hello"}]
    assert file.chat_prompt(messages) == folder.chat_prompt(messages)
    assert torch.equal(logits(file), logits(folder))


def test_a_draft_of_other_tokens_is_refused(with_text: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = with_text
    for target, draft in ((folder, path), (path, folder), (path, path)):
        sm.load_pair(target, draft)
    values = metadata(trained("llama-bpe"), "llama-bpe", padding=3)
    tokens = values["tokenizer.ggml.tokens"]
    values["tokenizer.ggml.tokens"] = [*tokens[:40], "another", *tokens[41:]]
    other = gguf_files.write_gguf(folder, tmp_path / "other.gguf", metadata=values)
    with pytest.raises(ValueError, match=r"different vocabularies .token 40 is 'another'"):
        sm.load_pair(folder, other)


def test_text_is_refused_by_name_and_ids_still_work(with_text: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = with_text
    values = metadata(trained("llama-bpe"), "kimi-k2", padding=3)
    model = sm.load_model(gguf_files.write_gguf(folder, tmp_path / "other.gguf", metadata=values))
    assert greedy(model) == greedy(sm.load_model(path))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre 'kimi-k2' is not supported"):
        _ = model.tokenizer


def test_the_command_line_takes_a_file(with_text: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    from speculative_mamba.cli import main

    folder, path = with_text
    texts = []
    for source in (folder, path):
        options = f"--model_target {source} --model_draft {path} --prompt cat --n_tokens_to_generate 9"
        assert not main(options.split())
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
