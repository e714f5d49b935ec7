"""The format of state-spaces/mamba: Mamba-1, Mamba-2, and either with attention layers and MLPs."""

import math
from typing import Any

from ..config import AttentionConfig, BlockConfig, Mamba1Config, Mamba2Config, MlpConfig, ModelConfig
from .fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    dt_limit,
    dt_rank,
    eos_token_id,
    expanded,
    flag,
    indices,
    number,
    object_of,
    refuse_other,
    refuse_unknown,
    required,
    rotary_frequencies,
    shown,
)
from .names import Names

_INITIAL = "layer dt_min dt_max dt_init dt_scale dt_init_floor A_init_range conv_init use_fast_path use_mem_eff_path "
_MLP_MULTIPLE = 128


def from_state_spaces(config: dict[str, Any]) -> tuple[ModelConfig, Names]:
    refuse_other(config, "rms_norm", True)
    d_model, layers = required(config, "d_model"), required(config, "n_layer", limit=MAX_LAYERS)
    ssm, multiple = object_of(config, "ssm_cfg"), required(config, "pad_vocab_size_multiple", 8)
    mixers = {"Mamba1": _mamba1, "Mamba2": _mamba2}
    layer = ssm.get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in mixers:
        raise ValueError(
            f"architecture {shown(layer)} (ssm_cfg.layer) is not supported; supported: {', '.join(mixers)}"
        )
    mixer, attending = mixers[layer](ssm, d_model), indices(config, "attn_layer_idx", layers)
    attention = _attention(object_of(config, "attn_cfg"), d_model) if attending else None
    inner = required(config, "d_intermediate", 0, lo=0)
    mlp = MlpConfig(_padded(inner, _MLP_MULTIPLE)) if inner else None
    blocks: list[BlockConfig] = []
    names = []
    for i in range(layers):
        prefix = f"backbone.layers.{i}."
        blocks.append(attention if i in attending else mixer)
        names.append((f"{prefix}norm.weight", f"{prefix}mixer."))
        if mlp is not None:
            blocks.append(mlp)
            names.append((f"{prefix}norm2.weight", f"{prefix}mlp."))
    vocab_size = required(config, "vocab_size")
    model = ModelConfig(
        d_model=d_model,
        vocab_size=vocab_size,
        padded_vocab_size=_padded(vocab_size, multiple),
        blocks=tuple(blocks),
        tie_embeddings=flag(config, "tie_embeddings", True),
        eos_token_id=eos_token_id(config, 0),
    )
    embedding = ("backbone.embedding.weight", "backbone.embeddings.weight")
    renamed = {"up_gate_proj": "fc1", "down_proj": "fc2"}
    return model, Names(embedding, "backbone.norm_f.weight", "lm_head.weight", tuple(names), renamed)


def _padded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def _mamba1(ssm: dict[str, Any], d_model: int) -> Mamba1Config:
    refuse_unknown(ssm, "ssm_cfg", _INITIAL + "d_state d_conv expand dt_rank conv_bias bias")
    return Mamba1Config(
        d_inner=expanded(ssm, d_model),
        dt_rank=dt_rank(ssm, "dt_rank", d_model),
        d_state=required(ssm, "d_state", 16, limit=MAX_HEAD_SIZE),
        d_conv=conv_width(ssm, "d_conv", 4),
        conv_bias=flag(ssm, "conv_bias", True),
        bias=flag(ssm, "bias", False),
    )


def _mamba2(ssm: dict[str, Any], d_model: int) -> Mamba2Config:
    refuse_unknown(
        ssm,
        "ssm_cfg",
        _INITIAL + "d_state d_conv expand headdim d_ssm ngroups D_has_hdim rmsnorm norm_before_gate dt_limit bias "
        "conv_bias chunk_size",
    )
    inner, head_dim = expanded(ssm, d_model), required(ssm, "headdim", 64, limit=MAX_HEAD_SIZE)
    refuse_other(ssm, "norm_before_gate", False)
    refuse_other(ssm, "d_ssm", None, inner)
    heads, groups = inner // divides(head_dim, inner, "headdim"), required(ssm, "ngroups", 1)
    return Mamba2Config(
        n_heads=heads,
        head_dim=head_dim,
        d_state=required(ssm, "d_state", 128, limit=MAX_HEAD_SIZE),
        x_heads=heads,
        b_groups=divides(groups, heads, "ngroups"),
        c_groups=groups,
        d_conv=conv_width(ssm, "d_conv", 4),
        conv_bias=flag(ssm, "conv_bias", True),
        bias=flag(ssm, "bias", False),
        norm=flag(ssm, "rmsnorm", True),
        norm_groups=groups,
        dt_limit=dt_limit(ssm, "dt_limit"),
        D_has_head_dim=flag(ssm, "D_has_hdim", False),
    )


def _attention(attn: dict[str, Any], d_model: int) -> AttentionConfig:
    known = "causal d_conv head_dim num_heads num_heads_kv mlp_dim qkv_proj_bias out_proj_bias softmax_scale "
    known += "rotary_emb_dim rotary_emb_base rotary_emb_interleaved"
    refuse_unknown(attn, "attn_cfg", known)
    if attn.get("causal") is not True:
        raise ValueError(
            f"config.json has attn_cfg.causal = {shown(attn.get('causal', False))}; only True is supported"
        )
    refuse_other(attn, "mlp_dim", 0)
    refuse_other(attn, "rotary_emb_interleaved", False)
    heads, rotated = required(attn, "num_heads"), required(attn, "rotary_emb_dim", 0, lo=0)
    if attn.get("head_dim") is None:
        divides(heads, d_model, "num_heads")
    head_dim = required(attn, "head_dim", d_model // heads, limit=MAX_HEAD_SIZE)
    frequencies = ()
    if rotated:
        divides(2, rotated, "rotary_emb_dim")
        if rotated > head_dim:
            raise ValueError(f"config.json gives rotary_emb_dim = {rotated}, more than head_dim = {head_dim}")
        frequencies = rotary_frequencies(number(attn, "rotary_emb_base", 10000.0), rotated).tolist()
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=divides(required(attn, "num_heads_kv", heads), heads, "num_heads_kv"),
        head_dim=head_dim,
        inv_freq=tuple(frequencies),
        scale=None if attn.get("softmax_scale") is None else number(attn, "softmax_scale"),
        bias=flag(attn, "qkv_proj_bias", True),
        out_bias=flag(attn, "out_proj_bias", True),
        d_conv=conv_width(attn, "d_conv") if required(attn, "d_conv", 0, lo=0) else 0,
    )
