"""GGUF files made from Hugging Face checkpoints: what llama.cpp's conversion does to tensors, for tests and benchmarks.

Needs the gguf package.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..models.config import (
    AttentionConfig,
    ExpertsConfig,
    Mamba1Config,
    Mamba2Config,
    MlpConfig,
    ModelConfig,
    ShortConvConfig,
)
from ..models.files import read_json
from ..models.formats import Names, parse_config
from ..models.weights import read_tensors

ARCHITECTURES = {
    "mamba": "MAMBA", "falcon_mamba": "MAMBA", "mamba2": "MAMBA2", "llama": "LLAMA", "granite": "GRANITE",
    "granitemoehybrid": "GRANITE_HYBRID", "bamba": "GRANITE_HYBRID", "lfm2": "LFM2", "nemotron_h": "NEMOTRON_H",
    "jamba": "JAMBA", "falcon_h1": "FALCON_H1", "granitemoe": "GRANITE_MOE", "lfm2_moe": "LFM2MOE",
}  # fmt: skip
_RENAMED = {
    ".shared_mlp.output_linear.": ".mlp.down_proj.", ".dt_bias": ".dt_proj.bias", "backbone.embedding.":
    "backbone.embeddings.", ".expert_bias": ".expert_bias.bias", ".e_score_correction_bias": ".e_score_correction.bias",
}  # fmt: skip
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_INTERLEAVED = ("llama", "granite", "granitemoe", "granitemoehybrid", "bamba", "nemotron_h")
# Where a block has its halves, and what the size of weights is divided by there, if all other bits are random.
_RANDOM = {"Q4_K": {0: 300.0, 2: 40.0}, "Q6_K": {208: 1400.0}}
_ALWAYS_F32 = ("ssm_conv1d.weight", "shortconv.conv.weight", "norm.weight", "ffn_gate_inp.weight")


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    kind_of: Callable[[str], str | None] = lambda name: None,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    alignment: int | None = None,
) -> Path:
    """Writes the model of a folder as a GGUF file; one tensor at a time is widened.

    kind: the type of matrices; what has one dimension, convolutions and norms is F32. kind_of: the type of a tensor by
    its name in the file, or None for the rule. metadata: more keys and values, such as a tokenizer; a value of None
    leaves a key out. tensors: more of them, in F32. change: gives the values of a tensor that the file has.
    """
    config = read_json(checkpoint / "config.json")
    parsed, names = parse_config(config)
    routed = any(isinstance(mixer, ExpertsConfig) for mixers in parsed.mixers for mixer in mixers)
    architecture = "NEMOTRON_H_MOE" if routed and config["model_type"] == "nemotron_h" else None
    architecture = getattr(gguf.MODEL_ARCH, architecture or ARCHITECTURES[config["model_type"]])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    entries = {f"{prefix}.{key}": value for key, value in _metadata(config, parsed, names).items()}
    entries |= {"tokenizer.ggml.model": "none"} | dict(metadata or {})
    for key, value in entries.items():
        _add(writer, key, value)
    stored = {name: stored.tensor for name, stored in read_tensors(checkpoint).items()}
    if parsed.tie_embeddings:
        stored.pop(names.head, None)
    converted = [*_converted(parsed, names, architecture, _with_experts_together(stored)), *(tensors or {}).items()]
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
        values = change(name, _changed(config, name, tensor).float())
        writer.write_tensor_data(_packed(values.contiguous(), its))
    writer.close()
    return path


def _packed(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    exact = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if exact is not None:
        return tensor.to(exact).view(torch.uint8).numpy()
    if kind.name in _RANDOM:
        return _random_blocks(tensor, kind)
    return gguf.quants.quantize(tensor.numpy(), kind)


def _random_blocks(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of a type that the gguf package reads only: any, with weights of the tensor's size."""
    rng = np.random.default_rng(tensor.numel())
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (tensor.numel() // weights, nbytes), np.uint8)
    for at, divisor in _RANDOM[kind.name].items():
        scale = tensor.square().mean().sqrt().item() / divisor * rng.uniform(0.5, 1.5, len(blocks))
        blocks[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(*tensor.shape[:-1], -1)


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
    c: ModelConfig, names: Names, architecture: gguf.MODEL_ARCH, tensors: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    """Every tensor under its name in the file and in its shape there."""
    known_names = gguf.get_tensor_name_map(architecture, 1 + max(_layer(norm) for norm, *_ in names.blocks))
    mamba2 = next((mixer for mixers in c.mixers for mixer in mixers if isinstance(mixer, Mamba2Config)), None)
    routed = any(isinstance(mixer, ExpertsConfig) for mixers in c.mixers for mixer in mixers)
    for name, tensor in tensors.items():
        if routed:  # beside which the shared MLP has names of its own
            name = name.replace("shared_mlp.output_linear", "mlp.shared_mlp.down_proj")
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if name.endswith("shared_mlp.input_linear.weight"):
            parts, mlp = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True), "mlp.shared_mlp" * routed or "mlp"
            pieces = [(name.replace("shared_mlp.input_linear", f"{mlp}.{part}"), half) for part, half in parts]
        else:
            pieces = [(name, tensor)]
        for name, piece in pieces:
            known = known_names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"llama.cpp has no name for {name}")
            if "conv" in known and piece.ndim == 3:
                piece = piece.squeeze(1)
            elif known.endswith(("ssm_a", "ssm_d")) and mamba2 is not None:
                piece = piece[:, None]
            elif known.endswith("ssm_norm.weight"):
                piece = piece.view(mamba2.norm_groups, -1)
            yield known, piece


def _with_experts_together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a layer in one tensor (E, N, K), gates and ups apart, as the package knows their names."""
    apart, result = defaultdict(list), {}
    for name, tensor in tensors.items():
        found = re.search(r"layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$", name)
        if found is not None:
            layer, expert, part = found.groups()
            apart[layer, _EXPERT_PARTS.get(part, part)].append((int(expert), tensor))
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True):
                result[f"model.layers.{_layer(name)}.mlp.experts.{part}.weight"] = half
        else:
            result[name] = tensor
    for (layer, part), experts in apart.items():
        matrices = [tensor for _, tensor in sorted(experts, key=lambda pair: pair[0])]
        result[f"model.layers.{layer}.mlp.experts.{part}.weight"] = torch.stack(matrices)
    return result


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


def _metadata(config: dict[str, Any], c: ModelConfig, names: Names) -> dict[str, Any]:
    """What the file says of the architecture, by key without its name."""
    layers: dict[int, list[Any]] = defaultdict(list)
    for (norm, *_), mixers in zip(names.blocks, c.mixers, strict=True):
        layers[_layer(norm)] += mixers
    mixers = {type(mixer): mixer for mixers in c.mixers for mixer in mixers}
    values = {
        "context_length": 2**20, "embedding_length": c.d_model, "block_count": len(layers), "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": c.eps, "vocab_size": c.stored_vocab_size,
        "feed_forward_length": _of_layers(layers, MlpConfig, "d_inner") if config["model_type"] == "nemotron_h" else 0,
    }  # fmt: skip
    if config["model_type"] == "nemotron_h":
        values["attention.layer_norm_epsilon"] = c.eps
    if MlpConfig in mixers and config["model_type"] != "nemotron_h":
        values["feed_forward_length"] = mixers[MlpConfig].d_inner
    if ExpertsConfig in mixers:
        values |= _experts(config, mixers[ExpertsConfig], mixers.get(MlpConfig), layers)
    if AttentionConfig in mixers:
        values |= _attention(config, mixers[AttentionConfig], _of_layers(layers, AttentionConfig, "n_kv_heads"))
    if ShortConvConfig in mixers:
        values["shortconv.l_cache"] = mixers[ShortConvConfig].d_conv
    if Mamba1Config in mixers:
        m = mixers[Mamba1Config]
        normed = m.norm_eps is not None and not m.weighted_norms
        values |= {"ssm.time_step_rank": m.dt_rank, "ssm.dt_b_c_rms": normed}
    if Mamba2Config in mixers:
        m = mixers[Mamba2Config]
        values |= {"ssm.time_step_rank": m.n_heads, "ssm.group_count": m.norm_groups}
    if Mamba1Config in mixers or Mamba2Config in mixers:
        values |= {"ssm.conv_kernel": m.d_conv, "ssm.inner_size": m.d_inner, "ssm.state_size": m.d_state}
    if config["model_type"].startswith("granite"):
        values |= {
            "attention.scale": mixers[AttentionConfig].scale, "embedding_scale": c.embedding_multiplier,
            "residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling,
        }  # fmt: skip
    if ARCHITECTURES[config["model_type"]].startswith("GRANITE"):
        values["rope.scaling.finetuned"] = bool(mixers[AttentionConfig].inv_freq)
    return values


def _experts(
    config: dict[str, Any], e: ExpertsConfig, mlp: MlpConfig | None, layers: Mapping[int, list[Any]]
) -> dict[str, Any]:
    values = {"expert_count": e.num_experts, "expert_used_count": e.top_k}
    if config["model_type"].startswith("granite"):
        shared = {} if mlp is None else {"expert_shared_feed_forward_length": mlp.d_inner}
        return values | shared | {"feed_forward_length": e.d_inner}
    if config["model_type"] == "jamba":
        return values
    values |= {"expert_gating_func": 2, "expert_feed_forward_length": e.d_inner, "expert_weights_norm": e.normalize}
    values |= {"expert_weights_scale": e.scale}
    if config["model_type"] == "lfm2_moe":
        return values | {"leading_dense_block_count": config["num_dense_layers"]}
    return values | {
        "feed_forward_length": _of_layers(layers, ExpertsConfig, "d_inner"), "expert_shared_count": 1,
        "expert_shared_feed_forward_length": mlp.d_inner, "expert_group_count": e.groups,
        "expert_group_used_count": e.top_k_groups,
    }  # fmt: skip


def _layer(name: str) -> int:
    return int(re.search(r"layers\.(\d+)\.", name)[1])


def _of_layers(layers: Mapping[int, list[Any]], kind: type, field: str) -> int | list[int]:
    """A size that is the same for all layers, or one for each, 0 where there is no mixer of that kind."""
    sizes = [next((getattr(m, field) for m in layers[i] if isinstance(m, kind)), 0) for i in range(len(layers))]
    return sizes if 0 in sizes else sizes[0]


def _attention(config: dict[str, Any], c: AttentionConfig, shared: int | list[int]) -> dict[str, Any]:
    values = {
        "attention.head_count": c.n_heads, "attention.head_count_kv": shared, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
    }  # fmt: skip
    if c.inv_freq:
        rotary = config.get("rope_parameters") or {}
        theta = rotary.get("rope_theta", config.get("rope_theta", 10000.0))
        values |= {"rope.freq_base": float(theta), "rope.dimension_count": 2 * len(c.inv_freq)}
        if rotary.get("rope_type") == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary["factor"])}
    return values
