"""Every broken or unknown checkpoint is a ValueError of one line that says what is wrong."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import speculative_mamba as sm


def refuse(source, *words, **options):
    with pytest.raises(ValueError) as caught:
        sm.load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_folder_that_does_not_exist(tmp_path):
    refuse(tmp_path / "absent", "does not exist")
    refuse("./absent", "does not exist")


def test_file_instead_of_a_folder(checkpoint):
    refuse(checkpoint().folder / "model.safetensors", "is a file", "folder")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "nobody--/..bad", "a/b--c"])
def test_hub_that_cannot_be_reached(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refuse(name, name)


@pytest.mark.parametrize("name", ["builtin:other", "builtin:", "builtin:../x"])
def test_unknown_embedded_model(name):
    refuse(name, "builtin:target", "builtin:draft")


def test_folder_without_config(checkpoint):
    folder = checkpoint().folder
    (folder / "config.json").unlink()
    refuse(folder, "config.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\xff\xfe", "null"])
def test_config_that_is_no_json_object(checkpoint, content):
    folder = checkpoint().folder
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refuse(folder, "config.json")


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("safetensors", {"model_type": "llama"}, ["'llama'", "MambaForCausalLM"]),
        ("safetensors", {"model_type": "gpt2"}, ["'gpt2'", "Mamba-2"]),
        ("safetensors", {"architectures": ["MambaForTokens"]}, ["MambaForTokens", "MambaForCausalLM"]),
        ("safetensors", {"architectures": "MambaForCausalLM"}, ["'MambaForCausalLM'"]),
        ("safetensors", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("safetensors", {"hidden_size": 0}, ["hidden_size"]),
        ("safetensors", {"hidden_size": "24"}, ["hidden_size"]),
        ("safetensors", {"num_hidden_layers": None}, ["num_hidden_layers"]),
        ("safetensors", {"state_size": -1}, ["state_size"]),
        ("safetensors", {"conv_kernel": 1.5}, ["conv_kernel"]),
        ("safetensors", {"time_step_rank": "many"}, ["time_step_rank"]),
        ("safetensors", {"expand": "two", "intermediate_size": None}, ["expand", "two"]),
        ("state-spaces", {"ssm_cfg": {"layer": "Mamba3"}}, ["'Mamba3'"]),
        ("state-spaces", {"attn_layer_idx": [1, 3]}, ["attn_layer_idx"]),
        ("state-spaces", {"d_intermediate": -64}, ["d_intermediate"]),
        ("state-spaces", {"rms_norm": False}, ["rms_norm"]),
        ("state-spaces", {"d_model": None}, ["d_model"]),
        ("state-spaces", {"ssm_cfg": "Mamba1"}, ["ssm_cfg"]),
        ("state-spaces", {"pad_vocab_size_multiple": 0}, ["pad_vocab_size_multiple"]),
    ],
    ids=str,
)
def test_config_that_makes_no_sense(checkpoint, layout, changes, words):
    written = checkpoint(layout)
    written.change_config(**changes)
    refuse(written.folder, str(written.folder), *words)


def test_config_of_no_known_format(checkpoint):
    folder = checkpoint().folder
    (folder / "config.json").write_text(json.dumps({"hidden_size": 24}))
    refuse(folder, "architecture")


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_no_weights(checkpoint, layout):
    folder = checkpoint(layout).folder
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        file.unlink()
    refuse(folder, "no weights", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces", "sharded"])
@pytest.mark.parametrize("damage", ["half", "empty", "start", "noise"])
def test_damaged_weights(checkpoint, layout, damage):
    folder = checkpoint(layout).folder
    file = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[0]
    content = file.read_bytes()
    changed = {
        "half": content[: len(content) // 2],
        "empty": b"",
        "start": b"\xff" * 64 + content[64:],
        "noise": os.urandom(5000),
    }
    file.write_bytes(changed[damage])
    refuse(folder, file.name, "truncated")


def test_missing_shard(checkpoint):
    folder = checkpoint("sharded").folder
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(folder, shard.name, "shard")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"x": "absent"}}], ids=str
)
def test_broken_index_of_shards(checkpoint, index):
    folder = checkpoint("sharded").folder
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "model.safetensors.index.json")


def test_shard_that_lacks_what_the_index_says(checkpoint):
    folder = checkpoint("sharded").folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *others = sorted(set(index["weight_map"].values()))
    index["weight_map"]["backbone.norm_f.weight"] = first
    index["weight_map"]["backbone.embeddings.weight"] = others[-1]
    path.write_text(json.dumps(index))
    refuse(folder, "is not in the shard")


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
@pytest.mark.parametrize(
    "name", ["backbone.layers.1.mixer.A_log", "backbone.norm_f.weight", "backbone.layers.2.mixer.conv1d.bias"]
)
def test_missing_tensor(checkpoint, layout, name):
    folder = checkpoint(layout).folder
    if layout == "safetensors":
        tensors = weights_of(folder)
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
    else:
        tensors = torch.load(folder / "pytorch_model.bin")
        del tensors[name]
        torch.save(tensors, folder / "pytorch_model.bin")
    refuse(folder, name)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hidden_size": 32}, "embeddings"),
        ({"vocab_size": 65}, "embeddings"),
        ({"state_size": 6}, "x_proj"),
        ({"conv_kernel": 5}, "conv1d"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"time_step_rank": 2}, "x_proj"),
        ({"intermediate_size": 50}, "in_proj"),
        ({"use_bias": True}, "in_proj.bias"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_the_config(checkpoint, changes, name):
    written = checkpoint()
    written.change_config(**changes)
    refuse(written.folder, name, "config.json")


def test_a_transposed_weight(checkpoint):
    folder = checkpoint().folder
    tensors = weights_of(folder)
    name = "backbone.layers.0.mixer.x_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, folder / "model.safetensors")
    refuse(folder, name, "shape")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused(checkpoint, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint("state-spaces").folder
    file = folder / "pytorch_model.bin"
    torch.save({"backbone.norm_f.weight": Malicious()}, file)
    refuse(folder, file.name)
    file.write_bytes(pickle.dumps({"x": Malicious()}, protocol=protocol))
    refuse(folder, file.name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}, {"x": {"y": torch.zeros(2)}}], ids=str)
def test_a_file_that_holds_something_else(checkpoint, content):
    folder = checkpoint("state-spaces").folder
    torch.save(content, folder / "pytorch_model.bin")
    refuse(folder, "dictionary of tensors")


def test_broken_tokenizer(checkpoint):
    """It is read when text is first needed; token ids do without."""
    folder = checkpoint().folder
    (folder / "tokenizer.json").write_text("{}")
    model = sm.load_model(folder)
    assert sm.generate(model, [[1]], max_new_tokens=2).stats.tokens == 2
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        sm.generate(model, [[1]], stop_strings=["x"])


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_token_ids_need_no_tokenizer(checkpoint, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = sm.load_model(checkpoint(layout).folder)
    assert sm.generate(model, [[1]], max_new_tokens=2, stop_token_ids=()).stats.tokens == 2
    with pytest.raises(ValueError, match="tokenizer"):
        sm.generate(model, [[1]], stop_strings=["x"])


@pytest.mark.parametrize("dtype", ["int8", "float", "nn", "", torch.int8, torch.float64, 16])
def test_unknown_dtype(checkpoint, dtype):
    folder = checkpoint().folder
    if dtype not in ("int8", torch.int8):
        refuse(folder, "unknown dtype", "int8", dtype=dtype)
    refuse(folder, "unknown state_dtype", "bfloat16", state_dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", "xpu", "mps"])
def test_unknown_device(checkpoint, device):
    refuse(checkpoint().folder, "device", "cpu", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_device(checkpoint, device):
    refuse(checkpoint().folder, "cuda", "cpu", device=device)


@pytest.mark.parametrize("backend", ["triton?", "", "CPU"])
def test_unknown_backend(checkpoint, backend):
    refuse(checkpoint().folder, "backend", "reference", backend=backend)
