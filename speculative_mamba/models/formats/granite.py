"""``GraniteForCausalLM``, a Llama with multipliers, and ``GraniteMoeHybridForCausalLM``, its hybrids with Mamba-2."""

from typing import Any

from ..config import Mamba2Config, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    epsilon,
    expanded,
    flag,
    layer_types,
    number,
    refuse_other,
    required,
)
from .hugging_face import ModelTypes, llama_attention, llama_mlp, of_llama
from .names import Names

_KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "self_attn", "full_attention": "self_attn"}


def _granite(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    layers = required(config, "num_hidden_layers", most=MAX_LAYERS)
    attention = llama_attention(config, scale=number(config, "attention_multiplier", 1.0))
    return of_llama(config, (attention, llama_mlp(config)) * layers, "self_attn.", **_multipliers(config))


def _hybrid(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    if config.get("num_local_experts", 8) != 0:
        raise ValueError(
            "config.json describes a mixture of experts (num_local_experts is not 0), which is not supported; "
            "the dense models of the family are"
        )
    refuse_other(config, "hidden_act", "silu")
    refuse_other(config, "normalization_function", "rmsnorm")
    kinds = [
        _KINDS[kind] for kind in layer_types(config, _KINDS, "linear_attention", "layer_types", "layers_block_type")
    ]
    refuse_other(config, "position_embedding_type", None, "nope", "rope")
    rotates = config.get("position_embedding_type") == "rope"
    scale = number(config, "attention_multiplier", 1.0)
    mixers = {
        "mamba": _mamba2(config) if "mamba" in kinds else None,
        "self_attn": llama_attention(config, scale=scale, rotates=rotates) if "self_attn" in kinds else None,
    }
    mlp = MlpConfig(required(config, "shared_intermediate_size", 1024))
    blocks = sum(((mixers[kind], mlp) for kind in kinds), ())
    prefixes = (f"{kind}." for kind in kinds)
    renamed = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
    return of_llama(config, blocks, *prefixes, mlp="shared_mlp.", renamed=renamed, **_multipliers(config))


def _multipliers(config: dict[str, Any]) -> dict[str, float]:
    return {key: number(config, key, 1.0) for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}


def _mamba2(config: dict[str, Any]) -> Mamba2Config:
    inner = expanded(config, required(config, "hidden_size"), key="mamba_expand")
    heads, groups = required(config, "mamba_n_heads", 128), required(config, "mamba_n_groups", 1)
    divides(heads, inner, "mamba_n_heads")
    if config.get("mamba_d_head", "auto") == "auto":
        head_dim = inner // heads
    else:
        head_dim = required(config, "mamba_d_head", most=MAX_HEAD_SIZE)
    if heads * head_dim != inner:
        raise ValueError(
            f"config.json gives mamba_n_heads * mamba_d_head = {heads * head_dim}, but mamba_expand * hidden_size = "
            f"{inner}"
        )
    return Mamba2Config(
        n_heads=heads,
        head_dim=head_dim,
        d_state=required(config, "mamba_d_state", 256, most=MAX_HEAD_SIZE),
        x_heads=heads,
        b_groups=divides(groups, heads, "mamba_n_groups"),
        c_groups=groups,
        d_conv=conv_width(config, "mamba_d_conv", 4),
        conv_bias=flag(config, "mamba_conv_bias", True),
        bias=flag(config, "mamba_proj_bias", False),
        norm_groups=groups,
        norm_eps=epsilon(config, "rms_norm_eps", 1e-6),
        dt_limit=dt_limit(config, "time_step_limit"),
    )


MODEL_TYPES: ModelTypes = {
    "granite": ("GraniteForCausalLM", _granite),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _hybrid),
}
