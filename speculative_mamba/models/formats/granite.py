"""``GraniteForCausalLM``, a Llama with multipliers, and ``GraniteMoeHybridForCausalLM``, its hybrids with Mamba-2."""

from typing import Any

from ..config import MlpConfig, ModelConfig
from .bamba import bamba_mamba2
from .fields import (
    MAX_LAYERS,
    layer_types,
    number,
    refuse_other,
    required,
)
from .hugging_face import ModelTypes, llama_attention, llama_mlp, of_llama
from .names import Names

_KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "self_attn", "full_attention": "self_attn"}


def _granite(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
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
        "mamba": bamba_mamba2(config) if "mamba" in kinds else None,
        "self_attn": llama_attention(config, scale=scale, rotates=rotates) if "self_attn" in kinds else None,
    }
    mlp = MlpConfig(required(config, "shared_intermediate_size", 1024))
    blocks = sum(((mixers[kind], mlp) for kind in kinds), ())
    prefixes = (f"{kind}." for kind in kinds)
    renamed = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
    return of_llama(config, blocks, *prefixes, mlp="shared_mlp.", renamed=renamed, **_multipliers(config))


def _multipliers(config: dict[str, Any]) -> dict[str, float]:
    return {key: number(config, key, 1.0) for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}


MODEL_TYPES: ModelTypes = {
    "granite": ("GraniteForCausalLM", _granite),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _hybrid),
}
