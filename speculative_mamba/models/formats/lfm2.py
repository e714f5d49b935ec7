"""``Lfm2ForCausalLM``: gated short convolutions and attention, each followed by an MLP, and ``Lfm2MoeForCausalLM``: by
experts in all layers but the first."""

from typing import Any

from ...ops.select_experts import MAX_EXPERTS
from ..config import AttentionConfig, ExpertsConfig, MixerConfig, MlpConfig, ModelConfig, ShortConvConfig
from .fields import (
    MAX_LAYERS,
    MAX_SIZE,
    conv_width,
    eos_token_id,
    epsilon,
    flag,
    indices,
    layer_types,
    number,
    refuse,
    refuse_other,
    required,
)
from .hugging_face import ModelTypes, llama_attention
from .names import Names

_PREFIXES = {"conv": "conv.", "full_attention": "self_attn."}
_RENAMED = {
    "conv1d": "conv", "q_norm": "q_layernorm", "k_norm": "k_layernorm", "o_proj": "out_proj", "gate_proj": "w1",
    "up_proj": "w3", "down_proj": "w2", "router": "gate", "router_bias": "expert_bias",
}  # fmt: skip


def _lfm2(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    for key in ("block_use_swiglu", "use_pos_enc"):
        refuse_other(config, key, True)
    kinds = _kinds(config)
    return _model(config, kinds, [MlpConfig(_d_inner(config))] * len(kinds))


def _lfm2_moe(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    kinds = layer_types(config, _PREFIXES, "full_attention", "layer_types")
    dense = required(config, "num_dense_layers", 2, lo=0, limit=MAX_LAYERS)
    mlps: list[MixerConfig] = [MlpConfig(required(config, "intermediate_size", 7168))] * min(dense, len(kinds))
    return _model(config, kinds, mlps + [_experts(config)] * (len(kinds) - len(mlps)))


def _experts(config: dict[str, Any]) -> ExpertsConfig:
    count = required(config, "num_experts", 32, limit=MAX_EXPERTS)
    return ExpertsConfig(
        count,
        required(config, "num_experts_per_tok", 4, limit=count),
        required(config, "moe_intermediate_size", 1792),
        bias=flag(config, "use_expert_bias", True),
        score="sigmoid",
        normalize=flag(config, "norm_topk_prob", True),
        epsilon=1e-6,
        scale=number(config, "routed_scaling_factor", 1.0),
    )


def _model(config: dict[str, Any], kinds: list[str], mlps: list[MixerConfig]) -> tuple[ModelConfig, Names]:
    d_model = required(config, "hidden_size")
    mixers = {
        "conv": ShortConvConfig(d_model, conv_width(config, "conv_L_cache", 3), flag(config, "conv_bias", False)),
        "full_attention": _attention(config) if "full_attention" in kinds else None,
    }
    names = []
    for i, kind in enumerate(kinds):
        prefix = f"model.layers.{i}."
        names.append((f"{prefix}operator_norm.weight", f"{prefix}{_PREFIXES[kind]}"))
        names.append((f"{prefix}ffn_norm.weight", f"{prefix}feed_forward."))
    model = ModelConfig(
        d_model=d_model,
        vocab_size=required(config, "vocab_size"),
        blocks=sum(((mixers[kind], mlp) for kind, mlp in zip(kinds, mlps, strict=True)), ()),
        eps=epsilon(config, "norm_eps", 1e-5),
        tie_embeddings=flag(config, "tie_embedding", flag(config, "tie_word_embeddings", True)),
        eos_token_id=eos_token_id(config, 2),
    )
    embedding, norm = "model.embed_tokens.weight", "model.embedding_norm.weight"
    return model, Names((embedding,), norm, "lm_head.weight", tuple(names), _RENAMED)


def _kinds(config: dict[str, Any]) -> list[str]:
    """Of each layer. Older configs number those that attend, and without a list all of them do."""
    if config.get("layer_types") is None and config.get("full_attn_idxs") is not None:
        layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
        attending = indices(config, "full_attn_idxs", layers)
        return ["full_attention" if i in attending else "conv" for i in range(layers)]
    return layer_types(config, _PREFIXES, "full_attention", "layer_types")


def _attention(config: dict[str, Any]) -> AttentionConfig:
    theta = {"rope_theta": number(config, "rope_theta", 1e6)}
    return llama_attention(config | theta | {"attention_bias": False}, norm_eps=epsilon(config, "norm_eps", 1e-5))


def _d_inner(config: dict[str, Any]) -> int:
    """Two thirds of the stated size, times a factor, rounded up to a multiple; or the stated size."""
    key = "intermediate_size" if config.get("block_ff_dim") is None else "block_ff_dim"
    size = required(config, key, 12288)
    if not flag(config, "block_auto_adjust_ff_dim", True):
        return size
    multiple = required(config, "block_multiple_of", 256)
    size = int(number(config, "block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
    size = -(-size // multiple) * multiple
    if not 1 <= size <= MAX_SIZE:
        refuse(key, config.get(key), f"an adjusted size of 1 to {MAX_SIZE}")
    return size


MODEL_TYPES: ModelTypes = {"lfm2": ("Lfm2ForCausalLM", _lfm2), "lfm2_moe": ("Lfm2MoeForCausalLM", _lfm2_moe)}
