"""Tiny random checkpoints in every public format but Mamba-1's, each with an oracle that knows nothing of this package:
transformers where it has the model, else a forward pass in float64 written from the published definition."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_forward import hybrid_of_llama, state_spaces
from safetensors.torch import save_file

VOCABULARY = 64
WIDTH = 24
Oracle = Callable[[list[int]], torch.Tensor]  # token ids → logits (L, V)


class RandomTensors(dict):
    """Tensors by name, drawn when they are first asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name: str, *shape: int) -> None:
        normal = torch.randn(shape, generator=self.generator)
        if name.endswith("A_log"):
            self[name] = torch.rand(shape, generator=self.generator) * 2 - 0.5
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            self[name] = normal * 0.5 - 1
        elif name.endswith(("norm.weight", "norm2.weight", "norm_f.weight", "layernorm.weight", ".D")):
            self[name] = 1 + 0.3 * normal
        elif name.endswith("bias") or "conv1d" in name:
            self[name] = 0.4 * normal
        else:
            self[name] = normal * (1.0 if "embed" in name else 1.5 * shape[-1] ** -0.5)

    def mamba2(self, p: str, inner: int, heads: int, projected: int, convolved: int, ssm: dict[str, Any]) -> None:
        self.draw(p + "in_proj.weight", projected, WIDTH)
        self.draw(p + "conv1d.weight", convolved, 1, ssm.get("d_conv", 4))
        self.draw(p + "conv1d.bias", convolved)
        for name in ("dt_bias", "A_log"):
            self.draw(p + name, heads)
        self.draw(p + "D", inner if ssm.get("D_has_hdim") else heads)
        if ssm.get("rmsnorm", True):
            self.draw(p + "norm.weight", inner)
        self.draw(p + "out_proj.weight", WIDTH, inner)
        if ssm.get("bias"):
            self.draw(p + "in_proj.bias", projected)
            self.draw(p + "out_proj.bias", WIDTH)


def random_hugging_face_model(seed: int = 0, **config: Any) -> Any:
    """Mamba-1, as transformers has it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3,
        "tie_word_embeddings": False, "eos_token_id": 0,
    }  # fmt: skip
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**{**sizes, **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as initialised the biases are zero and the norms one
        for name, parameter in model.named_parameters():
            scale = 0.05 if name.endswith(("A_log", "D")) else 0.3
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def _of_transformers(folder: Path, config_class: str, model_class: str, seed: int, config: dict[str, Any]) -> Oracle:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes | config)).eval()
    model.config._experts_implementation = "eager"  # the others take aligned sizes only
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as initialised the biases are zero and the norms one
        for name, parameter in model.named_parameters():
            scale = 0.05 if name.endswith(("A_log", "D")) else 0.3
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # of a router
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    model.save_pretrained(folder)

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0]

    logits.model = model
    return logits


def mamba2_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {"state_size": 10, "num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    return _of_transformers(folder, "Mamba2Config", "Mamba2ForCausalLM", seed, sizes | config)


def falcon_mamba_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {"state_size": 5, "time_step_rank": 3}
    return _of_transformers(folder, "FalconMambaConfig", "FalconMambaForCausalLM", seed, sizes | config)


def llama_hf(folder: Path, seed: int, older_fields: bool = False, **config: Any) -> Oracle:
    """older_fields: the rotary embedding is described as transformers before version 5 did."""
    sizes = {"intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    oracle = _of_transformers(folder, "LlamaConfig", "LlamaForCausalLM", seed, sizes | config)
    if older_fields:
        _with_older_rotary_fields(folder)
    return oracle


def _with_older_rotary_fields(folder: Path, **other: Any) -> None:
    path = folder / "config.json"
    written = json.loads(path.read_text())
    rotary = written.pop("rope_parameters")
    written["rope_theta"], kind = rotary.pop("rope_theta"), rotary["rope_type"]
    written["rope_scaling"] = None if kind == "default" else {**rotary, "type": kind}
    path.write_text(json.dumps(written | other))


def granite_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.35, "attention_multiplier": 0.21, "logits_scaling": 3.0,
    }  # fmt: skip
    return _of_transformers(folder, "GraniteConfig", "GraniteForCausalLM", seed, sizes | config)


def granite_hybrid_hf(folder: Path, seed: int, spelling: dict[str, str] | None = None, **config: Any) -> Oracle:
    """spelling: how the kinds of layers are called in config.json, as in the published models of Granite 4.0."""
    sizes = {
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 37, "num_attention_heads": 4,
        "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 6, "mamba_d_state": 10, "mamba_chunk_size": 8, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.35, "attention_multiplier": 0.21, "logits_scaling": 3.0,
    }  # fmt: skip
    oracle = _of_transformers(folder, "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", seed, sizes | config)
    if spelling is not None:
        path = folder / "config.json"
        written = json.loads(path.read_text())
        written["layer_types"] = [spelling[kind] for kind in written["layer_types"]]
        path.write_text(json.dumps(written))
    return oracle


def granite_moe_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "intermediate_size": 13, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "num_local_experts": 6, "num_experts_per_tok": 3, "embedding_multiplier": 3.0, "residual_multiplier": 0.35,
        "attention_multiplier": 0.21, "logits_scaling": 3.0,
    }  # fmt: skip
    return _of_transformers(folder, "GraniteMoeConfig", "GraniteMoeForCausalLM", seed, sizes | config)


def granite_moe_hybrid_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 13, "shared_intermediate_size": 20}
    return granite_hybrid_hf(folder, seed, **sizes | config)


def lfm2_moe_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "intermediate_size": 37, "moe_intermediate_size": 13, "num_experts": 6, "num_experts_per_tok": 2,
        "num_dense_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv"],
    }  # fmt: skip
    return _of_transformers(folder, "Lfm2MoeConfig", "Lfm2MoeForCausalLM", seed, sizes | config)


def lfm2_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "intermediate_size": 54, "block_multiple_of": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv"],
    }  # fmt: skip
    return _of_transformers(folder, "Lfm2Config", "Lfm2ForCausalLM", seed, sizes | config)


def nemotron_h_hf(folder: Path, seed: int, written: dict[str, Any] | None = None, **config: Any) -> Oracle:
    """written: other fields of config.json, None for those to leave out. The least dt, which the authors' code has from
    ``time_step_limit``, is what transformers calls ``time_step_min``."""
    sizes = {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"], "num_hidden_layers": 4,
        "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "ssm_state_size": 10, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8,
        "time_step_floor": 0.2, "time_step_max": 2.0,
    }  # fmt: skip
    sizes["time_step_min"] = config.get("time_step_limit", (1e-9, math.inf))[0]
    oracle = _of_transformers(folder, "NemotronHConfig", "NemotronHForCausalLM", seed, sizes | config)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | (written or {})
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return oracle


def nemotron_h_moe_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 12,
        "num_experts_per_tok": 3, "moe_intermediate_size": 13, "moe_shared_expert_intermediate_size": 20,
        "n_group": 4, "topk_group": 3, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    return nemotron_h_hf(folder, seed, **sizes | config)


def jamba_moe_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    return jamba_hf(folder, seed, **{"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20} | config)


def jamba_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 5,
    }  # fmt: skip
    return _of_transformers(folder, "JambaConfig", "JambaForCausalLM", seed, sizes | config)


def bamba_hf(folder: Path, seed: int, older_fields: bool = False, **config: Any) -> Oracle:
    sizes = {
        "attn_layer_indices": [1], "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1,
        "mamba_n_heads": 6, "mamba_d_state": 10, "mamba_chunk_size": 8,
    }  # fmt: skip
    oracle = _of_transformers(folder, "BambaConfig", "BambaForCausalLM", seed, sizes | config)
    if older_fields:
        _with_older_rotary_fields(folder, attn_rotary_emb=4)
    return oracle


def falcon_h1_hf(folder: Path, seed: int, **config: Any) -> Oracle:
    sizes = {
        "num_hidden_layers": 2, "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_state": 10, "mamba_chunk_size": 8, "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.3, "mlp_multipliers": [0.8, 0.6], "key_multiplier": 1.3, "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.6,
        "ssm_multipliers": [0.7, 0.8, 1.3, 1.4, 0.9],
    }  # fmt: skip
    return _of_transformers(folder, "FalconH1Config", "FalconH1ForCausalLM", seed, sizes | config)


def mamba2_state_spaces(folder: Path, seed: int, **config: Any) -> Oracle:
    ssm = {"layer": "Mamba2", "d_state": 9, "headdim": 8, **config.pop("ssm_cfg", {})}
    settings = {
        "d_model": WIDTH, "d_intermediate": 0, "n_layer": 3, "vocab_size": VOCABULARY, "ssm_cfg": ssm,
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": False, **config,
    }  # fmt: skip
    inner, groups = ssm.get("expand", 2) * WIDTH, ssm.get("ngroups", 1)
    convolved, heads = inner + 2 * groups * ssm["d_state"], inner // ssm["headdim"]
    attn, hidden = settings["attn_cfg"], math.ceil(settings["d_intermediate"] / 128) * 128
    tensors = RandomTensors(seed)
    tensors.draw("backbone.embedding.weight", VOCABULARY, WIDTH)
    for i in range(settings["n_layer"]):
        p = f"backbone.layers.{i}."
        tensors.draw(p + "norm.weight", WIDTH)
        if i in settings["attn_layer_idx"]:
            q = attn["num_heads"] * attn["head_dim"]
            packed = q + 2 * attn.get("num_heads_kv", attn["num_heads"]) * attn["head_dim"]
            tensors.draw(p + "mixer.in_proj.weight", packed, WIDTH)
            tensors.draw(p + "mixer.out_proj.weight", WIDTH, q)
            if attn.get("qkv_proj_bias", True):
                tensors.draw(p + "mixer.in_proj.bias", packed)
            if attn.get("out_proj_bias", True):
                tensors.draw(p + "mixer.out_proj.bias", WIDTH)
            if attn.get("d_conv"):
                tensors.draw(p + "mixer.conv1d.weight", packed, 1, attn["d_conv"])
                tensors.draw(p + "mixer.conv1d.bias", packed)
        else:
            tensors.mamba2(p + "mixer.", inner, heads, inner + convolved + heads, convolved, ssm)
        if hidden:
            tensors.draw(p + "norm2.weight", WIDTH)
            tensors.draw(p + "mlp.fc1.weight", 2 * hidden, WIDTH)
            tensors.draw(p + "mlp.fc2.weight", WIDTH, hidden)
    tensors.draw("backbone.norm_f.weight", WIDTH)
    tensors.draw("lm_head.weight", VOCABULARY, WIDTH)
    if settings["tie_embeddings"]:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    return lambda ids: state_spaces(settings, tensors, ids)


def mamba2attn_state_spaces(folder: Path, seed: int, attn_cfg: dict[str, Any] | None = None, **config: Any) -> Oracle:
    attn = {
        "causal": True, "d_conv": 4, "head_dim": 8, "num_heads": 6, "out_proj_bias": False, "qkv_proj_bias": False,
        "rotary_emb_dim": 4, **(attn_cfg or {}),
    }  # fmt: skip
    return mamba2_state_spaces(folder, seed, **{"attn_layer_idx": [1], "attn_cfg": attn, **config})


def _in_llama(folder: Path, seed: int, ssm: dict[str, Any], merged: bool, config: dict[str, Any]) -> Oracle:
    """config: fields of mamba_config.json; its "base": fields of config.json."""
    inner, shared, hidden = WIDTH, config.get("d_xb", 12), 37
    base = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCABULARY,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": hidden,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False,
        **config.pop("base", {}),
    }  # fmt: skip
    mamba = {
        "d_model": WIDTH, "ssm_cfg": ssm, "rms_norm_eps": 1e-5, "vocab_size": None, "d_inner": inner, "d_xb": shared,
        "intermediate_size": hidden, "hidden_act": "silu", "n_layer": 3, "attn_layers": [1], **config,
    }  # fmt: skip
    t, N = RandomTensors(seed), ssm["d_state"]
    t.draw("model.embed_tokens.weight", VOCABULARY, WIDTH)
    for i in range(mamba["n_layer"]):
        p = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            t.draw(f"{p}{name}.weight", WIDTH)
        for name, shape in {"gate": (hidden, WIDTH), "up": (hidden, WIDTH), "down": (WIDTH, hidden)}.items():
            t.draw(f"{p}mlp.{name}_proj.weight", *shape)
        m = p + "mamba."
        if i in mamba["attn_layers"]:
            for name, rows in {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2, "o": WIDTH}.items():
                t.draw(f"{p}self_attn.{name}_proj.weight", rows, WIDTH)
        elif "ngroups" in ssm:
            repeated = ssm.get("repeat_kv_before_conv", False)
            convolved = 3 * inner if repeated else inner + 2 * shared
            t.mamba2(m, inner, ssm["ngroups"], 2 * inner + 2 * shared + ssm["ngroups"], convolved, ssm)
        else:
            rank = ssm.get("dt_rank", math.ceil(WIDTH / 16))
            sizes = {"in_proj_z": inner, "in_proj_x": shared, "B_proj": shared, "C_proj": inner, "dt_proj_down": rank}
            for name, rows in sizes.items():
                t.draw(f"{m}{name}.weight", rows, WIDTH)
            convolved = inner if ssm.get("repeat_kv_before_conv", True) else shared
            for name, shape in {
                "conv1d.weight": (convolved, 1, 4), "conv1d.bias": (convolved,), "dt_proj.weight": (inner, rank),
                "dt_proj.bias": (inner,), "A_log": (inner, N), "D": (inner,), "out_proj.weight": (WIDTH, inner),
            }.items():  # fmt: skip
                t.draw(m + name, *shape)
    t.draw("model.norm.weight", WIDTH)
    if not base["tie_word_embeddings"]:
        t.draw("lm_head.weight", VOCABULARY, WIDTH)
    (folder / "config.json").write_text(json.dumps(base))
    (folder / "mamba_config.json").write_text(json.dumps(mamba))
    save_file(_merged(t) if merged else dict(t), folder / "model.safetensors", metadata={"format": "pt"})
    return lambda ids: hybrid_of_llama(base, mamba, t, ids)


def _merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The spelling of the authors' inference code: one input projection each for Mamba and attention layers."""
    out = dict(tensors)
    for name in [*tensors]:
        for first, others, new in (
            ("mamba.in_proj_z", ("in_proj_x", "B_proj", "C_proj", "dt_proj_down"), "mamba.in_proj"),
            ("self_attn.q_proj", ("k_proj", "v_proj"), "mha.in_proj"),
        ):
            if first in name:
                prefix = name.replace(first.split(".")[1] + ".weight", "")
                parts = [out.pop(name), *(out.pop(f"{prefix}{other}.weight") for other in others)]
                out[name.replace(first, new)] = torch.cat(parts)
        if "self_attn.o_proj" in name:
            out[name.replace("self_attn.o_proj", "mha.out_proj")] = out.pop(name)
    return out


def mamba_in_llama(folder: Path, seed: int, merged: bool = False, ssm_cfg: dict | None = None, **config: Any) -> Oracle:
    return _in_llama(folder, seed, {"expand": 1, "d_state": 4, **(ssm_cfg or {})}, merged, config)


def mamba2_in_llama(folder: Path, seed: int, ssm_cfg: dict | None = None, **config: Any) -> Oracle:
    ssm = {"expand": 1, "ngroups": 6, "d_state": 4, **(ssm_cfg or {})}
    return _in_llama(folder, seed, ssm, False, config)


FORMATS: dict[str, Callable[..., Oracle]] = {
    "mamba2-hf": mamba2_hf,
    "falcon-mamba-hf": falcon_mamba_hf,
    "llama-hf": llama_hf,
    "granite-hf": granite_hf,
    "granite-hybrid-hf": granite_hybrid_hf,
    "granite-moe-hf": granite_moe_hf,
    "granite-moe-hybrid-hf": granite_moe_hybrid_hf,
    "lfm2-hf": lfm2_hf,
    "lfm2-moe-hf": lfm2_moe_hf,
    "nemotron-h-hf": nemotron_h_hf,
    "nemotron-h-moe-hf": nemotron_h_moe_hf,
    "jamba-hf": jamba_hf,
    "jamba-moe-hf": jamba_moe_hf,
    "bamba-hf": bamba_hf,
    "falcon-h1-hf": falcon_h1_hf,
    "mamba2-state-spaces": mamba2_state_spaces,
    "mamba2attn-state-spaces": mamba2attn_state_spaces,
    "mamba-in-llama": mamba_in_llama,
    "mamba2-in-llama": mamba2_in_llama,
}
