"""Every broken or unknown checkpoint is a ValueError of one line that says what is wrong."""

import json
import os
import pickle
import random

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
        assert word in f"^{message}", f"{word!r} is not in: {message}"


def ascii_start(content):
    return ascii(content[:30])


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


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "\xff\xfe", "null", "[" * 10**5, '{"hidden_size": ' + "9" * 5000 + "}"],
    ids=ascii_start,
)
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
        ("safetensors", {"num_hidden_layers": 10**10}, ["num_hidden_layers", "10000000000"]),
        ("safetensors", {"num_hidden_layers": 1e10}, ["num_hidden_layers"]),
        ("safetensors", {"hidden_size": True}, ["hidden_size"]),
        ("safetensors", {"hidden_size": 10**400}, ["hidden_size"]),
        ("safetensors", {"layer_norm_epsilon": 10**400}, ["layer_norm_epsilon"]),
        ("safetensors", {"layer_norm_epsilon": float("inf")}, ["layer_norm_epsilon"]),
        ("safetensors", {"layer_norm_epsilon": float("nan")}, ["layer_norm_epsilon"]),
        ("safetensors", {"layer_norm_epsilon": 1e-300}, ["layer_norm_epsilon"]),
        ("safetensors", {"expand": float("inf"), "intermediate_size": None}, ["expand"]),
        ("safetensors", {"expand": 1e29, "intermediate_size": None}, ["expand"]),
        ("safetensors", {"expand": 1e-3, "intermediate_size": None}, ["expand"]),
        ("safetensors", {"conv_kernel": 1}, ["conv_kernel", "from 2 to 8"]),
        ("safetensors", {"conv_kernel": 9}, ["conv_kernel", "from 2 to 8"]),
        ("safetensors", {"state_size": 10**6}, ["state_size"]),
        ("safetensors", {"eos_token_id": "0"}, ["eos_token_id"]),
        ("safetensors", {"eos_token_id": [1, None]}, ["eos_token_id"]),
        ("safetensors", {"eos_token_id": 1.5}, ["eos_token_id"]),
        ("safetensors", {"eos_token_id": -1}, ["eos_token_id"]),
        ("safetensors", {"model_type": ["mamba"]}, ["['mamba']", "not supported"]),
        ("safetensors", {"model_type": None, "architectures": {"a": 1}}, ["not supported"]),
        ("safetensors", {"hidden_act": ["x" * 5000]}, ["hidden_act", "…"]),
        ("safetensors", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "q8_0"]),
        ("state-spaces", {"quantization_config": "awq"}, ["quantization_config", "awq"]),
        ("state-spaces", {"n_layer": 10**9}, ["n_layer"]),
        ("state-spaces", {"ssm_cfg": {"expand": float("inf")}}, ["expand"]),
        ("state-spaces", {"ssm_cfg": {"layer": {}}}, ["ssm_cfg.layer"]),
        ("state-spaces", {"ssm_cfg": {"d_conv": 1}}, ["d_conv"]),
        ("state-spaces", {"ssm_cfg": {"dt_rank": []}}, ["dt_rank"]),
        ("state-spaces", {"ssm_cfg": []}, ["ssm_cfg"]),
        ("state-spaces", {"attn_layer_idx": {}}, ["attn_layer_idx"]),
        (
            "state-spaces",
            {"attn_layer_idx": [1], "attn_cfg": {"causal": True, "num_heads": 6, "d_conv": 9}},
            ["d_conv"],
        ),
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


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_generation_config_that_makes_no_sense(checkpoint, content):
    folder = checkpoint().folder
    (folder / "generation_config.json").write_text(content)
    refuse(folder, "generation_config.json")


def rewrite(folder, tensors):
    if (folder / "model.safetensors").exists():
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["backbone.layers.1.mixer.in_proj.weight", "backbone.layers.0.mixer.D"])
def test_weights_that_are_other_numbers(checkpoint, layout, dtype, name):
    folder = checkpoint(layout).folder
    tensors = weights_of(folder) if layout == "safetensors" else torch.load(folder / "pytorch_model.bin")
    rewrite(folder, tensors | {name: tensors[name].to(dtype)})
    refuse(folder, name, f"stored as {str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.1.mixer.in_proj.weight_scale",
        "backbone.layers.1.mixer.in_proj.qzeros",
        "backbone.layers.1.mixer.in_proj.lora_A.weight",
        "backbone.layers.1.mixer.in_proj.bias",
        "backbone.layers.0.mixer.x_proj.bias",
        "backbone.layers.3.norm.weight",
        "backbone.layers.3.mixer.D",
        "backbone.norm_f.bias",
        "lm_head.bias",
        "scale",
    ],
)
def test_a_tensor_that_the_config_does_not_call_for(checkpoint, layout, name):
    folder = checkpoint(layout).folder
    tensors = weights_of(folder) if layout == "safetensors" else torch.load(folder / "pytorch_model.bin")
    rewrite(folder, tensors | {name: torch.ones(3)})
    refuse(folder, name, "does not call for")


def test_a_tensor_that_the_index_does_not_name(checkpoint):
    folder = checkpoint("sharded").folder
    shard = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"weight_scale": torch.ones(3)}, shard)
    refuse(folder, "weight_scale")


def test_adapters(checkpoint):
    folder = checkpoint().folder
    (folder / "adapter_config.json").write_text("{}")
    refuse(folder, f"^{folder} has adapter_config.json", "merge")


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
        "noise": random.Random(1).randbytes(5000),
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


@pytest.mark.parametrize("kind", ["../{}", "{}/../../x", "/tmp/{}", "C:\\{}", "..\\{}", "a\0b", "", None, 3, ["{}"]])
def test_shard_outside_the_folder(checkpoint, kind):
    folder = checkpoint("sharded").folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    [(tensor, shard), *_] = index["weight_map"].items()
    (folder.parent / shard).write_bytes((folder / shard).read_bytes())
    index["weight_map"][tensor] = kind.format(shard) if isinstance(kind, str) else kind
    path.write_text(json.dumps(index))
    refuse(folder, path.name, "no file in its folder")


def test_shard_of_another_kind(checkpoint):
    folder = checkpoint("sharded").folder
    path = folder / "model.safetensors.index.json"
    torch.save({"x": torch.ones(2)}, folder / "x.bin")
    path.write_text(json.dumps({"weight_map": {"x": "x.bin"}}))
    refuse(folder, path.name, "x.bin")


@pytest.mark.parametrize("layout", ["bin", "state-spaces"])
@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu124", "2.9.1", "2.10.0a0+git1"])
def test_pickled_weights_are_not_read_by_a_torch_with_holes(checkpoint, layout, version, monkeypatch):
    folder = checkpoint(layout).folder
    sm.load_model(folder)
    monkeypatch.setattr(torch, "__version__", version)
    refuse(folder, "pytorch_model.bin", version, "CVE-2026-24747", "safetensors")


def test_old_format_of_torch(checkpoint):
    folder = checkpoint("bin").folder
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refuse(folder, "PyTorch 1.6", "save it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_files_that_are_something_else(checkpoint, layout, content, words):
    folder = checkpoint(layout).folder
    file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    file.write_bytes(content)
    refuse(folder, file.name, words)


def test_files_that_are_something_else_by_what_they_hold(checkpoint):
    folder = checkpoint("bin").folder
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file)
    torch.save(torch.nn.Linear(2, 2), file)
    refuse(folder, file.name, "other objects than tensors", "state_dict")
    save_file(tensors, file)
    refuse(folder, file.name, "is a safetensors file", "model.safetensors")
    file.write_bytes(b"weights")
    refuse(folder, file.name, "torch.save wrote no such file")
    file.write_bytes(b"")
    refuse(folder, file.name, "it is empty")


def test_pickled_weights_with_the_name_of_safetensors(checkpoint):
    folder = checkpoint("bin").folder
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    refuse(folder, "model.safetensors", "pickled")


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_files_that_cannot_be_read(checkpoint, layout, monkeypatch):
    folder = checkpoint(layout).folder
    file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    content, opened = file.read_bytes(), type(file).open

    def denied(path, *arguments, **options):
        if path == file:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(type(file), "open", denied)
        refuse(folder, file.name, "cannot be read: Permission denied")
    file.unlink()
    file.mkdir()
    refuse(folder, file.name, "cannot be read: Is a directory")
    file.rmdir()
    file.symlink_to(folder / "absent")
    refuse(folder, file.name, "cannot be read: No such file")
    file.unlink()
    file.write_bytes(content)
    sm.load_model(folder)


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


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}, {3: torch.zeros(2)}, {"x": {"y": torch.zeros(2)}}], ids=str)
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


@pytest.mark.parametrize("dtype", ["int8", "float", "nn", "", torch.int8, torch.float64, 16, [], {}, ("q8_0",)])
def test_unknown_dtype(checkpoint, dtype):
    folder = checkpoint().folder
    refuse(folder, "unknown dtype", "q8_0, q4_0", dtype=dtype)
    refuse(folder, "unknown state_dtype", "bfloat16", state_dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", "xpu", "mps", None, 0, []])
def test_unknown_device(checkpoint, device):
    refuse(checkpoint().folder, "device", "cpu", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_device(checkpoint, device):
    refuse(checkpoint().folder, "cuda", "cpu", device=device)


@pytest.mark.parametrize("backend", ["triton?", "", "CPU", None, [], {}])
def test_unknown_backend(checkpoint, backend):
    refuse(checkpoint().folder, "backend", "reference", backend=backend)


@pytest.mark.parametrize("options", [{"rollback": []}, {"rollback": "state"}, {"mmap": "no"}, {"mmap": None}], ids=str)
def test_other_arguments(checkpoint, options):
    refuse(checkpoint().folder, *options, **options)


@pytest.mark.parametrize("source", [None, 3, b"x", ["x"], "", "a\0b", "~no.such.user/x", "x" * 5000], ids=ascii)
def test_sources_that_are_no_names(source):
    refuse(source, "folder")


def test_a_model_of_transformers_instead_of_its_folder(checkpoint):
    refuse(checkpoint().oracle, "MambaForCausalLM", "from_transformers takes models")
    refuse(sm.load_model("builtin:draft"), "MambaLM")
