"""Which format a config is in."""

from typing import Any

from ...ops.values import shown
from ..config import ModelConfig
from . import bamba, falcon_h1, granite, hugging_face, jamba, lfm2, nemotron_h
from .in_llama import from_mamba_in_llama
from .names import Names
from .state_spaces import from_state_spaces

_FAMILIES = (hugging_face, granite, lfm2, nemotron_h, jamba, bamba, falcon_h1)
MODEL_TYPES = {name: parser for family in _FAMILIES for name, parser in family.MODEL_TYPES.items()}
SUPPORTED = (
    "Mamba, Mamba-2, Falcon-Mamba, Llama, Granite, Granite-4.0-H, LFM2, Nemotron-H, Jamba, Bamba, Falcon-H1, "
    "mamba2attn, MambaInLlama"
)


def parse_config(config: dict[str, Any], mamba_config: dict[str, Any] | None = None) -> tuple[ModelConfig, Names]:
    """Reads a ``config.json``, and the ``mamba_config.json`` beside it if there is one.

    Fields that do not matter here are ignored; one that would change the result and is not implemented is refused.

    Raises:
        ValueError: another architecture, or a value that is not supported or makes no sense.
    """
    refuse_quantised(config)
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if mamba_config is not None:
        refuse_quantised(mamba_config)
        return from_mamba_in_llama(config, mamba_config)
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        architecture, parse = MODEL_TYPES[model_type]
        if architectures and architectures != [architecture]:
            raise ValueError(
                f"architecture {shown(architectures)} of model_type {model_type!r} is not supported; "
                f"only {architecture} is"
            )
        return parse(config)
    if model_type is not None:
        raise _unsupported(model_type)
    if architectures:
        raise _unsupported(architectures[0] if isinstance(architectures, list) else architectures)
    if "d_model" in config and "n_layer" in config:
        return from_state_spaces(config)
    raise ValueError(
        f"config.json names no known architecture: neither a model_type nor d_model and n_layer; supported: {SUPPORTED}"
    )


def refuse_quantised(config: dict[str, Any]) -> None:
    """Weights that are numbers of another kind, with scales beside them."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "?") if isinstance(config[key], dict) else config[key]
            raise ValueError(
                f"config.json has {key} ({shown(method)}): quantised weights are not supported; take the checkpoint "
                "in bfloat16, float16 or float32, and dtype='q8_0' or 'q4_0' if it is to be small"
            )


def _unsupported(architecture: object) -> ValueError:
    return ValueError(f"architecture {shown(architecture)} is not supported; supported: {SUPPORTED}")
