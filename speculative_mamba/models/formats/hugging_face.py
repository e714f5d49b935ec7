"""Hugging Face's ``MambaForCausalLM``, ``FalconMambaForCausalLM``, ``Mamba2ForCausalLM`` and ``LlamaForCausalLM``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...ops.mlp_activation import ACTIVATIONS
from ..config import AttentionConfig, Mamba1Config, Mamba2Config, MixerConfig, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    dt_rank,
    eos_token_id,
    epsilon,
    expanded,
    flag,
    number,
    object_of,
    refuse_other,
    required,
    rotary_frequencies,
    shown,
)
from .names import Names

# model_type -> its architecture, and what reads its config
ModelTypes = dict[str, tuple[str, Callable[[dict[str, Any]], tuple[ModelConfig, Names]]]]


def backbone_names(layers: int) -> Names:
    blocks = ((f"backbone.layers.{i}.norm.weight", f"backbone.layers.{i}.mixer.") for i in range(layers))
    embedding = ("backbone.embeddings.weight", "backbone.embedding.weight")
    return Names(embedding, "backbone.norm_f.weight", "lm_head.weight", tuple(blocks))


def _mamba1(config: dict[str, Any], **other: Any) -> tuple[ModelConfig, Names]:
    refuse_other(config, "hidden_act", "silu")
    d_model = required(config, "hidden_size")
    mixer = Mamba1Config(
        d_inner=required(config, "intermediate_size", expanded(config, d_model)),
        dt_rank=dt_rank(config, "time_step_rank", d_model),
        d_state=required(config, "state_size", 16, limit=MAX_HEAD_SIZE),
        d_conv=conv_width(config, "conv_kernel", 4),
        conv_bias=flag(config, "use_conv_bias", True),
        bias=flag(config, "use_bias", False),
        **other,
    )
    return of_backbone(config, (mixer,) * _layers(config), eos=0, tie=True)


def _falcon_mamba(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    return _mamba1(config, norm_eps=epsilon(config, "mixer_rms_eps", 1e-6))


def _mamba2(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    refuse_other(config, "hidden_act", "silu")
    refuse_other(config, "rms_norm", True)
    groups, heads = required(config, "n_groups", 8), required(config, "num_heads", 128)
    head_dim = required(config, "head_dim", 64, limit=MAX_HEAD_SIZE)
    inner, stated = heads * head_dim, expanded(config, required(config, "hidden_size"))
    if inner != stated:
        raise ValueError(f"config.json gives num_heads * head_dim = {inner}, but expand * hidden_size = {stated}")
    mixer = Mamba2Config(
        n_heads=heads,
        head_dim=head_dim,
        d_state=required(config, "state_size", 128, limit=MAX_HEAD_SIZE),
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
    return of_backbone(config, (mixer,) * _layers(config), eos=2, tie=False)


def _layers(config: dict[str, Any]) -> int:
    return required(config, "num_hidden_layers", limit=MAX_LAYERS)


def of_backbone(
    config: dict[str, Any], blocks: tuple[MixerConfig, ...], eos: int, tie: bool
) -> tuple[ModelConfig, Names]:
    """A model whose layers are one block each."""
    model = ModelConfig(
        d_model=required(config, "hidden_size"),
        vocab_size=required(config, "vocab_size"),
        blocks=blocks,
        eps=epsilon(config, "layer_norm_epsilon", 1e-5),
        tie_embeddings=flag(config, "tie_word_embeddings", tie),
        eos_token_id=eos_token_id(config, eos),
    )
    return model, backbone_names(len(blocks))


def _llama(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    return of_llama(config, (llama_attention(config), llama_mlp(config)) * _layers(config), "self_attn.")


def of_llama(
    config: dict[str, Any],
    blocks: tuple,
    *mixers: str | tuple[str, ...],
    mlp: str | tuple[str, ...] = "mlp.",
    mlp_norm: str = "post_attention_layernorm",
    norm: str = "norm",
    renamed: Mapping[str, str] | None = None,
    **other: Any,
) -> tuple[ModelConfig, Names]:
    """A model whose layers are two blocks each, a mixer and an MLP. mixers: what stands before the names of each
    layer's mixer (of each of several), or one for all; mlp: before those of its MLP (of each of several). mlp_norm,
    norm: names of the MLP's norm and of the last one. renamed: of ``Names``. other: of ``ModelConfig``."""
    layers = len(blocks) // 2
    mixers = mixers if len(mixers) == layers else mixers * layers
    names = []
    for i, mixer in enumerate(mixers):
        prefix = f"model.layers.{i}."
        for norm_name, parallel in (("input_layernorm", mixer), (mlp_norm, mlp)):
            parallel = (parallel,) if isinstance(parallel, str) else parallel
            names.append((f"{prefix}{norm_name}.weight", *(f"{prefix}{name}" for name in parallel)))
    model = ModelConfig(
        d_model=required(config, "hidden_size"),
        vocab_size=required(config, "vocab_size"),
        blocks=blocks,
        eps=epsilon(config, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        eos_token_id=eos_token_id(config, 2),
        **other,
    )
    return model, Names(
        ("model.embed_tokens.weight",), f"model.{norm}.weight", "lm_head.weight", tuple(names), renamed or {}
    )


def llama_attention(
    config: dict[str, Any], *, rotates: bool = True, rotated: float | None = None, **other: Any
) -> AttentionConfig:
    """rotated: the part of each head that is, where rope_parameters does not say; None: all, and another is refused.
    other: of ``AttentionConfig``."""
    heads = required(config, "num_attention_heads")
    if config.get("head_dim") is None:
        divides(heads, required(config, "hidden_size"), "num_attention_heads")
    head_dim = required(config, "head_dim", required(config, "hidden_size") // heads, limit=MAX_HEAD_SIZE)
    bias = flag(config, "attention_bias", False)
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=divides(required(config, "num_key_value_heads", heads), heads, "num_key_value_heads"),
        head_dim=head_dim,
        inv_freq=tuple(_rotary(config, head_dim, rotated).tolist()) if rotates else (),
        bias=bias,
        out_bias=bias,
        **other,
    )


def llama_mlp(config: dict[str, Any]) -> MlpConfig:
    refuse_other(config, "hidden_act", *ACTIVATIONS)
    return MlpConfig(
        d_inner=required(config, "intermediate_size"),
        bias=flag(config, "mlp_bias", False),
        activation=config.get("hidden_act", "silu"),
    )


def _rotary(config: dict[str, Any], head_dim: int, rotated: float | None) -> torch.Tensor:
    """Rotary frequencies (half of what is rotated), as ``rope_parameters``, or before it ``rope_scaling``, says."""
    scaling = object_of(config, "rope_parameters") or object_of(config, "rope_scaling")
    own = next((key for key, value in scaling.items() if isinstance(value, dict)), None)
    if own is not None:
        raise ValueError(f"config.json has rope_parameters for {shown(own)} alone; only the same for all is supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"config.json has rope_type = {shown(kind)}; only 'default', 'linear' and 'llama3' are supported"
        )
    if rotated is None:
        refuse_other(scaling | config, "partial_rotary_factor", 1.0)
        dims, what = head_dim, "head_dim"
    else:
        what = "partial_rotary_factor"
        dims = int(head_dim * number(scaling, what, rotated, limit=1.0))
    divides(2, dims, what)
    frequencies = rotary_frequencies(number(scaling, "rope_theta", number(config, "rope_theta", 10000.0)), dims)
    if kind == "linear":
        return frequencies / number(scaling, "factor")
    if kind == "llama3":
        # Long waves are stretched by the factor, short ones kept, those between interpolated.
        factor, low = number(scaling, "factor"), number(scaling, "low_freq_factor")
        high, context = number(scaling, "high_freq_factor"), number(scaling, "original_max_position_embeddings")
        if high <= low:
            raise ValueError(f"config.json gives high_freq_factor = {high:g}, but low_freq_factor = {low:g}")
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies
    return frequencies


MODEL_TYPES: ModelTypes = {
    "mamba": ("MambaForCausalLM", _mamba1),
    "falcon_mamba": ("FalconMambaForCausalLM", _falcon_mamba),
    "mamba2": ("Mamba2ForCausalLM", _mamba2),
    "llama": ("LlamaForCausalLM", _llama),
}
