"""GGUF files made from Hugging Face checkpoints: what llama.cpp's conversion does to tensors, for tests and benchmarks.

Needs the gguf package.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..models.files import read_json
from ..models.weights import read_tensors

ARCHITECTURES = {
    "mamba": "MAMBA", "falcon_mamba": "MAMBA", "mamba2": "MAMBA2", "llama": "LLAMA", "granite": "GRANITE",
    "granitemoehybrid": "GRANITE_HYBRID", "bamba": "GRANITE_HYBRID", "lfm2": "LFM2", "nemotron_h": "NEMOTRON_H",
    "jamba": "JAMBA", "falcon_h1": "FALCON_H1",
}  # fmt: skip
_RENAMED = {
    ".shared_mlp.output_linear.": ".mlp.down_proj.", ".dt_bias": ".dt_proj.bias", "backbone.embedding.":
    "backbone.embeddings.",
}  # fmt: skip
_INTERLEAVED = ("llama", "granite", "granitemoehybrid", "bamba", "nemotron_h")
_MAMBA1 = ("mamba", "falcon_mamba", "jamba")
_ALWAYS_F32 = ("ssm_conv1d.weight", "shortconv.conv.weight", "norm.weight")


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    kind_of: Callable[[str], str | None] = lambda name: None,
    alignment: int | None = None,
) -> Path:
    """Writes the model of a folder as a GGUF file; one tensor at a time is widened.

    kind: the type of matrices; what has one dimension, convolutions and norms is F32. kind_of: the type of a tensor by
    its name in the file, or None for the rule. metadata: more keys and values, such as a tokenizer; a value of None
    leaves a key out. tensors: more of them, in F32.
    """
    config = read_json(checkpoint / "config.json")
    family = config["model_type"]
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[family])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    entries = {f"{prefix}.{key}": value for key, value in _METADATA[family](config).items()}
    entries |= {"tokenizer.ggml.model": "none"} | dict(metadata or {})
    for key, value in entries.items():
        _add(writer, key, value)
    stored = {name: stored.tensor for name, stored in read_tensors(checkpoint).items()}
    converted = [*_converted(config, architecture, stored), *(tensors or {}).items()]
    kinds = []
    for name, tensor in converted:
        stays = tensor.ndim == 1 or name.endswith(_ALWAYS_F32) or ".weight" not in name
        kinds.append(gguf.GGMLQuantizationType[kind_of(name) or ("F32" if stays else kind)])
        nbytes = tensor.numel() // gguf.GGML_QUANT_SIZES[kinds[-1]][0] * gguf.GGML_QUANT_SIZES[kinds[-1]][1]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kinds[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, tensor), its in zip(converted, kinds, strict=True):
        writer.write_tensor_data(_packed(_changed(config, name, tensor).float().contiguous(), its))
    writer.close()
    return path


def _packed(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    exact = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if exact is not None:
        return tensor.to(exact).view(torch.uint8).numpy()
    return gguf.quants.quantize(tensor.numpy(), kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _converted(
    config: dict[str, Any], architecture: gguf.MODEL_ARCH, tensors: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    """Every tensor under its name in the file and in its shape there."""
    names = gguf.get_tensor_name_map(architecture, _layers(config))
    heads = config.get("n_groups", config.get("mamba_n_groups", 1))
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", config.get("tie_embedding")):
            continue
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if name.endswith("shared_mlp.input_linear.weight"):
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            pieces = [(name.replace("shared_mlp.input_linear", f"mlp.{part}"), half) for part, half in parts]
        else:
            pieces = [(name, tensor)]
        for name, piece in pieces:
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"llama.cpp has no name for {name}")
            if piece.ndim == 3:
                piece = piece.squeeze(1)
            elif known.endswith(("ssm_a", "ssm_d")) and config["model_type"] not in _MAMBA1:
                piece = piece[:, None]
            elif known.endswith("ssm_norm.weight"):
                piece = piece.view(heads, -1)
            yield known, piece


def _changed(config: dict[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values that the file has."""
    if name.endswith("ssm_a"):
        return -tensor.float().exp()
    if config["model_type"] in _INTERLEAVED and ".attn_q." in name:
        return _interleaved(tensor, config["num_attention_heads"])
    if config["model_type"] in _INTERLEAVED and ".attn_k." in name:
        return _interleaved(tensor, config["num_key_value_heads"])
    if config["model_type"] == "falcon_h1":
        return tensor.float() * _falcon_h1_multiplier(config, name, tensor)
    return tensor


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The two halves of each head in turn."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _falcon_h1_multiplier(config: dict[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    inner = config["mamba_d_ssm"]
    state, heads = config["mamba_n_groups"] * config["mamba_d_state"], config["mamba_n_heads"]
    attention_in, (gate, down) = config["attention_in_multiplier"], config["mlp_multipliers"]
    z, x, B, C, dt = config["ssm_multipliers"]
    multipliers = {
        "ffn_down.weight": down, "ffn_gate.weight": gate, "attn_k.weight": config["key_multiplier"] * attention_in,
        "attn_q.weight": attention_in, "attn_v.weight": attention_in,
        "attn_output.weight": config["attention_out_multiplier"], "ssm_out.weight": config["ssm_out_multiplier"],
        "output.weight": config["lm_head_multiplier"], "token_embd.weight": config["embedding_multiplier"],
    }  # fmt: skip
    if name.endswith("ssm_in.weight"):
        parts = torch.tensor([z, x, B, C, dt]).repeat_interleave(torch.tensor([inner, inner, state, state, heads]))
        return config["ssm_in_multiplier"] * parts[:, None]
    matching = [value for suffix, value in multipliers.items() if name == suffix or name.endswith(f".{suffix}")]
    return torch.tensor(matching[0] if matching else 1.0)


def _layers(config: dict[str, Any]) -> int:
    return len(config["layers_block_type"]) if config["model_type"] == "nemotron_h" else config["num_hidden_layers"]


def _common(config: dict[str, Any], eps: str) -> dict[str, Any]:
    return {
        "context_length": 2**20, "embedding_length": config["hidden_size"], "block_count": _layers(config),
        "attention.layer_norm_rms_epsilon": config[eps], "vocab_size": config["vocab_size"], "feed_forward_length": 0,
        "attention.head_count": 0,
    }  # fmt: skip


def _attention(config: dict[str, Any], attending: list[bool] | None = None) -> dict[str, Any]:
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = {
        "attention.head_count": heads, "attention.key_length": head_dim, "attention.value_length": head_dim,
        "attention.head_count_kv": shared if attending is None else [shared if it else 0 for it in attending],
    }  # fmt: skip
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        values |= {"rope.freq_base": float(rotary["rope_theta"]), "rope.dimension_count": head_dim}
    if "partial_rotary_factor" in rotary:
        values["rope.dimension_count"] = int(head_dim * rotary["partial_rotary_factor"])
    if rotary.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary["factor"])}
    return values


def _mamba(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config, "layer_norm_epsilon") | {
        "ssm.conv_kernel": config["conv_kernel"], "ssm.inner_size": config["intermediate_size"],
        "ssm.state_size": config["state_size"], "ssm.time_step_rank": config["time_step_rank"],
        "ssm.dt_b_c_rms": config["model_type"] == "falcon_mamba",
    }  # fmt: skip


def _mamba2(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config, "layer_norm_epsilon") | {
        "ssm.conv_kernel": config["conv_kernel"], "ssm.inner_size": config["num_heads"] * config["head_dim"],
        "ssm.state_size": config["state_size"], "ssm.time_step_rank": config["num_heads"],
        "ssm.group_count": config["n_groups"],
    }  # fmt: skip


def _prefixed_mamba2(config: dict[str, Any], inner: int) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config["mamba_d_conv"], "ssm.inner_size": inner, "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_n_heads"], "ssm.group_count": config["mamba_n_groups"],
    }  # fmt: skip


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config, "rms_norm_eps") | _attention(config) | {"feed_forward_length": config["intermediate_size"]}


def _granite(config: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    }  # fmt: skip
    return _llama(config) | {key: float(config[name]) for key, name in keys.items()}


def _granite_hybrid(config: dict[str, Any]) -> dict[str, Any]:
    attending = [kind in ("attention", "full_attention") for kind in config["layer_types"]]
    return _granite({"intermediate_size": config["shared_intermediate_size"]} | config) | _prefixed_mamba2(
        config, config["mamba_expand"] * config["hidden_size"]
    ) | _attention(config, attending) | {
        "feed_forward_length": config["shared_intermediate_size"],
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
    }  # fmt: skip


def _bamba(config: dict[str, Any]) -> dict[str, Any]:
    attending = [i in config["attn_layer_indices"] for i in range(config["num_hidden_layers"])]
    mamba = _prefixed_mamba2(config, config["mamba_expand"] * config["hidden_size"])
    return _llama(config) | mamba | _attention(config, attending) | {"rope.scaling.finetuned": True}


def _lfm2(config: dict[str, Any]) -> dict[str, Any]:
    attending = [kind == "full_attention" for kind in config["layer_types"]]
    inner = int(2 * config["intermediate_size"] / 3)
    inner = -(-inner // config["block_multiple_of"]) * config["block_multiple_of"]
    return _common(config, "norm_eps") | _attention(config, attending) | {
        "feed_forward_length": inner, "shortconv.l_cache": config["conv_L_cache"],
    }  # fmt: skip


def _nemotron_h(config: dict[str, Any]) -> dict[str, Any]:
    kinds = config["layers_block_type"]
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    rotary = {"rope_parameters": None}
    return _common(config, "layer_norm_epsilon") | {
        "ssm.conv_kernel": config["conv_kernel"], "ssm.inner_size": inner, "ssm.state_size": config["ssm_state_size"],
        "ssm.time_step_rank": config["mamba_num_heads"], "ssm.group_count": config["n_groups"],
        "feed_forward_length": [config["intermediate_size"] if kind == "mlp" else 0 for kind in kinds],
    } | _attention(config | rotary, [kind in ("attention", "full_attention") for kind in kinds])  # fmt: skip


def _jamba(config: dict[str, Any]) -> dict[str, Any]:
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    attending = [i % period == offset for i in range(config["num_hidden_layers"])]
    return _common(config, "rms_norm_eps") | _attention(config | {"rope_parameters": None}, attending) | {
        "ssm.conv_kernel": config["mamba_d_conv"], "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.state_size": config["mamba_d_state"], "ssm.time_step_rank": config["mamba_dt_rank"],
        "feed_forward_length": config["intermediate_size"], "expert_count": config["num_experts"],
    }  # fmt: skip


def _falcon_h1(config: dict[str, Any]) -> dict[str, Any]:
    return _llama(config) | _prefixed_mamba2(config, config["mamba_d_ssm"])


_METADATA = {
    "mamba": _mamba, "falcon_mamba": _mamba, "mamba2": _mamba2, "llama": _llama, "granite": _granite,
    "granitemoehybrid": _granite_hybrid, "bamba": _bamba, "lfm2": _lfm2, "nemotron_h": _nemotron_h, "jamba": _jamba,
    "falcon_h1": _falcon_h1,
}  # fmt: skip
