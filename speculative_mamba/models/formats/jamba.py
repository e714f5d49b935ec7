"""``JambaForCausalLM``: Mamba-1 with norms of dt, B and C, or attention without positions, each followed by an MLP."""

from typing import Any

from ..config import Mamba1Config, MlpConfig, ModelConfig
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
    if required(config, "num_experts", 16) > 1 and _every(config, "expert_layer", 2, 1, layers):
        raise ValueError(
            "config.json describes a mixture of experts (num_experts is above 1), which is not supported; the dense "
            "models of the family are"
        )
    refuse_other(config, "hidden_act", "silu")
    refuse_other(config, "sliding_window", None)
    refuse_other(config, "mamba_inner_layernorms", True)
    attending, mlp = _every(config, "attn_layer", 8, 4, layers), MlpConfig(required(config, "intermediate_size"))
    attention = llama_attention(config | {"attention_bias": False}, rotates=False) if attending else None
    mamba = _mamba1(config)
    blocks = sum(((attention if i in attending else mamba, mlp) for i in range(layers)), ())
    return of_llama(config, blocks, *("self_attn." if i in attending else "mamba." for i in range(layers)), **NAMES)


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
