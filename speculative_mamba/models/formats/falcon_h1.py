"""``FalconH1ForCausalLM``: Mamba-2 and attention side by side in every block, each followed by an MLP; multipliers."""

from dataclasses import replace
from functools import partial
from typing import Any

from ..config import AttentionConfig, Mamba2Config, ModelConfig
from .bamba import bamba_mamba2
from .fields import MAX_LAYERS, flag, number, numbers, refuse_other, required
from .hugging_face import ModelTypes, llama_attention, llama_mlp, of_llama
from .jamba import NAMES
from .names import Names


def _falcon_h1(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    config = {"rms_norm_eps": 1e-5} | config
    refuse_other(config, "hidden_act", "silu")
    layers, multiplier = required(config, "num_hidden_layers", limit=MAX_LAYERS), partial(number, config, default=1.0)
    gate, down = numbers(config, "mlp_multipliers", 2)
    mlp = replace(llama_mlp(config), gate_multiplier=gate)
    outputs = (
        multiplier("ssm_out_multiplier"),
        multiplier("attention_in_multiplier") * multiplier("attention_out_multiplier"),
    )
    return of_llama(
        config,
        ((_mamba2(config), _attention(config)), mlp) * layers,
        ("mamba.", "self_attn."),
        embedding_multiplier=multiplier("embedding_multiplier"),
        mixer_multipliers=(outputs, (down,)) * layers,
        logits_scaling=1 / multiplier("lm_head_multiplier"),
        **NAMES,
    )


def _mamba2(config: dict[str, Any]) -> Mamba2Config:
    return bamba_mamba2(
        config,
        None if config.get("mamba_d_ssm", "absent") is None else required(config, "mamba_d_ssm", 1024),
        out_bias=flag(config, "projectors_bias", False),
        norm=flag(config, "mamba_rms_norm", False),
        gate_first=not flag(config, "mamba_norm_before_gate", True),
        in_multiplier=number(config, "ssm_in_multiplier", 1.0),
        multipliers=numbers(config, "ssm_multipliers", 5),
    )


def _attention(config: dict[str, Any]) -> AttentionConfig:
    """Multipliers of q and k are one of their product, and that of v is one of the output."""
    attention, inputs = llama_attention(config), number(config, "attention_in_multiplier", 1.0)
    if attention.bias and inputs != 1:
        raise ValueError("config.json has attention_bias and an attention_in_multiplier; only one of them is supported")
    return replace(attention, scale=attention.head_dim**-0.5 * inputs**2 * number(config, "key_multiplier", 1.0))


MODEL_TYPES: ModelTypes = {"falcon_h1": ("FalconH1ForCausalLM", _falcon_h1)}
