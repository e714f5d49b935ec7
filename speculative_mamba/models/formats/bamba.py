"""``BambaForCausalLM``: Mamba-2 or attention that rotates a part of each head, each followed by an MLP."""

from typing import Any

from ..config import Mamba2Config, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    epsilon,
    expanded,
    flag,
    indices,
    refuse_other,
    required,
)
from .hugging_face import ModelTypes, llama_attention, llama_mlp, of_llama
from .jamba import NAMES
from .names import Names

_ROTATED = 0.5  # of a head, where rope_parameters does not say


def _bamba(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    config = {"rms_norm_eps": 1e-5} | config
    refuse_other(config, "hidden_act", "silu")
    refuse_other(config, "partial_rotary_factor", _ROTATED)
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
    attending = indices(config, "attn_layer_indices", layers)
    attention = llama_attention(config, rotated=_ROTATED) if attending else None
    if attention is not None:
        refuse_other(config, "attn_rotary_emb", None, 2 * len(attention.inv_freq))
    mamba, mlp = bamba_mamba2(config), llama_mlp(config)
    blocks = sum(((attention if i in attending else mamba, mlp) for i in range(layers)), ())
    return of_llama(config, blocks, *("self_attn." if i in attending else "mamba." for i in range(layers)), **NAMES)


def bamba_mamba2(config: dict[str, Any], inner: int | None = None, **other: Any) -> Mamba2Config:
    """Granite's hybrids and Falcon-H1 have the same fields. inner: d_inner, where ``mamba_d_ssm`` is read and not
    ``mamba_expand``. other: of ``Mamba2Config``."""
    stated = "mamba_expand * hidden_size" if inner is None else "mamba_d_ssm"
    inner = expanded(config, required(config, "hidden_size"), key="mamba_expand") if inner is None else inner
    heads, groups = required(config, "mamba_n_heads", 128), required(config, "mamba_n_groups", 1)
    divides(heads, inner, "mamba_n_heads")
    if config.get("mamba_d_head", "auto") == "auto":
        head_dim = inner // heads
    else:
        head_dim = required(config, "mamba_d_head", limit=MAX_HEAD_SIZE)
    if heads * head_dim != inner:
        raise ValueError(f"config.json gives mamba_n_heads * mamba_d_head = {heads * head_dim}, but {stated} = {inner}")
    return Mamba2Config(
        n_heads=heads,
        head_dim=head_dim,
        d_state=required(config, "mamba_d_state", 256, limit=MAX_HEAD_SIZE),
        x_heads=heads,
        b_groups=divides(groups, heads, "mamba_n_groups"),
        c_groups=groups,
        d_conv=conv_width(config, "mamba_d_conv", 4),
        conv_bias=flag(config, "mamba_conv_bias", True),
        bias=flag(config, "mamba_proj_bias", False),
        norm_groups=groups,
        norm_eps=epsilon(config, "rms_norm_eps", 1e-6),
        dt_limit=dt_limit(config, "time_step_limit"),
        **other,
    )


MODEL_TYPES: ModelTypes = {"bamba": ("BambaForCausalLM", _bamba)}
