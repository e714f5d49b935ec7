"""``JambaForCausalLM``: Mamba-1 with norms of dt, B and C, or attention without positions, each followed by an MLP or
experts."""

from typing import Any

from ...ops.select_experts import MAX_EXPERTS
from ..config import ExpertsConfig, Mamba1Config, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    dt_rank,
    epsilon,
    expanded,
    flag,
    refuse_other,
    required,
)
from .hugging_face import ModelTypes, llama_attention, of_llama
from .names import Names

NAMES = {"mlp": "feed_forward.", "mlp_norm": "pre_ff_layernorm", "norm": "final_layernorm"}


def _jamba(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
    refuse_other(config, "hidden_act", "silu")
    refuse_other(config, "sliding_window", None)
    refuse_other(config, "mamba_inner_layernorms", True)
    attending, mlp = _every(config, "attn_layer", 8, 4, layers), MlpConfig(required(config, "intermediate_size"))
    routed, experts = _experts(config, layers)
    attention = llama_attention(config | {"attention_bias": False}, rotates=False) if attending else None
    mamba = _mamba1(config)
    mixers = (attention if i in attending else mamba for i in range(layers))
    blocks = sum(((mixer, experts if i in routed else mlp) for i, mixer in enumerate(mixers)), ())
    return of_llama(config, blocks, *("self_attn." if i in attending else "mamba." for i in range(layers)), **NAMES)


def _experts(config: dict[str, Any], layers: int) -> tuple[range, ExpertsConfig | None]:
    """Layers with experts, and these: they count as much as a softmax over all gives them."""
    key = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    count, routed = required(config, key, 16, limit=MAX_EXPERTS), _every(config, "expert_layer", 2, 1, layers)
    if count == 1 or not routed:
        return range(0), None
    top_k = required(config, "num_experts_per_tok", 2, limit=count)
    return routed, ExpertsConfig(count, top_k, required(config, "intermediate_size"), normalize=False)


def _every(config: dict[str, Any], kind: str, period: int, offset: int, layers: int) -> range:
    """Layers of a kind: one in each period."""
    period = required(config, f"{kind}_period", period)
    return range(required(config, f"{kind}_offset", offset, lo=0, limit=period - 1), layers, period)


def _mamba1(config: dict[str, Any]) -> Mamba1Config:
    d_model = required(config, "hidden_size")
    return Mamba1Config(
        d_inner=expanded(config, d_model, key="mamba_expand"),
        dt_rank=dt_rank(config, "mamba_dt_rank", d_model),
        d_state=required(config, "mamba_d_state", 16, limit=MAX_HEAD_SIZE),
        d_conv=conv_width(config, "mamba_d_conv", 4),
        conv_bias=flag(config, "mamba_conv_bias", True),
        bias=flag(config, "mamba_proj_bias", False),
        norm_eps=epsilon(config, "rms_norm_eps", 1e-6),
        weighted_norms=True,
    )


MODEL_TYPES: ModelTypes = {"jamba": ("JambaForCausalLM", _jamba)}
