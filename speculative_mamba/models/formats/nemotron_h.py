"""``NemotronHForCausalLM``: every layer is Mamba-2, attention without positions, or an MLP without a gate."""

from typing import Any

from ...ops.mlp_activation import ACTIVATIONS
from ..config import Mamba2Config, MixerConfig, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    epsilon,
    flag,
    layer_types,
    refuse,
    refuse_other,
    required,
    shown,
)
from .hugging_face import ModelTypes, llama_attention, of_backbone
from .names import Names

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_KINDS = {kind: kind for kind in _LETTERS.values()} | {"mamba": "linear_attention", "attention": "full_attention"}
_OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
}  # fmt: skip


def _nemotron_h(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    config = config | {name: config[older] for older, name in _OLDER.items() if older in config}
    kinds = _kinds(config)
    readers = {"linear_attention": _mamba2, "full_attention": _attention, "mlp": _mlp}
    mixers: dict[str, MixerConfig] = {kind: readers[kind](config) for kind in set(kinds)}
    return of_backbone(config, tuple(mixers[kind] for kind in kinds), eos=2, tie=False)


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
    kinds = [_KINDS[kind] for kind in layer_types(config, _KINDS, "", "layers_block_type")]
    if "moe" in kinds:
        raise ValueError(
            "config.json describes a mixture of experts (layers of kind moe, or E), which is not supported; the dense "
            "models of the family are"
        )
    return kinds


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


def _mlp(config: dict[str, Any]) -> MlpConfig:
    refuse_other(config, "mlp_hidden_act", *ACTIVATIONS)
    return MlpConfig(
        d_inner=required(config, "intermediate_size", 21504),
        bias=flag(config, "mlp_bias", False),
        activation=config.get("mlp_hidden_act", "relu2"),
        gated=False,
    )


MODEL_TYPES: ModelTypes = {"nemotron_h": ("NemotronHForCausalLM", _nemotron_h)}
