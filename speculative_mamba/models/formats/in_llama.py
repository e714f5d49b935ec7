"""The hybrids of The Mamba in the Llama (arXiv 2408.15237): a Llama some of whose layers became Mamba layers.

``config.json`` is the Llama's (or Mistral's), ``mamba_config.json`` says which layers are Mamba's and of what size. A
Mistral's sliding window is not applied, as in the authors' own inference.
"""

from typing import Any

from ..config import BlockConfig, GroupedMamba1Config, Mamba2Config, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    dt_rank,
    epsilon,
    expanded,
    flag,
    indices,
    object_of,
    refuse_other,
    refuse_unknown,
    required,
    shown,
)
from .hugging_face import llama_attention, llama_mlp, of_llama
from .names import Names

_INITIAL = "expand dt_min dt_max dt_init dt_scale dt_init_floor A_init_range conv_init use_fast_path use_mem_eff_path "
_LLAMA_TYPES = ("llama", "mistral")


def from_mamba_in_llama(config: dict[str, Any], mamba: dict[str, Any]) -> tuple[ModelConfig, Names]:
    if config.get("model_type") not in _LLAMA_TYPES:
        raise ValueError(
            f"mamba_config.json beside the architecture {shown(config.get('model_type'))} is not supported; "
            f"supported: {', '.join(_LLAMA_TYPES)}"
        )
    try:
        layers, attending, mamba_layer = _mamba_side(mamba)
        eps = epsilon(mamba, "rms_norm_eps", 1e-5)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", "mamba_config.json", 1)) from None
    for key, here, there in (
        ("n_layer", layers, required(config, "num_hidden_layers", limit=MAX_LAYERS)),
        ("d_model", mamba["d_model"], required(config, "hidden_size")),
        ("rms_norm_eps", eps, epsilon(config, "rms_norm_eps", 1e-6)),
    ):
        if here != there:
            raise ValueError(f"mamba_config.json gives {key} = {here!r}, but config.json {there!r}")
    attention_layer = (llama_attention(config), llama_mlp(config)) if attending else ()
    blocks = sum((attention_layer if i in attending else mamba_layer for i in range(layers)), ())
    return of_llama(config, blocks, *("self_attn." if i in attending else "mamba." for i in range(layers)))


def _mamba_side(mamba: dict[str, Any]) -> tuple[int, frozenset[int], tuple[BlockConfig, ...]]:
    """How many layers there are, which of them attend, and the blocks of one that does not."""
    refuse_other(mamba, "hidden_act", "silu")
    layers = required(mamba, "n_layer", limit=MAX_LAYERS)
    mlp = MlpConfig(required(mamba, "intermediate_size"))
    return layers, indices(mamba, "attn_layers", layers), (_mixer(mamba, object_of(mamba, "ssm_cfg")), mlp)


def _mixer(mamba: dict[str, Any], ssm: dict[str, Any]) -> GroupedMamba1Config | Mamba2Config:
    d_model, d_xb = required(mamba, "d_model"), required(mamba, "d_xb")
    inner = required(mamba, "d_inner", expanded(ssm, d_model))
    divides(d_xb, inner, "d_xb")
    if "ngroups" not in ssm:
        known = "d_state d_conv dt_rank conv_bias repeat_kv_before_conv proj_x_bias proj_z_bias out_proj_bias"
        refuse_unknown(ssm, "ssm_cfg", _INITIAL + known)
        for key in ("proj_x_bias", "proj_z_bias", "out_proj_bias"):
            refuse_other(ssm, key, False)
        return GroupedMamba1Config(
            d_inner=inner,
            d_xb=d_xb,
            dt_rank=dt_rank(ssm, "dt_rank", d_model),
            d_state=divides(required(ssm, "d_state", 16, limit=MAX_HEAD_SIZE), d_xb, "d_state"),
            d_conv=conv_width(ssm, "d_conv", 4),
            conv_bias=flag(ssm, "conv_bias", True),
            repeat_before_conv=flag(ssm, "repeat_kv_before_conv", True),
        )
    known = "d_state d_conv headdim d_ssm ngroups D_has_hdim rmsnorm norm_before_gate dt_limit bias conv_bias "
    refuse_unknown(ssm, "ssm_cfg", _INITIAL + known + "chunk_size repeat_kv_before_conv")
    refuse_other(ssm, "norm_before_gate", False)
    refuse_other(ssm, "d_ssm", None, inner)
    heads, head_dim = required(ssm, "ngroups"), required(ssm, "d_state", 128, limit=MAX_HEAD_SIZE)
    if heads * head_dim != inner:
        raise ValueError(f"config.json gives ngroups * d_state = {heads * head_dim}, but d_inner = {inner}")
    shared = d_xb // divides(head_dim, d_xb, "d_state")
    return Mamba2Config(
        n_heads=heads,
        head_dim=head_dim,
        d_state=head_dim,
        x_heads=shared,
        b_groups=shared,
        c_groups=heads,
        d_conv=conv_width(ssm, "d_conv", 4),
        conv_bias=flag(ssm, "conv_bias", True),
        bias=flag(ssm, "bias", False),
        norm=flag(ssm, "rmsnorm", True),
        norm_groups=heads,
        dt_limit=dt_limit(ssm, "dt_limit"),
        D_has_head_dim=flag(ssm, "D_has_hdim", False),
        repeat_before_conv=flag(ssm, "repeat_kv_before_conv", False),
    )
