"""Which format a config is in."""

from typing import Any

from ..config import ModelConfig
from .hugging_face import MODEL_TYPES
from .in_llama import from_mamba_in_llama
from .names import Names
from .state_spaces import from_state_spaces

SUPPORTED = "Mamba, Mamba-2, Falcon-Mamba, Llama, their hybrids mamba2attn and MambaInLlama"


def parse_config(config: dict[str, Any], mamba_config: dict[str, Any] | None = None) -> tuple[ModelConfig, Names]:
    """Reads a ``config.json``, and the ``mamba_config.json`` beside it if there is one.

    Fields that do not matter here are ignored; one that would change the result and is not implemented is refused.

    Raises:
        ValueError: another architecture, or a value that is not supported or makes no sense.
    """
    model_type = config.get("model_type")
    if mamba_config is not None:
        return from_mamba_in_llama(config, mamba_config)
    if model_type in MODEL_TYPES:
        architecture, parse = MODEL_TYPES[model_type]
        named = config.get("architectures") or [architecture]
        if named != [architecture]:
            raise ValueError(
                f"architecture {named!r} of model_type {model_type!r} is not supported; only {architecture} is"
            )
        return parse(config)
    if model_type is not None:
        raise _unsupported(model_type)
    if config.get("architectures"):
        raise _unsupported(config["architectures"][0])
    if "d_model" in config and "n_layer" in config:
        return from_state_spaces(config)
    raise ValueError(
        f"config.json names no known architecture: neither a model_type nor d_model and n_layer; supported: {SUPPORTED}"
    )


def _unsupported(architecture: object) -> ValueError:
    return ValueError(f"architecture {architecture!r} is not supported; supported: {SUPPORTED}")
