"""``NemotronHForCausalLM``: every layer is Mamba-2, attention without positions, an MLP without a gate, or experts
beside such an MLP."""

import dataclasses
from typing import Any

from ...ops.mlp_activation import ACTIVATIONS
from ...ops.select_experts import MAX_EXPERTS
from ..config import BlockConfig, ExpertsConfig, Mamba2Config, MixerConfig, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    epsilon,
    flag,
    layer_types,
    number,
    refuse,
    refuse_other,
    required,
    shown,
)
from .hugging_face import ModelTypes, llama_attention, of_backbone
from .names import Names

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_KINDS = {kind: kind for kind in _LETTERS.values()} | {"mamba": "linear_attention", "attention": "full_attention"}
_RENAMED = {"router": "gate", "router_bias": "gate.e_score_correction_bias"}
_OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
}  # fmt: skip


def _nemotron_h(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    config = config | {name: config[older] for older, name in _OLDER.items() if older in config}
    kinds = _kinds(config)
    readers = {"linear_attention": _mamba2, "full_attention": _attention, "mlp": _mlp, "moe": _moe}
    blocks: dict[str, BlockConfig] = {kind: readers[kind](config) for kind in set(kinds)}
    model, names = of_backbone(config, tuple(blocks[kind] for kind in kinds), eos=2, tie=False)
    prefixes = (
        (norm, mixer, f"{mixer}shared_experts.") if kind == "moe" else (norm, mixer)
        for kind, (norm, mixer) in zip(kinds, names.blocks, strict=True)
    )
    return model, dataclasses.replace(names, blocks=tuple(prefixes), renamed=_RENAMED)


def _kinds(config: dict[str, Any]) -> list[str]:
    """Of each layer: a list of names, or a letter for each."""
    kinds, key = config.get("layers_block_type"), "hybrid_override_pattern"
    if kinds is None:
        pattern = config.get(key)
        if not isinstance(pattern, str) or not 1 <= len(pattern) <= MAX_LAYERS:
            refuse(key, pattern, f"a string of {', '.join(_LETTERS)}")
        unknown = next((letter for letter in pattern if letter not in _LETTERS), None)
        if unknown is not None:
            raise ValueError(f"config.json has {shown(unknown)} in {key}; supported: {', '.join(_LETTERS)}")
        kinds = [_LETTERS[letter] for letter in pattern]
    number = len(kinds) if isinstance(kinds, list) else 1
    config = {"num_hidden_layers": number} | config | {"layers_block_type": kinds}
    return [_KINDS[kind] for kind in layer_types(config, _KINDS, "", "layers_block_type")]


def _mamba2(config: dict[str, Any]) -> Mamba2Config:
    """dt is limited as the authors' code does it; transformers raises it to ``time_step_min`` over a whole text, and
    not in single steps."""
    refuse_other(config, "mamba_hidden_act", "silu")
    heads, groups = required(config, "mamba_num_heads", 128), required(config, "n_groups", 8)
    return Mamba2Config(
        n_heads=heads,
        head_dim=required(config, "mamba_head_dim", 64, limit=MAX_HEAD_SIZE),
        d_state=required(config, "ssm_state_size", 128, limit=MAX_HEAD_SIZE),
        x_heads=heads,
        b_groups=divides(groups, heads, "n_groups"),
        c_groups=groups,
        d_conv=conv_width(config, "conv_kernel", 4),
        conv_bias=flag(config, "use_conv_bias", True),
        bias=flag(config, "use_bias", False),
        norm_groups=groups,
        norm_eps=epsilon(config, "layer_norm_epsilon", 1e-5),
        dt_limit=dt_limit(config, "time_step_limit"),
    )


def _attention(config: dict[str, Any]) -> MixerConfig:
    refuse_other(config, "sliding_window", None)
    head_dim = required(config, "head_dim", 128, limit=MAX_HEAD_SIZE)
    return llama_attention(config | {"head_dim": head_dim, "attention_bias": False}, rotates=False)


def _moe(config: dict[str, Any]) -> tuple[MixerConfig, ...]:
    refuse_other(config, "moe_latent_size", None)
    refuse_other(config, "n_shared_experts", 1)
    count, groups = required(config, "n_routed_experts", 8, limit=MAX_EXPERTS), required(config, "n_group", 1)
    size = count // divides(groups, count, "n_group")
    if groups > 1 and size < 2:
        refuse("n_group", groups, f"at least two of the {count} experts in a group")
    top_k_groups = required(config, "topk_group", 1, limit=groups)
    experts = ExpertsConfig(
        count,
        required(config, "num_experts_per_tok", 2, limit=size * top_k_groups),
        required(config, "moe_intermediate_size", 7688),
        activation=_activation(config),
        gated=False,
        bias=True,
        score="sigmoid",
        groups=groups,
        top_k_groups=top_k_groups,
        normalize=flag(config, "norm_topk_prob", True),
        epsilon=1e-20,
        scale=number(config, "routed_scaling_factor", 1.0),
    )
    return experts, _mlp(config, "moe_shared_expert_intermediate_size", 7688)


def _activation(config: dict[str, Any]) -> str:
    refuse_other(config, "mlp_hidden_act", *ACTIVATIONS)
    return config.get("mlp_hidden_act", "relu2")


def _mlp(config: dict[str, Any], size: str = "intermediate_size", default: int = 21504) -> MlpConfig:
    return MlpConfig(
        d_inner=required(config, size, default),
        bias=flag(config, "mlp_bias", False),
        activation=_activation(config),
        gated=False,
    )


MODEL_TYPES: ModelTypes = {"nemotron_h": ("NemotronHForCausalLM", _nemotron_h)}
