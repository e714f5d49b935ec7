"""``GraniteForCausalLM``, a Llama with multipliers; ``GraniteMoeForCausalLM``, with experts in place of MLPs; and
``GraniteMoeHybridForCausalLM``, hybrids with Mamba-2, where experts stand beside the MLP."""

from typing import Any

from ...ops.select_experts import MAX_EXPERTS
from ..config import ExpertsConfig, MlpConfig, ModelConfig
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

_RENAMED = {"gate_up_proj": "input_linear", "down_proj": "output_linear", "router": "router.layer"}
_KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "self_attn", "full_attention": "self_attn"}


def _granite(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
    attention = llama_attention(config, scale=number(config, "attention_multiplier", 1.0))
    return of_llama(config, (attention, llama_mlp(config)) * layers, "self_attn.", **_multipliers(config))


def _moe(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
    attention = llama_attention(config, scale=number(config, "attention_multiplier", 1.0))
    experts = _experts(config, required(config, "num_local_experts", 8, limit=MAX_EXPERTS))
    return of_llama(
        config, (attention, experts) * layers, "self_attn.", mlp="block_sparse_moe.", renamed=_RENAMED,
        **_multipliers(config),
    )  # fmt: skip


def _hybrid(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
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
    mlps, names = MlpConfig(required(config, "shared_intermediate_size", 1024)), "shared_mlp."
    count = required(config, "num_local_experts", 8, lo=0, limit=MAX_EXPERTS)
    if count:
        mlps, names = (mlps, _experts(config, count)), (names, "block_sparse_moe.")
    blocks = sum(((mixers[kind], mlps) for kind in kinds), ())
    prefixes = (f"{kind}." for kind in kinds)
    return of_llama(config, blocks, *prefixes, mlp=names, renamed=_RENAMED, **_multipliers(config))


def _experts(config: dict[str, Any], count: int) -> ExpertsConfig:
    """Softmax over the logits of the chosen."""
    refuse_other(config, "hidden_act", "silu")
    top_k = required(config, "num_experts_per_tok", 2, limit=count)
    return ExpertsConfig(count, top_k, required(config, "intermediate_size", 11008))


def _multipliers(config: dict[str, Any]) -> dict[str, float]:
    return {key: number(config, key, 1.0) for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}


MODEL_TYPES: ModelTypes = {
    "granite": ("GraniteForCausalLM", _granite),
    "granitemoe": ("GraniteMoeForCausalLM", _moe),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _hybrid),
}
