"""One configuration for both public formats."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba-1 language model.

    vocab_size counts the rows of the embedding, padding included; dt_rank is the rank of the dt projection.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    eps: float = 1e-5
    tie_embeddings: bool = True
    conv_bias: bool = True
    linear_bias: bool = False
    eos_token_id: int | None = None

    @staticmethod
    def of_size(d_model: int, n_layer: int, vocab_size: int, **other: Any) -> "MambaConfig":
        """The usual proportions: d_inner = 2 d_model, dt_rank = d_model / 16 rounded up."""
        sizes = {"d_inner": 2 * d_model, "dt_rank": math.ceil(d_model / 16), **other}
        return MambaConfig(d_model, n_layer, vocab_size, **sizes)


def parse_config(config: dict[str, Any]) -> MambaConfig:
    """Reads a ``config.json`` in state-spaces or Hugging Face format; keys that do not matter here are ignored.

    Raises:
        ValueError: another architecture, or a value that makes no sense.
    """
    if config.get("model_type") == "mamba":
        parsed = _from_hugging_face(config)
    elif "model_type" in config:
        raise ValueError(f"architecture '{config['model_type']}' is not supported; supported: mamba (Mamba-1)")
    elif "d_model" in config and "n_layer" in config:
        parsed = _from_state_spaces(config)
    else:
        raise ValueError("config.json names no known architecture: neither model_type 'mamba' nor d_model and n_layer")
    for name in ("d_model", "n_layer", "vocab_size", "d_inner", "dt_rank", "d_state", "d_conv"):
        value = getattr(parsed, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json gives {name} = {value!r}; a positive whole number is needed")
    return parsed


def _refuse(config: dict[str, Any], key: str, supported: Any, default: Any) -> None:
    value = config.get(key, default)
    if value != supported:
        raise ValueError(f"config.json has {key} = {value!r}; only {supported!r} is supported")


def _from_hugging_face(config: dict[str, Any]) -> MambaConfig:
    _refuse(config, "hidden_act", "silu", "silu")
    d_model = _required(config, "hidden_size")
    rank = config.get("time_step_rank", "auto")
    return MambaConfig(
        d_model=d_model,
        n_layer=_required(config, "num_hidden_layers"),
        vocab_size=_required(config, "vocab_size"),
        d_inner=config.get("intermediate_size") or int(config.get("expand", 2) * d_model),
        dt_rank=math.ceil(d_model / 16) if rank == "auto" else rank,
        d_state=config.get("state_size", 16),
        d_conv=config.get("conv_kernel", 4),
        eps=config.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", True),
        conv_bias=config.get("use_conv_bias", True),
        linear_bias=config.get("use_bias", False),
        eos_token_id=config.get("eos_token_id", 0),
    )


def _from_state_spaces(config: dict[str, Any]) -> MambaConfig:
    _refuse(config, "rms_norm", True, True)
    _refuse(config, "d_intermediate", 0, 0)
    if config.get("attn_layer_idx"):
        raise ValueError("architecture with attention layers (attn_layer_idx) is not supported; supported: Mamba-1")
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise ValueError(f"config.json gives ssm_cfg = {ssm!r}; an object is needed")
    if ssm.get("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"architecture '{ssm['layer']}' is not supported; supported: Mamba1")
    d_model, rank = _required(config, "d_model"), ssm.get("dt_rank", "auto")
    multiple = _required({"pad_vocab_size_multiple": 8, **config}, "pad_vocab_size_multiple")
    return MambaConfig(
        d_model=d_model,
        n_layer=_required(config, "n_layer"),
        vocab_size=math.ceil(_required(config, "vocab_size") / multiple) * multiple,
        d_inner=int(ssm.get("expand", 2) * d_model),
        dt_rank=math.ceil(d_model / 16) if rank == "auto" else rank,
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        tie_embeddings=config.get("tie_embeddings", True),
        conv_bias=ssm.get("conv_bias", True),
        linear_bias=ssm.get("bias", False),
        eos_token_id=config.get("eos_token_id", 0),
    )


def _required(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json gives {key} = {value!r}; a positive whole number is needed")
    return value
